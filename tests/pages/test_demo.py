"""The page: what it shows is what the other commands write, and nothing that is sent to it ends it."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import WIDTHS
from evaluating import train_tiny_run
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from helpers import Outcome, environment, run_in_process, shard_cache
from photos import picture, run_of, write_hostile, write_photo
from PIL import Image

from data_shards.errors import UserError
from models.discriminator import Discriminator
from models.generator import FurryGenerator
from pipeline import demo, generate, segment
from pipeline.generation.sampler import Sampler
from pipeline.generation.trained_run import TrainedRun
from pipeline.pages.demonstration.photograph import choose_matting, read_upload
from pipeline.pages.demonstration.photograph import segment as segment_photo
from pipeline.pages.demonstration.sample import Choices, harden, make_sample
from pipeline.photographs.distillation.network import MattingNetwork, save_network

CPU = torch.device("cpu")
DEMO = Path(demo.__file__)
AS_MADE: dict[str, Any] = {"psi": 0.7, "background_seed": None, "fade_in": 1.0, "threshold": 0.5, "hardness": 0.0}
PICTURES = ("composite", "cutout", "mask", "foreground", "background", "coarse")


@pytest.fixture
def run(generator: FurryGenerator, discriminator: Discriminator) -> TrainedRun:
    return run_of(generator, discriminator)


def choices(seed: int, **changes: Any) -> Choices:
    return Choices(seed=seed, **AS_MADE | changes)


def sample(run: TrainedRun, seed: int, psi: float = 0.7) -> Any:
    return Sampler(run, seed=seed, psi=psi, noise_mode="random", batch=1).generate([0])


# Generated images


def test_what_is_not_changed_is_the_first_sample_of_its_seed_to_the_bit(run: TrainedRun) -> None:
    shown, expected = make_sample(run, choices(3, fade_in=run.fade_in)), sample(run, 3)
    for name in ("composite", "foreground", "background", "mask_coarse", "mask_fine", "mask"):
        assert torch.equal(getattr(shown, name), getattr(expected, name)), name
    assert not torch.equal(shown.foreground, make_sample(run, choices(4)).foreground)
    assert not torch.equal(shown.foreground, make_sample(run, choices(3, psi=1.0)).foreground)


def test_another_background_is_that_of_its_seed_behind_the_same_foreground(run: TrainedRun) -> None:
    own, swapped = make_sample(run, choices(3)), make_sample(run, choices(3, background_seed=8))
    assert torch.equal(swapped.background, sample(run, 8).background)
    assert torch.equal(swapped.foreground, own.foreground) and torch.equal(swapped.mask, own.mask)
    expected = own.mask * own.foreground + (1 - own.mask) * sample(run, 8).background
    torch.testing.assert_close(swapped.composite, expected)


def test_gamma_weighs_the_fine_mask(run: TrainedRun) -> None:
    for gamma in (0.0, 0.4, 2.0):
        shown = make_sample(run, choices(0, fade_in=gamma))
        torch.testing.assert_close(shown.mask, (shown.mask_coarse + gamma * shown.mask_fine).clamp(0, 1))
    assert not torch.equal(shown.mask, shown.mask_coarse)


def test_hardness_stretches_alpha_about_the_threshold() -> None:
    alpha = torch.linspace(0, 1, 101)
    assert torch.equal(harden(alpha, 0.3, 0.0), alpha)
    away = (alpha - 0.3).abs() > 1e-3
    assert torch.equal(harden(alpha, 0.3, 1.0)[away], (alpha > 0.3).float()[away])
    # Twice as steep: from 0.15 to 0.65.
    torch.testing.assert_close(harden(alpha, 0.3, 0.5), ((alpha - 0.15) / 0.5).clamp(0, 1))


def test_hardened_alpha_is_in_the_composite(run: TrainedRun) -> None:
    shown = make_sample(run, choices(0, hardness=1.0))
    inside = shown.mask == 1
    assert 0 < inside.float().mean() < 1 and (inside | (shown.mask == 0)).float().mean() > 0.99
    assert torch.equal(*(x[inside.expand_as(x)] for x in (shown.composite, shown.foreground)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, "4294967295"),
        ({"background_seed": -5}, "background seed -5"),
        ({"psi": 1.5}, "psi 1.5"),
        ({"fade_in": 2.5}, "gamma 2.5"),
        ({"hardness": float("nan")}, "hardness nan"),
        ({"threshold": -0.1}, "threshold -0.1"),
    ],
)
def test_impossible_choice_is_one_line(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Choices(**{"seed": 0} | AS_MADE | change)


# Photographs


def test_a_photo_is_cut_out_by_the_distilled_network_where_there_is_one(run: TrainedRun, tmp_path: Path) -> None:
    network = MattingNetwork(32).eval()
    (tmp_path / "distilled").mkdir()
    save_network(network, tmp_path / "distilled" / "network.pt", {})
    matting = choose_matting(replace(run, run_dir=tmp_path), CPU)
    assert matting is not None and matting.is_distilled
    photo = read_upload(write_photo(tmp_path / "photo.png", 32, 32))
    alpha, cutout = segment_photo(matting, photo)
    with torch.no_grad():
        expected = network(torch.tensor(photo).permute(2, 0, 1)[None] / 127.5 - 1)[0, 0] * 255
    assert np.abs(alpha - expected.numpy()).max() <= 0.51
    assert cutout.shape == (32, 32, 4) and np.array_equal(cutout[..., 3], alpha)


def test_without_one_the_mask_predictor_is_enlarged(run: TrainedRun, tmp_path: Path) -> None:
    matting = choose_matting(replace(run, run_dir=tmp_path), CPU)
    assert matting is not None and not matting.is_distilled
    photo = read_upload(write_photo(tmp_path / "photo.png", 32, 32))
    predicted = run.discriminator.predict_mask(torch.tensor(photo).permute(2, 0, 1)[None] / 127.5 - 1)
    expected = F.interpolate(predicted, size=(32, 32), mode="bilinear")[0, 0] * 255
    assert np.abs(segment_photo(matting, photo)[0] - expected.numpy()).max() <= 0.51
    assert expected.std() > 10
    for size in ((97, 131), (300, 20), (7, 9)):
        photo = read_upload(write_photo(tmp_path / "photo.png", *size))
        alpha, cutout = segment_photo(matting, photo)
        assert alpha.shape == photo.shape[:2] == size[::-1] and np.array_equal(cutout[..., 3], alpha)


def test_a_run_without_either_has_no_way(run: TrainedRun, tmp_path: Path) -> None:
    bare = replace(run, run_dir=tmp_path, discriminator=Discriminator(32, mask_predictor=False))
    assert choose_matting(bare, CPU) is None


def said(page: Any) -> list[str]:
    """Texts of a page."""
    return [part["props"]["value"] for part in page.config["components"] if part["type"] == "markdown"]


def test_the_page_says_what_cuts_photos_out_and_how_to_make_better(run: TrainedRun, tmp_path: Path) -> None:
    from pipeline.pages.demonstration.page import make_page

    found = choose_matting(replace(run, run_dir=tmp_path), CPU)
    assert found is not None
    for matting, words in (
        (replace(found, is_distilled=True), "By the network that was distilled from this run."),
        (found, "mask predictor, 16 squares across and enlarged: only a rough idea. `python pipeline/distill.py --run"),
        (None, "no network for photographs; `python pipeline/distill.py --run run` makes one"),
    ):
        *_, text = said(make_page(run, matting, tmp_path))
        assert words in text


def test_gamma_cannot_be_moved_where_there_is_no_fine_mask(run: TrainedRun, tmp_path: Path) -> None:
    from pipeline.pages.demonstration.page import make_page

    for has_fine in (True, False):
        generator = FurryGenerator(32, WIDTHS, fine_mask=has_fine).eval()
        page = make_page(replace(run, generator=generator), None, tmp_path)
        (gamma,) = (part["props"] for part in page.config["components"] if "gamma" in part["props"].get("label", ""))
        assert gamma["interactive"] is has_fine and ("no fine mask" in gamma["info"]) is not has_fine


def test_a_photo_of_too_many_pixels_is_refused_by_its_size(tmp_path: Path) -> None:
    Image.new("1", (6000, 5000)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match=r"large\.png is of 6,000 x 5,000 px: give one of 25 million pixels at most"):
        read_upload(tmp_path / "large.png")


# The command


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a trained run, a network for photos, and files to send."""
    cwd = tmp_path_factory.mktemp("demo")
    train_tiny_run(cwd, shard_cache(tmp_path_factory))
    torch.manual_seed(0)
    (cwd / "run" / "distilled").mkdir()
    save_network(MattingNetwork(32).eval(), cwd / "run" / "distilled" / "network.pt", {})
    write_photo(cwd / "photo.png", 150, 70)
    write_hostile(cwd / "hostile")
    (cwd / "hostile" / "notes.txt").write_text("not an image")
    Image.new("1", (6000, 5000)).save(cwd / "hostile" / "large.png")
    return cwd


@contextlib.contextmanager
def serving(cwd: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The command at work; what it says is in ``cwd/out`` and ``cwd/err``, its files are in ``cwd/tmp``."""
    (cwd / "tmp").mkdir(exist_ok=True)
    arguments = ("--run", "run", "--port", "0", "--num-threads", "1")
    with (cwd / "out").open("w") as out, (cwd / "err").open("w") as err:
        server = subprocess.Popen(
            [sys.executable, str(DEMO), *arguments],
            cwd=cwd,
            env=environment() | {"TMPDIR": str(cwd / "tmp"), "HTTP_PROXY": "http://127.0.0.1:9"},
            stdout=out,
            stderr=err,
        )
    try:
        while "http" not in (told := (cwd / "out").read_text()):
            assert server.poll() is None, (cwd / "err").read_text()
            time.sleep(0.05)
        yield told.split()[1], server
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def address(cwd: Path) -> Iterator[str]:
    with serving(cwd) as (address, _):
        assert address.startswith("http://127.0.0.1:")
        yield address


@pytest.fixture(scope="module")
def client(address: str, tmp_path_factory: pytest.TempPathFactory) -> Client:
    downloads = tmp_path_factory.mktemp("downloads")
    return Client(address, verbose=False, analytics_enabled=False, download_files=downloads)


def ask(client: Client, seed: int, **changes: Any) -> dict[str, bytes]:
    """Files of the images, by their names."""
    wanted = {"swapped": False, "background_seed": 1} | {**AS_MADE, "background_seed": 1} | changes
    files = client.predict(seed=seed, **wanted, api_name="/generate")
    return {name: Path(file).read_bytes() for name, file in zip(PICTURES, files, strict=True)}


def test_the_page_shows_what_generate_writes(cwd: Path, client: Client) -> None:
    outcome = run_in_process(
        generate.main,
        Path(generate.__file__),
        cwd,
        *("cutouts", "--run", "run", "--count", "1", "--seed", "5", "--psi", "0.7", "--num-threads", "1"),
    )
    assert outcome.code == 0, outcome.err
    # Its masks are of the checkpoint's gamma: 4 steps of a fade-in of 10.
    files = client.predict(5, 0.7, False, 1, 0.4, 0.5, 0.0, api_name="/generate")
    assert [Path(file).name for file in files] == [f"seed5-{name}.png" for name in PICTURES]
    assert torch.equal(picture(Path(files[1])), picture(cwd / "run" / "generated" / "cutouts" / "00000000.png"))


def test_the_same_choices_give_the_same_bytes_however_many_ask_at_once(client: Client) -> None:
    alone = [ask(client, seed) for seed in range(3)]
    jobs = [client.submit(seed, 0.7, False, 1, 1.0, 0.5, 0.0, api_name="/generate") for seed in 2 * [0, 1, 2]]
    for job, expected in zip(jobs, 2 * alone, strict=True):
        for name, file in zip(PICTURES, job.result(timeout=120), strict=True):
            assert Path(file).read_bytes() == expected[name], name
    assert alone[0]["composite"] != alone[1]["composite"]
    swapped = ask(client, 0, swapped=True)
    assert swapped["background"] == alone[1]["background"] and swapped["mask"] == alone[0]["mask"]


def test_a_photo_comes_back_as_segment_writes_it(cwd: Path, client: Client) -> None:
    outcome = run_in_process(
        segment.main, Path(segment.__file__), cwd, "photo.png", "--run", "run", "--num-threads", "1"
    )
    assert outcome.code == 0, outcome.err
    photo, alpha, cutout = map(Path, client.predict(handle_file(cwd / "photo.png"), api_name="/segment"))
    assert photo.read_bytes() == (cwd / "photo.png").read_bytes()
    for file in (alpha, cutout):
        assert file.read_bytes() == (cwd / "segmented" / file.name).read_bytes()
    assert picture(cutout).shape == (70, 150, 4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text.png", "text.png cannot be used: it is no image"),
        ("truncated.png", "truncated.png cannot be used: image file is truncated"),
        ("empty.png", "empty.png cannot be used: it is no image"),
        ("enormous.png", "enormous.png cannot be used: it has more than 89.5 million pixels"),
        ("large.png", "large.png is of 6,000 x 5,000 px"),
        ("notes.txt", "Invalid file type"),
    ],
)
def test_hostile_upload_gets_a_message_and_the_next_one_a_cutout(
    name: str, words: str, cwd: Path, client: Client
) -> None:
    with pytest.raises(AppError) as error:
        client.predict(handle_file(cwd / "hostile" / name), api_name="/segment")
    assert words in str(error.value) and str(cwd) not in str(error.value)
    assert len(client.predict(handle_file(cwd / "photo.png"), api_name="/segment")) == 3


def test_what_is_said_on_the_page_is_text_and_no_markup() -> None:
    from pipeline.pages.demonstration.page import errors_on_the_page

    with pytest.raises(AppError) as error, errors_on_the_page(None):
        raise UserError("<img src=x>.png & more")
    assert error.value.message == "&lt;img src=x&gt;.png &amp; more"


def test_impossible_seed_gets_a_message(client: Client) -> None:
    with pytest.raises(AppError, match="seed -1 is invalid"):
        ask(client, -1)
    with pytest.raises(AppError, match="a seed is empty"):
        ask(client, None)  # type: ignore[arg-type]


def post(url: str, content: bytes, kind: str) -> bytes:
    request = urllib.request.Request(url, content, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=60) as response:
        body: bytes = response.read()
    return body


def test_an_upload_larger_than_the_limit_is_refused(address: str) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head + bytes(65 * 2**20) + b"\r\n--x--\r\n"
    with pytest.raises(urllib.error.HTTPError) as error:
        post(f"{address}gradio_api/upload", body, "multipart/form-data; boundary=x")
    assert error.value.code == 413


def test_no_file_of_the_machine_can_be_had_by_its_name(cwd: Path, address: str) -> None:
    for file in (cwd / "photo.png", cwd / "run" / "config.yaml"):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{address}gradio_api/file={file}", timeout=60)
        assert error.value.code == 403
    given = {"data": [{"path": str(cwd / "photo.png"), "meta": {"_type": "gradio.FileData"}}]}
    asked = json.loads(post(f"{address}gradio_api/call/segment", json.dumps(given).encode(), "application/json"))
    with urllib.request.urlopen(f"{address}gradio_api/call/segment/{asked['event_id']}", timeout=60) as answer:
        assert b"event: error" in answer.read()
    assert "photo.png to the gradio cache dir because it was not uploaded by a user" in (cwd / "err").read_text()


def test_the_page_asks_nothing_of_other_machines(address: str) -> None:
    for path in ("", "theme.css"):
        with urllib.request.urlopen(address + path, timeout=60) as response:
            policy, page = response.headers["Content-Security-Policy"], response.read().decode()
        assert "default-src 'self'" in policy and "http" not in policy
        assert not re.findall(r"url\(.?https?:|(?:src|href)=.https?:|@font-face|@import", page)
    with urllib.request.urlopen(f"{address}config", timeout=60) as response:
        config = json.load(response)
    assert config["analytics_enabled"] is False and config["run_history"] is False


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_quietly_and_leaves_nothing_of_what_was_sent(by: signal.Signals, cwd: Path, tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(cwd / "run")
    with serving(tmp_path) as (address, server):
        client = Client(address, verbose=False, analytics_enabled=False, download_files=tmp_path / "downloads")
        client.predict(handle_file(cwd / "photo.png"), api_name="/segment")
        assert list((tmp_path / "tmp").rglob("photo-cutout.png"))
        os.kill(server.pid, by)
        assert server.wait(30) == 0
    assert (tmp_path / "err").read_text() == "" and len((tmp_path / "out").read_text().splitlines()) == 1
    assert not list((tmp_path / "tmp").glob("furrygan-demo-*"))
    assert {file.name for file in tmp_path.iterdir()} == {"run", "tmp", "out", "err", "downloads"}


def demonstrating(cwd: Path, *arguments: str) -> Outcome:
    return run_in_process(demo.main, DEMO, cwd, *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ("--run",)),
        ("--run nowhere", ("nowhere", "not a run directory")),
        ("--run run --checkpoint none.pt", ("none.pt", "does not exist")),
        ("--run run --port 70000", ("--port 70000", "65535")),
        ("--run run --host 192.0.2.1", ("192.0.2.1", "listened on")),
        ("--run run --num-threads -1", ("--num-threads -1",)),
        ("--run spoilt", ("network.pt is no distilled network",)),
    ],
)
def test_mistake_is_one_line_and_code_2(arguments: str, words: tuple[str, ...], cwd: Path) -> None:
    if not (cwd / "spoilt").exists():
        (cwd / "spoilt" / "distilled").mkdir(parents=True)
        (cwd / "spoilt" / "distilled" / "network.pt").write_text("no network")
        for name in ("config.yaml", "checkpoints"):
            (cwd / "spoilt" / name).symlink_to(cwd / "run" / name)
    outcome = demonstrating(cwd, *arguments.split())
    assert (outcome.code, outcome.out, len(outcome.err.splitlines())) == (2, "", 1), outcome.err
    for word in ("error:", *words):
        assert word in outcome.err


def test_missing_gradio_is_one_line_with_the_remedy(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gradio" else find(name))
    outcome = demonstrating(cwd, "--run", "run")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert "pip install 'furrygan-pipeline[demo]'" in outcome.err and "uv sync --extra demo" in outcome.err

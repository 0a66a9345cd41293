"""The user study: what participants are shown and not told, what becomes of their answers, and what those say."""

import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

from data_shards.command import run_command

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.special import betainc, ndtri
from starlette.testclient import TestClient

from pipeline import user_study
from pipeline.pages.study.answers import Answer, Answers, Study
from pipeline.pages.study.commands import Serve, make_app
from pipeline.pages.study.plan import Trial, trials
from pipeline.pages.study.result import binomial_share, summarise

NAMES = [f"cat{number}" for number in range(6)]
QUESTION = "Which mask is more precise?"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photographs, the full masks of one method, the empty ones of the other."""
    for folder in ("photos", "full", "empty"):
        (tmp_path / folder).mkdir()
    for number, name in enumerate(NAMES):
        Image.new("RGB", (12, 8), (10 * number, 90, 200)).save(tmp_path / "photos" / f"{name}.jpg", quality=100)
        told = PngInfo()
        told.add_text("Software", "secret")
        Image.new("L", (12, 8), 255).save(tmp_path / "full" / f"{name}.png", pnginfo=told)
        Image.new("L", (12, 8), 0).save(tmp_path / "empty" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(**options: Any) -> Serve:
    given = {"images": Path("photos"), "method_a": "ours=full", "method_b": "theirs=empty", "answers": Path("s.sqlite")}
    return Serve(**given | options)


def client(**options: Any) -> TestClient:
    return TestClient(make_app(command(**options)).asgi())


def shown(client: TestClient, path: str) -> Image.Image:
    response = client.get(path)
    assert response.status_code == 200, path
    return Image.open(io.BytesIO(response.content))


def is_full(client: TestClient, participant: str, number: int, side: str) -> bool:
    return shown(client, f"/p/{participant}/{number}/{side}/mask.png").getextrema() == (255, 255)


# What is shown


def test_views_are_the_photo_the_mask_and_the_photo_under_the_mask(folders: Path) -> None:
    masks = np.random.default_rng(0).integers(256, size=(6, 8, 12), dtype=np.uint8)
    for name, mask in zip(NAMES, masks, strict=True):
        Image.fromarray(mask).save(folders / "full" / f"{name}.png")
    c = client()
    for number in range(6):
        side = "right" if is_empty(c, "p", number, "left") else "left"
        photo, mask, cutout = (shown(c, f"/p/p/{number}/{side}/{view}.png") for view in ("photo", "mask", "cutout"))
        (name,) = (n for n, m in zip(NAMES, masks, strict=True) if np.array_equal(np.asarray(mask), m))
        with Image.open(folders / "photos" / f"{name}.jpg") as original:
            assert np.array_equal(np.asarray(photo), np.asarray(original))
        assert np.array_equal(np.asarray(cutout)[..., :3], np.asarray(photo))
        assert np.array_equal(np.asarray(cutout)[..., 3], np.asarray(mask))


def is_empty(client: TestClient, participant: str, number: int, side: str) -> bool:
    return shown(client, f"/p/{participant}/{number}/{side}/mask.png").getextrema() == (0, 0)


def test_cutouts_are_shown_in_their_own_colours_and_their_transparency_is_the_mask(folders: Path) -> None:
    for name in NAMES:
        Image.new("RGBA", (12, 8), (1, 2, 3, 128)).save(folders / "full" / f"{name}.png")
    c = client()
    side = "right" if is_empty(c, "p", 0, "left") else "left"
    assert shown(c, f"/p/p/0/{side}/cutout.png").getpixel((5, 5)) == (1, 2, 3, 128)
    assert shown(c, f"/p/p/0/{side}/mask.png").getextrema() == (128, 128)


def test_each_method_may_have_pictures_of_its_own(folders: Path) -> None:
    (folders / "photos_b").mkdir()
    for name in NAMES:
        Image.new("RGB", (12, 8), "white").save(folders / "photos_b" / f"{name}.png")
    c = client(images_b=Path("photos_b"))
    assert c.get("/p/p/state").json()["own_photos"] is True
    for number in range(6):
        for side in ("left", "right"):
            is_white = shown(c, f"/p/p/{number}/{side}/photo.png").getpixel((0, 0)) == (255, 255, 255)
            assert is_white == is_empty(c, "p", number, side)


def test_folders_that_segment_wrote_serve_as_they_are(folders: Path) -> None:
    for name in NAMES:
        (folders / "full" / f"{name}.png").rename(folders / "full" / f"{name}-alpha.png")
        Image.new("RGBA", (12, 8), (9, 9, 9, 0)).save(folders / "full" / f"{name}-cutout.png")
    c = client()
    for number in range(len(NAMES)):
        sides = {side: shown(c, f"/p/p/{number}/{side}/mask.png").getextrema() for side in ("left", "right")}
        assert sorted(sides.values()) == [(0, 0), (255, 255)]


def test_one_mask_whose_own_name_ends_in_alpha_hides_no_other(folders: Path) -> None:
    for folder in ("photos", "full", "empty"):
        (file,) = (folders / folder).glob(f"{NAMES[0]}.*")
        file.rename(file.with_stem("wolf-alpha"))
    assert client(repeats=0).get("/p/p/state").json()["num_trials"] == len(NAMES)


# Blinding


def test_nothing_that_a_browser_gets_names_a_method_or_a_file(folders: Path) -> None:
    c = client()
    bodies = [c.get("/p/p/"), c.get("/p/p/state")]
    bodies += [c.get(f"/p/p/{n}/{s}/{v}.png") for n in range(8) for s in ("left", "right") for v in ("mask", "cutout")]
    bodies.append(c.post("/p/p/0/left"))
    for response in bodies:
        told = response.content + repr(response.headers).encode()
        for secret in (b"ours", b"theirs", b"full", b"empty", *(name.encode() for name in NAMES), b"secret"):
            assert secret not in told.lower(), (response.url, secret)


def test_sides_and_order_differ_between_participants_and_are_the_same_for_one() -> None:
    planned = {p: trials(NAMES, p, seed=0, num_repeats=0) for p in map(str, range(400))}
    assert planned["7"] == trials(NAMES[::-1], "7", seed=0, num_repeats=0)
    assert planned["7"] != trials(NAMES, "7", seed=1, num_repeats=0)
    assert all(sorted(t.pair for t in asked) == NAMES for asked in planned.values())
    lefts = Counter(t.left for asked in planned.values() for t in asked)
    assert abs(lefts[0] - 1200) < 4 * np.sqrt(2400 / 4)  # four standard deviations of a fair coin
    firsts = Counter(asked[0].pair for asked in planned.values())
    assert min(firsts[name] for name in NAMES) > 400 / 6 - 4 * np.sqrt(400 * 5 / 36)


def test_repeats_come_last_with_sides_swapped() -> None:
    asked = trials(NAMES, "p", seed=0, num_repeats=2)
    assert asked[6:] == [Trial(t.pair, 1 - t.left, is_repeat=True) for t in asked[:2]]


# Answers


def test_an_answer_is_stored_before_the_next_question_is_known(folders: Path) -> None:
    c = client()
    state = c.post("/p/anna/0/left").json()
    assert state["num_answered"] == 1
    with sqlite3.connect("s.sqlite") as other:
        ((chosen, left, right, side),) = other.execute(
            "SELECT chosen_method, left_method, right_method, chosen_side FROM answers"
        )
    assert side == "left" and chosen == left and {left, right} == {"ours", "theirs"}
    assert (chosen == "ours") == is_full(c, "anna", 0, "left")


def test_what_is_stored_is_what_was_seen_on_the_chosen_side(folders: Path) -> None:
    c = client(repeats=3)
    for number in range(9):  # whoever sees a full mask takes it
        c.post(f"/p/ben/{number}/{'left' if is_full(c, 'ben', number, 'left') else 'right'}")
    assert {answer.chosen_method for answer in Answers.open(Path("s.sqlite")).rows()} == {"ours"}


def test_each_participant_resumes_where_they_stood_after_a_restart(folders: Path) -> None:
    c = client()
    for number in range(3):
        c.post(f"/p/anna/{number}/left")
    c.post("/p/ben/0/right")
    again = client()
    assert [again.get(f"/p/{p}/state").json()["num_answered"] for p in ("anna", "ben", "cleo")] == [3, 1, 0]


def test_cookie_leads_back_to_the_own_page(folders: Path) -> None:
    c = client()
    first = c.get("/").url.path
    assert c.get("/").url.path == first
    assert client().get("/").url.path != first


def test_a_double_click_answers_once_and_no_question_is_skipped(folders: Path) -> None:
    c = client()
    assert [c.post(f"/p/p/{number}/left").status_code for number in (0, 0, 2, 1)] == [200, 409, 409, 200]
    assert c.get("/p/p/state").json()["num_answered"] == 2
    for number in range(2, 8):
        assert c.post(f"/p/p/{number}/left").status_code == 200
    assert c.post("/p/p/8/left").status_code == 409


def test_only_the_last_answer_can_be_taken_back(folders: Path) -> None:
    c = client()
    c.post("/p/p/0/left")
    c.post("/p/p/1/left")
    assert c.delete("/p/p/0").status_code == 409
    assert c.delete("/p/p/1").json()["num_answered"] == 1
    c.post("/p/p/1/right")
    assert [row.chosen_side for row in Answers.open(Path("s.sqlite")).rows()] == ["left", "right"]


@pytest.mark.parametrize("path", ["/p/p/8/left/mask.png", "/p/p/0/up/mask.png", "/p/p/0/left/name.png", "/p/a.b/state"])
def test_unknown_addresses_are_not_found(path: str, folders: Path) -> None:
    assert client().get(path).status_code == 404


# Result


def test_interval_is_wilsons_and_p_the_exact_tail() -> None:
    k, n = 84, 100
    z = ndtri(0.975)
    centre, half = (k / n + z * z / (2 * n)), z * np.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    share = binomial_share(k, n)
    assert share.low == pytest.approx((centre - half) / (1 + z * z / n))
    assert share.high == pytest.approx((centre + half) / (1 + z * z / n))
    assert share.p_value == pytest.approx(2 * betainc(k, n - k + 1, 0.5))  # P(X >= k) for a fair coin, twice


def answered(participant: str, pair: str, left: str, side: str, *, is_repeat: bool = False) -> Answer:
    methods = {"left": left, "right": "b" if left == "a" else "a"}
    assert side in ("left", "right")
    number = int(pair) + 2 * is_repeat
    return Answer(participant, number, pair, is_repeat, *methods.values(), side, methods[side], "now")  # type: ignore[arg-type]


def test_result_counts_what_it_says() -> None:
    study = Study(QUESTION, ("a", "b"), {"0": "", "1": ""}, seed=0, num_repeats=1)
    result = summarise(
        study,
        [
            answered("x", "0", "a", "left"),  # a
            answered("x", "1", "b", "left"),  # b
            answered("x", "0", "b", "right", is_repeat=True),  # a again
            answered("y", "0", "b", "right"),  # a
            answered("y", "1", "a", "left"),  # a
            answered("z", "0", "a", "right"),  # b
        ],
    )
    assert (result["num_raters"], result["num_raters_finished"], result["num_answers"]) == (3, 1, 5)
    assert (result["preference"]["a"]["count"], result["preference"]["a"]["share"]) == (3, 0.6)
    assert result["preference"]["b"]["share"] == pytest.approx(0.4)
    assert (result["left_chosen"]["count"], result["left_chosen"]["total"]) == (3, 5)
    assert (result["same_when_repeated"]["count"], result["same_when_repeated"]["total"]) == (1, 1)
    # Of pair 0 one of three couples of raters agrees, of pair 1 none of one.
    assert result["agreement_between_raters"] == pytest.approx(1 / 4)
    assert result["pairs"] == [{"name": "0", "a": 2, "b": 1}, {"name": "1", "a": 1, "b": 1}]


def test_interval_over_raters_is_wider_where_each_rater_is_of_one_mind() -> None:
    pairs = {str(number): "" for number in range(20)}
    study = Study(QUESTION, ("a", "b"), pairs, seed=0, num_repeats=0)
    rows = [answered(str(rater), pair, "a", "left" if rater < 6 else "right") for rater in range(10) for pair in pairs]
    result = summarise(study, rows)
    low, high = result["over_raters"]
    exact = binomial_share(120, 200)
    # 10 coins, not 200: the bootstrap's quantiles of Binomial(10, 0.6) / 10.
    assert (low, high) == (pytest.approx(0.3), pytest.approx(0.9))
    assert exact.low is not None and low < exact.low


# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = 0
    with mock.patch.object(sys, "argv", ["user_study.py", *map(str, arguments)]):
        try:
            run_command(user_study.main)
        except SystemExit as end:
            code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_result_is_printed_and_written(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    c = client()
    for number in range(8):
        c.post(f"/p/p/{number}/{'left' if is_full(c, 'p', number, 'left') else 'right'}")
    code, out, _ = run(capsys, "result", "--answers", "s.sqlite", "--json", "r.json")
    assert code == 0 and "| ours | 6 of 6 | 100.0% | 61.0% to 100.0% | 0.031 |" in out
    assert json.loads(Path("r.json").read_text())["same_when_repeated"]["count"] == 2


def test_result_before_any_answer_is_a_table(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client()
    code, out, _ = run(capsys, "result", "--answers", "s.sqlite")
    assert code == 0 and "0 answers on 6 pairs, 0 of 0 finished" in out


SERVE = "serve --images photos --method-a ours=full --method-b theirs=empty --answers s.sqlite --port 0"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("ours=full", "full"), ("--method-a full", "NAME=FOLDER")),
        (("ours=full", "ours=nowhere"), ("nowhere", "does not exist")),
        (("ours=full", "theirs=full"), ("both named theirs",)),
        (("--images photos", "--images others"), ("no file name in common", "others")),
        (("--images photos", "--images broken"), ("broken/cat1.png", "no image")),
        (("ours=full", "ours=small"), ("small/cat2.png", "12x8", "6x8")),
        (("ours=full", "ours=labels"), ("labels/cat0.png", "0 and 1")),
        (("ours=full", "ours=double"), ("cat0.jpg", "cat0.png", "keep one")),
        (("--port 0", "--repeats 7"), ("--repeats 7", "6 pairs")),
        (("--port 0", "--num-pairs 7"), ("--num-pairs 7", "6 names")),
        (("--port 0", "--num-pairs 0"), ("--num-pairs 0", "1 or more")),
        (("--port 0", "--port 70000"), ("--port 70000", "65535")),
        (("--port 0", "--host 192.0.2.1"), ("192.0.2.1", "listened on")),
        (("s.sqlite", "photos/cat0.jpg"), ("photos/cat0.jpg", "not the file of a user study")),
        (("s.sqlite", "nowhere/s.sqlite"), ("nowhere/s.sqlite", "cannot be used")),
        ((SERVE, "result --answers nowhere"), ("nowhere", "does not exist")),
        ((SERVE, "result --answers photos/cat0.jpg"), ("not the file of a user study",)),
    ],
)
def test_mistake_is_one_line(
    change: tuple[str, str], words: tuple[str, ...], folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("others", "broken", "small", "labels", "double"):
        (folders / name).mkdir()
    Image.new("RGB", (12, 8)).save("others/dog.png")
    Path("broken/cat1.png").write_bytes(b"no image")
    Image.new("L", (6, 8)).save("small/cat2.png")
    Image.new("L", (12, 8), 1).save("labels/cat0.png")
    for extension in ("png", "jpg"):
        Image.new("L", (12, 8)).save(f"double/cat0.{extension}")
    code, out, err = run(capsys, *SERVE.replace(*change).split())
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    for word in ("error:", *words):
        assert word in err


def test_answers_to_another_study_are_not_mixed_in(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client().post("/p/p/0/left")
    for options, word in (("--seed 1", "seed 0, not 1"), ("--method-a us=full", "methods"), ("--repeats 1", "repeats")):
        code, _, err = run(capsys, *SERVE.split(), *options.split())
        assert code == 2 and "another study" in err and word in err
    Image.new("L", (12, 8), 7).save("full/cat3.png")
    code, _, err = run(capsys, *SERVE.split())
    assert code == 2 and "other images" in err
    assert len(Answers.open(Path("s.sqlite")).rows()) == 1


def test_the_server_listens_locally_answers_and_ends_quietly_when_interrupted(folders: Path) -> None:
    with (folders / "out").open("w") as out, (folders / "err").open("w") as err:
        server = subprocess.Popen([sys.executable, user_study.__file__, *SERVE.split()], stdout=out, stderr=err)
    try:
        while "http" not in (told := (folders / "out").read_text()):
            assert server.poll() is None, (folders / "err").read_text()
            time.sleep(0.05)
        address = told.split()[1]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{address}p/p/", timeout=30) as page:
            assert b"<title>" in page.read()
        os.kill(server.pid, signal.SIGINT)
        assert server.wait(30) == 0
        assert (folders / "err").read_text() == ""
    finally:
        server.kill()
        server.wait()

"""Scribbles are read as drawn, teach the mask predictor and the masks, and leave a run without them as it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RESOLUTION, assert_gradients_agree, gradients
from helpers import Outcome, shard_cache, tiny, train_in_new_process, train_in_process, training_rows
from PIL import Image
from test_accumulation import CPU, config
from test_phases import B, make_step
from test_phases import networks as networks  # a fixture
from torch import Tensor
from two_ranks import TWO_RANKS, assert_trained_alike, assert_weights_alike

from data_shards.errors import UserError
from pipeline.config import LossConfig
from pipeline.methods.augmentation import rotate_hue
from pipeline.methods.furrygan import losses
from pipeline.methods.furrygan.phases import Networks, Scribbled, d_main, g_main
from pipeline.methods.furrygan.scribbles import load_scribbles
from pipeline.training.learner import Learner

GREEN, RED = (0, 255, 0), (255, 0, 0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_cache(tmp_path_factory)


def scribbled(num: int, resolution: int = RESOLUTION) -> Scribbled:
    """Noise, with strokes of different lengths."""
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(num, 3, resolution, resolution, generator=generator) * 2 - 1
    strokes = torch.zeros(num, 2, resolution, resolution)
    for number in range(num):
        strokes[number, 0, 3 + number, 4 : 12 + number] = 1
        if number != 1:  # one image has no background stroke
            strokes[number, 1, 20:25, 2 + number] = 1
    return Scribbled(images, strokes)


def write(folder: Path, name: str, strokes: Image.Image, extension: str = "png") -> None:
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(len(name)).integers(256, size=(32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / f"{name}.{extension}")
    strokes.save(folder / f"{name}.scribble.png")


def painted(mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (32, 32))
    for x in range(5, 20):
        image.putpixel((x, 9), GREEN if mode == "RGB" else (*GREEN, 255))
        image.putpixel((x, 28), RED if mode == "RGB" else (*RED, 255))
    return image


# Reading


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_green_is_foreground_red_is_background_and_the_rest_says_nothing(mode: str, tmp_path: Path) -> None:
    image = painted(mode)
    image.putpixel((0, 0), (255, 255, 255) if mode == "RGB" else (255, 255, 255, 255))
    image.putpixel((1, 0), (255, 255, 0) if mode == "RGB" else (255, 255, 0, 255))
    image.putpixel((2, 0), (0, 120, 0) if mode == "RGB" else (*GREEN, 20))  # the soft rim of a brush
    write(tmp_path, "a", image)
    given = load_scribbles(tmp_path, 32, CPU)
    expected = torch.zeros(1, 2, 32, 32)
    expected[0, 0, 9, 5:20] = 1
    expected[0, 1, 28, 5:20] = 1
    torch.testing.assert_close(given.strokes, expected)
    with Image.open(tmp_path / "a.png") as photo:
        levels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    torch.testing.assert_close((given.images[0] + 1) * 127.5, levels.float())


def test_pictures_without_strokes_are_passed_over_and_extensions_do_not_matter(tmp_path: Path) -> None:
    write(tmp_path, "b", painted(), "jpg")
    write(tmp_path, "a", painted())
    Image.new("RGB", (32, 32)).save(tmp_path / "c.png")
    assert len(load_scribbles(tmp_path, 32, CPU).images) == 2


def spoil_nothing_drawn(folder: Path) -> None:
    Image.new("RGB", (32, 32), "blue").save(folder / "a.scribble.png")


SPOILT: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no scribble": (lambda f: (f / "a.scribble.png").unlink(), ("no NAME.scribble.png",)),
    "unknown image": (lambda f: (f / "a.png").rename(f / "z.png"), ("a.scribble.png", "belongs to no image")),
    "nothing drawn": (spoil_nothing_drawn, ("a.scribble.png", "no green and no red")),
    "strokes of another size": (
        lambda f: painted().resize((16, 16), 0).save(f / "a.scribble.png"),
        ("a.scribble.png", "16x16", "32x32"),
    ),
    "image of another size": (lambda f: Image.new("RGB", (64, 32)).save(f / "a.png"), ("a.png", "64x32", "32x32")),
    "broken strokes": (lambda f: (f / "a.scribble.png").write_bytes(b"x"), ("a.scribble.png", "no image")),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_mistake_in_the_scribbles_is_named(kind: str, tmp_path: Path) -> None:
    spoil, words = SPOILT[kind]
    write(tmp_path, "a", painted())
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        load_scribbles(tmp_path, 32, CPU)
    for word in words:
        assert word in str(error.value)


def refused(outcome: Outcome, run_dir: Path) -> str:
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1, outcome.err
    assert not run_dir.exists()
    return outcome.err


def test_command_ends_with_one_line_before_it_makes_anything(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, word in (("nowhere", "does not exist"), ("empty", "no images")):
        outcome = train_in_process(tmp_path, *tiny(cache, run_dir="run", scribbles=folder))
        assert word in refused(outcome, tmp_path / "run")


# Losses


def test_scribble_loss_weighs_both_kinds_the_same_and_each_picture_the_same() -> None:
    pred = torch.stack([torch.full((1, 16, 16), 0.25), torch.full((1, 16, 16), 0.5)])
    strokes = torch.zeros(2, 2, 32, 32)
    strokes[0, 0, 0, :20] = 1  # 20 pixels of foreground, 0.75 off
    strokes[0, 1, 5, :2] = 1  # 2 of background, 0.25 off
    strokes[1, 1, 5, :2] = 1  # 2 of background alone, 0.5 off
    expected = ((0.75**2 + 0.25**2) / 2 + 0.5**2) / 2
    assert losses.scribble(pred, strokes).item() == pytest.approx(expected)


def test_scribble_loss_looks_at_the_place_of_the_stroke() -> None:
    pred = torch.zeros(1, 1, 16, 16, requires_grad=True)
    strokes = torch.zeros(1, 2, 64, 64)
    strokes[0, 0, 21, 42] = 1  # within cell (5, 10), whose centre is at pixel (21.5, 41.5)
    losses.scribble(pred, strokes).backward()
    assert pred.grad is not None
    assert {tuple(at) for at in pred.grad[0, 0].nonzero().tolist()} == {(4, 10), (5, 10), (4, 11), (5, 11)}
    assert pred.grad[0, 0].argmin() == 5 * 16 + 10


def test_following_moves_the_mask_and_not_the_prediction() -> None:
    mask, pred = (torch.rand(2, 1, 16, 16, requires_grad=True) for _ in range(2))
    loss = losses.mask_following(mask, pred)
    loss.backward()
    assert loss.item() == pytest.approx((mask - pred).square().mean().item())
    torch.testing.assert_close(mask.grad, 2 * (mask - pred).detach() / mask.numel())
    assert pred.grad is None


# Phases


def slow_scribble(pred: Tensor, strokes: Tensor) -> Tensor:
    """Pixel by pixel, in float64."""
    enlarged = torch.nn.functional.interpolate(pred, size=strokes.shape[-1], mode="bilinear")
    pictures = []
    for mask, (foreground, background) in zip(enlarged[:, 0], strokes, strict=True):
        kinds = []
        for target, kind in ((1.0, foreground), (0.0, background)):
            errors = [(mask[y, x] - target) ** 2 for y, x in kind.nonzero().tolist()]
            if errors:
                kinds.append(torch.stack(errors).mean())
        pictures.append(torch.stack(kinds).mean())
    return torch.stack(pictures).mean()


def test_d_main_adds_the_scribble_loss_and_changes_no_other_term(networks: Networks) -> None:
    step = make_step(networks, replace(LossConfig(), scribble=2.5))
    with_strokes = replace(step, scribbled=scribbled(2))
    without, result = d_main(step), d_main(with_strokes)
    pred = networks.discriminator.predict_mask(scribbled(2).images).double()
    expected = slow_scribble(pred, scribbled(2).strokes)
    assert result.terms["scribble"].item() == pytest.approx(expected.item(), rel=1e-4)
    for name, value in without.terms.items():
        assert result.terms[name].item() == pytest.approx(value.item(), rel=1e-5)
    total = without.loss + 2.5 * expected
    assert_gradients_agree(gradients(result.loss, networks.discriminator), gradients(total, networks.discriminator))


def test_g_main_follows_the_prediction_when_consistency_is_due_and_there_are_scribbles(networks: Networks) -> None:
    networks.discriminator.requires_grad_(False)
    config = replace(LossConfig(), scribble=2.5, consistency_start=3)
    with_strokes = [replace(make_step(networks, config, i), scribbled=scribbled(2)) for i in (2, 3, 4)]
    results = [g_main(step) for step in with_strokes]
    assert ["follow" in result.terms for result in results] == [False, False, True]
    assert "follow" not in g_main(replace(with_strokes[2], scribbled=None)).terms
    out = results[2].generated
    assert out is not None
    pred = networks.discriminator.predict_mask(out.foreground[: B // 2])
    expected = (losses.downsample_mask(out.mask[: B // 2]) - pred).square().mean()
    assert results[2].terms["follow"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert results[2].weights["follow"] == 2.5


# Choice


def test_pictures_take_turns_each_time_moved_and_tinted_anew() -> None:
    given = scribbled(3)
    taken = given.taken(range(2, 8), seed=1, mirror=True)
    assert torch.equal(given.taken([4], seed=1, mirror=True).images, taken.images[2:3])  # a function of the number
    assert not torch.equal(taken.images[0], taken.images[3])  # the same image, another time
    assert not torch.equal(given.taken([2], seed=2, mirror=True).images, taken.images[:1])
    assert not torch.equal(taken.strokes, given.strokes[[2, 0, 1, 2, 0, 1]])


def test_strokes_move_with_their_picture() -> None:
    strokes = torch.zeros(1, 2, 64, 64)
    strokes[0, 0, 20:30, 10:50] = 1
    strokes[0, 1, 40:50, 10:30] = 1
    images = (strokes[:, :1] - strokes[:, 1:]).expand(-1, 3, -1, -1)  # white on green, black on red, else grey
    taken = Scribbled(images, strokes).taken(range(8), seed=0, mirror=True)
    # Grey, which white, black and grey are, has no hue to turn.
    torch.testing.assert_close(taken.images[:, 0], taken.strokes[:, 0] - taken.strokes[:, 1], atol=1e-5, rtol=0)
    assert taken.strokes.sum(dim=(2, 3)).std(dim=0).min() > 1


def test_turned_hues_keep_the_mean_and_the_distance_from_grey() -> None:
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 0.8 - 0.4  # no colour is cut off
    turned = rotate_hue(images, torch.Generator().manual_seed(4))
    grey, turned_grey = images.mean(dim=1, keepdim=True), turned.mean(dim=1, keepdim=True)
    torch.testing.assert_close(turned_grey, grey)
    torch.testing.assert_close((turned - turned_grey).norm(dim=1), (images - grey).norm(dim=1))
    assert (turned - images).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_scribbled_pictures_are_mirrored_only_where_the_training_images_are() -> None:
    strokes = torch.zeros(1, 2, 64, 64)
    strokes[0, 0, 20:40, 24:30] = 1  # left of the other
    strokes[0, 1, 20:40, 36:42] = 1

    def are_left(mirror: bool) -> list[bool]:
        taken = Scribbled(strokes[:, :1].expand(-1, 3, -1, -1), strokes).taken(range(20), seed=0, mirror=mirror)
        columns = torch.arange(64.0)
        centres = (taken.strokes.sum(dim=2) * columns).sum(dim=2) / taken.strokes.sum(dim=(2, 3))
        return (centres[:, 0] < centres[:, 1]).tolist()

    assert all(are_left(mirror=False))
    assert 3 < sum(are_left(mirror=True)) < 17


def test_stroke_that_was_moved_out_of_the_picture_says_nothing() -> None:
    pred = torch.full((2, 1, 16, 16), 0.5)
    strokes = torch.zeros(2, 2, 32, 32)
    strokes[0, 0, 0, :10] = 1
    strokes[0, 1, 0, 0] = 1e-3
    assert losses.scribble(pred, strokes).item() == pytest.approx(0.25 / 2)


def test_micro_batches_train_as_the_whole_batch_does_with_scribbles() -> None:
    def trained(accumulate: int) -> dict[str, Any]:
        learner = Learner(replace(config(), accumulate=accumulate), CPU, scribbled(3))
        for iteration in range(2):
            images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(iteration)) * 2 - 1
            for name in ("d_main", "g_main"):
                (phase,) = (phase for phase in learner.phases if phase.name == name)
                learner.run(phase, iteration, images, range(16))
        return learner.state_dict()

    assert_weights_alike(trained(2), trained(1))


def test_two_ranks_match_one_with_scribbles(cache: Path, tmp_path: Path) -> None:
    for name in ("a", "bb", "ccc"):
        write(tmp_path / "scribbles", name, painted())
    common = [*tiny(cache, batch=16), "--scribbles", "scribbles"]
    one = train_in_process(tmp_path, *common, "--run-dir", "one")
    two = train_in_new_process(tmp_path, *common, "--run-dir", "two", launcher=TWO_RANKS)
    assert (one.code, two.code) == (0, 0), one.err + two.err
    assert_trained_alike(tmp_path / "two", tmp_path / "one")
    rows = training_rows(tmp_path / "one")
    assert all(row["loss/d_main_scribble"] > 0 for row in rows)
    assert ["loss/g_main_follow" in row for row in rows] == [True, False, True, False]

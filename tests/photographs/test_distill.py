"""Distillation: what the network is taught, how images are spoilt for it, and what becomes of a photo of any size."""

from itertools import islice, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same_bits
from numpy.typing import NDArray
from photos import run_of
from PIL import Image
from scipy import ndimage
from torch import Tensor

from data_shards.errors import UserError
from models.discriminator import Discriminator
from models.generator import FurryGenerator
from pipeline.evaluation.mask_metrics import MaskCounter
from pipeline.generation.trained_run import TrainedRun
from pipeline.methods.augmentation import augment_colours, augment_geometry, gaussian_blur, jpeg
from pipeline.methods.furrygan.losses import downsample_mask
from pipeline.photographs.distillation import fit
from pipeline.photographs.distillation.fit import FitOptions, distill, fit_network, generated_pairs, laplacian_loss
from pipeline.photographs.distillation.network import MattingNetwork, load_network, save_network
from pipeline.photographs.photos import GUIDE_EPSILON, foreground_colours, guided_upsample, matte

CPU = torch.device("cpu")


@pytest.fixture
def run(generator: FurryGenerator, discriminator: Discriminator) -> TrainedRun:
    return run_of(generator, discriminator)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def discs(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Bright discs on dark grounds: images ``[num, 3, 32, 32]`` and alpha."""
    draw = np.random.default_rng(seed)
    at = (np.arange(32) + 0.5) / 32
    x, y = draw.uniform(0.3, 0.7, (2, num, 1, 1))
    inside = (at[:, None] - y) ** 2 + (at[None, :] - x) ** 2 < draw.uniform(0.15, 0.35, (num, 1, 1)) ** 2
    alpha = torch.tensor(inside)[:, None].float()
    return alpha.expand(-1, 3, -1, -1) * 1.1 - 0.6 + 0.1 * torch.randn(num, 3, 32, 32), alpha


def test_it_learns_to_find_discs_it_has_not_seen() -> None:
    pairs = (discs(8, seed) for seed in range(1000))
    network = fit_network(pairs, 32, FitOptions(steps=100, batch=8), device=CPU)
    images, alphas = discs(32, 1001)
    counter = MaskCounter()
    counter.add(network(images), alphas)
    assert counter.metrics().iou_fg > 0.85 and counter.metrics().iou_bg > 0.9
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


def test_distillation_is_a_function_of_its_seed_and_leaves_other_random_numbers_alone(run: TrainedRun) -> None:
    real = torch.rand(8, 3, 32, 32) * 2 - 1
    torch.manual_seed(7)
    before = torch.get_rng_state()
    states = [
        dict(distill(run, repeat(real), FitOptions(steps=2, batch=8, seed=seed)).state_dict()) for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_bits(states[0], states[1])
    assert not torch.equal(states[0]["to_logits.weight"], states[2]["to_logits.weight"])


def test_swapped_samples_keep_foreground_and_alpha_and_change_backgrounds(run: TrainedRun) -> None:
    own, swapped = (next(generated_pairs(run, FitOptions(batch=8, swapped=share))) for share in (0.0, 0.5))
    assert torch.equal(own[1], swapped[1])
    torch.testing.assert_close(own[0][4:], swapped[0][4:])
    change = (own[0] - swapped[0]).abs()[:4]
    assert change.max() > 0.1
    # A change of background shows as far as the alpha lets it through.
    assert (change <= 2 * (1 - own[1][:4]) + 1e-5).all()


def test_pairs_are_endless_and_never_the_same(run: TrainedRun) -> None:
    first, second, third = islice(generated_pairs(run, FitOptions(batch=4)), 3)
    assert not torch.equal(first[0], second[0]) and not torch.equal(second[0], third[0])


def test_guidance_counts_where_the_mask_predictor_is_sure(run: TrainedRun) -> None:
    options = FitOptions(consistency=0.0, guidance=2.0)
    real = fit._RealPictures(run, repeat(torch.zeros(1, 3, 32, 32)), options)
    mask_pred = torch.full((1, 1, 16, 16), 0.5)
    mask_pred[..., :8] = 1.0
    batch = fit._RealBatch(torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32), mask_pred)
    logits = torch.zeros(1, 1, 32, 32)  # alpha 0.5: right where it is unsure, wrong by a half where it is sure
    assert real.loss(logits, batch).item() == pytest.approx(2.0 * 0.5 * 0.5**2)
    agreeing = torch.full((1, 1, 32, 32), -20.0)
    agreeing[..., :16] = 20.0
    assert real.loss(agreeing, batch).item() == pytest.approx(0, abs=1e-6)


def test_sharpening_halves_the_temperature_and_moves_neither_the_sure_nor_the_undecided() -> None:
    alphas = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
    expected = torch.sigmoid(torch.logit(alphas.double()) / 0.5).float()
    torch.testing.assert_close(fit.sharpen(alphas), expected)
    assert fit.sharpen(alphas)[[0, 3, 6]].tolist() == [0, 0.5, 1]


def test_real_pictures_come_with_what_network_and_mask_predictor_say_of_them(run: TrainedRun) -> None:
    """Moved as the image is: on an image that is its own alpha, all three stay together."""
    images = torch.full((4, 3, 32, 32), -1.0)
    images[:, :, 8:20, 8:24] = 1.0

    class Brightness(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x[:, :1] + 1) / 2

    class Predictor(torch.nn.Module):
        def predict_mask(self, x: Tensor) -> Tensor:
            return downsample_mask((x[:, :1] + 1) / 2)

    object.__setattr__(run, "discriminator", Predictor())
    batch = fit._RealPictures(run, repeat(images), FitOptions()).next(Brightness(), rng())
    seen = batch.images.mean(dim=1, keepdim=True)
    for i in range(4):
        dark, bright = seen[i][batch.alphas[i] < 0.01], seen[i][batch.alphas[i] > 0.99]
        assert bright.mean() - dark.mean() > 0.5
    assert (downsample_mask(batch.alphas) - batch.mask_pred).abs().mean() < 0.06
    assert not torch.allclose(batch.alphas[0], batch.alphas[1], atol=0.1)


def test_laplacian_loss_equals_the_difference_of_two_pyramids() -> None:
    predicted, true = torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16)

    def pyramid(x: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        levels = []
        for _ in range(3):
            n = x.shape[-1] // 2
            smaller = x.reshape(n, 2, n, 2).mean(axis=(1, 3))
            # Bilinear, half-pixel centres: 3/4 of the nearer and 1/4 of the next pixel.
            padded = np.pad(smaller, 1, mode="edge")
            rows = np.stack([0.75 * padded[1:-1] + 0.25 * padded[:-2], 0.75 * padded[1:-1] + 0.25 * padded[2:]], axis=1)
            rows = rows.reshape(2 * n, n + 2)
            left, right = 0.75 * rows[:, 1:-1] + 0.25 * rows[:, :-2], 0.75 * rows[:, 1:-1] + 0.25 * rows[:, 2:]
            levels.append(x - np.stack([left, right], axis=2).reshape(2 * n, 2 * n))
            x = smaller
        return levels

    expected = 0.0
    for p, t in zip(predicted, true, strict=True):
        for level, (a, b) in enumerate(zip(pyramid(p[0].numpy()), pyramid(t[0].numpy()), strict=True)):
            expected += 2**level * float(np.abs(a - b).mean()) / 2
    assert laplacian_loss(predicted, true).item() == pytest.approx(expected, rel=1e-4)


def test_geometry_moves_picture_and_alpha_alike_and_each_sample_apart() -> None:
    alpha = torch.zeros(6, 1, 32, 32)
    alpha[:, :, 5:20, 8:30] = 1
    moved = augment_geometry(torch.cat([alpha * 2 - 1, alpha], dim=1), rng())
    torch.testing.assert_close(moved[:, :1], moved[:, 1:] * 2 - 1, rtol=0, atol=1e-5)
    assert len(moved.unique(dim=0)) == 6
    assert torch.equal(augment_geometry(alpha, rng(3)), augment_geometry(alpha, rng(3)))
    areas = moved[:, 1:].mean(dim=(1, 2, 3))
    assert (areas > 0.15).all() and (areas < 0.75).all()  # of 0.32: nothing is lost or blown up


def test_colours_stay_in_range_and_differ_between_samples() -> None:
    images = (torch.rand(1, 3, 32, 32) * 2 - 1).expand(6, -1, -1, -1)
    spoilt = augment_colours(images, rng())
    assert spoilt.shape == images.shape and spoilt.min() >= -1 and spoilt.max() <= 1
    assert len(spoilt.unique(dim=0)) == 6
    assert torch.equal(spoilt, augment_colours(images, rng()))


def test_each_picture_is_blurred_by_its_own_deviation() -> None:
    x = torch.rand(3, 2, 24, 24)
    sigma = torch.tensor([0.0, 0.8, 2.0])
    blurred = gaussian_blur(x, sigma)
    for picture, found, s in zip(x, blurred, sigma.tolist(), strict=True):
        expected = ndimage.gaussian_filter(picture.numpy(), (0, s, s), mode="nearest", radius=(0, 5, 5))
        np.testing.assert_allclose(found.numpy(), expected if s else picture.numpy(), atol=1e-5)


def test_jpeg_spoils_the_chosen_pictures_and_more_at_low_quality() -> None:
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4) * 2 - 1, size=64, mode="bicubic").clamp(-1, 1)
    images = smooth.repeat(3, 1, 1, 1)
    saved = jpeg(images, torch.tensor([95, 10, 10]), torch.tensor([True, True, False]))
    errors = (saved - images).abs().mean(dim=(1, 2, 3))
    assert errors[2] == 0 and 0 < errors[0] < errors[1] < 0.2


@pytest.mark.parametrize("size", [(32, 32), (40, 64)])
def test_network_takes_any_size_in_steps_of_its_stride(size: tuple[int, int]) -> None:
    network = MattingNetwork(32).eval()
    assert network.stride == 8
    with torch.no_grad():
        alpha = network(torch.rand(2, 3, *size))
    assert alpha.shape == (2, 1, *size) and alpha.min() >= 0 and alpha.max() <= 1


def test_a_saved_network_is_the_same_function_and_anything_else_is_one_line(tmp_path: Path) -> None:
    network = MattingNetwork(64).eval()
    save_network(network, tmp_path / "network.pt", {"run": "mine"})
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load_network(tmp_path / "network.pt", CPU)(images), network(images))
    with pytest.raises(UserError, match=r"does not exist: make it by python pipeline/distill\.py"):
        load_network(tmp_path / "none.pt", CPU)
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(UserError, match=r"text\.pt is no distilled network"):
        load_network(tmp_path / "text.pt", CPU)


@pytest.mark.parametrize("size", [(32, 32), (97, 131), (300, 20), (7, 9)])
def test_a_matte_has_the_size_of_its_photo_and_the_network_sees_it_at_its_own(size: tuple[int, int]) -> None:
    seen: list[tuple[int, ...]] = []

    def network(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[-2:]))
        return (x[:, :1] + 1) / 2

    image = torch.zeros(1, 3, *size)
    alpha = matte(network, image, resolution=32, stride=8)
    assert alpha.shape == (1, 1, *size)
    torch.testing.assert_close(alpha, torch.full_like(alpha, 0.5), rtol=0, atol=1e-4)
    ((height, width),) = seen
    assert height % 8 == width % 8 == 0 and min(height, width) == 32


def reduced(x: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(x, size=32, mode="bilinear", antialias=True)


def test_an_alpha_is_enlarged_along_the_edges_of_the_photo() -> None:
    true = torch.zeros(1, 1, 256, 256)
    true[..., 100:] = 1.0  # not where the small alpha has a border between its pixels
    image = (true * 1.4 - 0.7).expand(-1, 3, -1, -1)
    bilinear = torch.nn.functional.interpolate(reduced(true), size=256, mode="bilinear")
    guided = guided_upsample(reduced(true), reduced(image), image)
    assert (guided - true).abs().mean() < 0.25 * (bilinear - true).abs().mean()


def test_a_texture_of_the_ground_does_not_show_in_the_alpha_of_an_object_of_another_colour() -> None:
    rng = torch.Generator().manual_seed(0)
    true = torch.zeros(1, 1, 256, 256)
    true[..., 60:196, 60:196] = 1.0
    grey = torch.rand(1, 1, 256, 256, generator=rng).expand(-1, 3, -1, -1)
    orange = torch.tensor([0.9, 0.5, 0.1]).view(1, 3, 1, 1)
    image = 2 * (true * orange + (1 - true) * grey) - 1
    bilinear = torch.nn.functional.interpolate(reduced(true), size=256, mode="bilinear")
    guided = guided_upsample(reduced(true), reduced(image), image)
    assert (guided - true).abs().mean() < 0.5 * (bilinear - true).abs().mean()


@pytest.mark.parametrize("at", [(3, 5), (0, 0), (10, 15)])
def test_enlarging_fits_alpha_to_the_colours_by_ridge_regression_in_each_window(at: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(1)
    seen, alpha = torch.rand(1, 3, 11, 16, generator=rng), torch.rand(1, 1, 11, 16, generator=rng)
    # At the same size nothing is interpolated: a pixel's value is the mean of its window's fits at its own colours.
    found = guided_upsample(alpha, seen, seen)[0, 0, *at]

    def window(y: int, x: int) -> list[tuple[int, int]]:
        return [(min(max(y + i, 0), 10), min(max(x + j, 0), 15)) for i in (-1, 0, 1) for j in (-1, 0, 1)]

    values = []
    for centre in window(*at):
        x = np.stack([seen[0, :, *p].double().numpy() for p in window(*centre)])
        y = np.array([alpha[0, 0, *p].item() for p in window(*centre)])
        penalty = np.sqrt(len(x) * GUIDE_EPSILON) * np.eye(3)
        slope, *_ = np.linalg.lstsq(
            np.vstack([x - x.mean(0), penalty]), np.concatenate([y - y.mean(), np.zeros(3)]), rcond=None
        )
        values.append(y.mean() + slope @ (seen[0, :, *at].double().numpy() - x.mean(0)))
    assert found.item() == pytest.approx(min(max(np.mean(values), 0), 1), abs=1e-3)


def test_colours_of_the_foreground_are_recovered_from_the_mix_with_the_background() -> None:
    at = np.linspace(-1, 1, 96)
    alpha = np.clip(5 * (0.68 - np.hypot(at[:, None], at)), 0, 1)
    red, green = np.array([200.0, 40, 30]), np.array([20.0, 160, 60])
    image = alpha[..., None] * red + (1 - alpha[..., None]) * green
    found = foreground_colours(image.round().astype(np.uint8), (alpha * 255).round().astype(np.uint8))
    mixed = (alpha > 0.2) & (alpha < 0.8)
    assert mixed.sum() > 200
    assert np.abs(found[mixed] - red).mean() < 0.25 * np.abs(image[mixed] - red).mean()
    opaque = alpha == 1
    assert np.abs(found[opaque] - image[opaque]).max() <= 2


def test_photo_opened_is_upright(tmp_path: Path) -> None:
    from pipeline.photographs.photos import read_photo

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (40, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert read_photo(tmp_path / "turned.jpg").shape == (40, 20, 3)

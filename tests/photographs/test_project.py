"""The projector: its parts against slow references, and that it finds images whose styles exist."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import run_of
from torch import Tensor

from data_shards.errors import UserError
from models.discriminator import Discriminator
from models.generator import FurryGenerator
from pipeline.generation.trained_run import TrainedRun
from pipeline.photographs.projection import projector
from pipeline.photographs.projection.perceptual import DiscriminatorDistance, LpipsDistance, choose_distance
from pipeline.photographs.projection.projector import (
    ProjectionOptions,
    learning_rate_ramp,
    noise_autocorrelation,
    project,
    style_statistics,
)

CPU = torch.device("cpu")


@pytest.fixture
def run(generator: FurryGenerator, discriminator: Discriminator, monkeypatch: pytest.MonkeyPatch) -> TrainedRun:
    monkeypatch.setattr(projector, "NUM_W_SAMPLES", 1000)
    return run_of(generator, discriminator)


def made_by(run: TrainedRun, num: int) -> Tensor:
    z = torch.randn(num, run.generator.z_dim)
    noise = torch.randn(num, run.generator.num_noise)
    return run.generator(z, noise=noise, fade_in=run.fade_in, psi=1.0).composite


@pytest.mark.parametrize("space", ["w", "w+"])
def test_a_picture_of_the_generators_own_is_found_far_better_than_by_the_mean_style(
    space: projector.Space, run: TrainedRun
) -> None:
    images = made_by(run, 2)
    distance = DiscriminatorDistance(run.discriminator)
    before, after = (
        project(run, images, distance, ProjectionOptions(space=space, steps=steps)).distance for steps in (1, 40)
    )
    assert (after < 0.6 * before).all(), (before, after)


def test_in_w_plus_each_layer_has_a_style_of_its_own(run: TrainedRun) -> None:
    images, distance = made_by(run, 1), DiscriminatorDistance(run.discriminator)
    w, w_plus = (
        project(run, images, distance, ProjectionOptions(space=space, steps=3)).output for space in ("w", "w+")
    )
    assert w.w_foreground.shape == (1, 384) and w.w_background.shape == (1, 128)
    assert w_plus.w_foreground.shape == (1, 8, 384) and w_plus.w_background.shape == (1, 8, 128)
    assert len(w_plus.w_foreground[0].unique(dim=0)) == 8


def test_pictures_of_a_batch_do_not_touch_each_other(run: TrainedRun) -> None:
    images, distance = made_by(run, 3), DiscriminatorDistance(run.discriminator)
    options = ProjectionOptions(steps=4)
    together = project(run, images, distance, options).output
    alone = project(run, images[2:], distance, options, first=2).output
    torch.testing.assert_close(together.w_foreground[2:], alone.w_foreground, rtol=0, atol=2e-3)
    torch.testing.assert_close(together.composite[2:], alone.composite, rtol=0, atol=2e-2)
    assert (together.composite[1] - alone.composite[0]).abs().max() > 0.2


def test_projection_is_a_function_of_its_seed(run: TrainedRun) -> None:
    images, distance = made_by(run, 1), DiscriminatorDistance(run.discriminator)
    first, again, other = (
        project(run, images, distance, ProjectionOptions(steps=2, seed=seed)).output.composite for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_noise_maps_stay_standardised_and_are_optimised(run: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    synthesize = run.generator.synthesize

    def note(*arguments: Tensor, **options: float) -> object:
        seen.append(arguments[2].detach().clone())
        return synthesize(*arguments, **options)

    images, distance = made_by(run, 1), DiscriminatorDistance(run.discriminator)
    monkeypatch.setattr(run.generator, "synthesize", note)
    project(run, images, distance, ProjectionOptions(steps=3))
    assert len(seen) == 4 and not torch.equal(seen[0], seen[-1])
    for noise_map in run.generator.noise_maps(seen[-1]):
        assert abs(noise_map.mean().item()) < 1e-5 and noise_map.square().mean().item() == pytest.approx(1, abs=1e-4)


def test_autocorrelation_equals_loops_over_pixels(generator: FurryGenerator) -> None:
    noise = torch.randn(2, generator.num_noise)
    noise[1] = noise[1].cumsum(0) / 50  # an image
    found = noise_autocorrelation(generator, noise)
    for sample in range(2):
        expected = 0.0
        for noise_map in generator.noise_maps(noise[sample : sample + 1].double()):
            x = noise_map[0, 0].numpy()
            while True:
                n = len(x)
                right = sum(x[i, j] * x[i, j - 1] for i in range(n) for j in range(n)) / n**2
                below = sum(x[i, j] * x[i - 1, j] for i in range(n) for j in range(n)) / n**2
                expected += right**2 + below**2
                if n <= 8:
                    break
                x = x.reshape(n // 2, 2, n // 2, 2).mean(axis=(1, 3))
        assert found[sample].item() == pytest.approx(expected, rel=1e-3)
    assert found[1] > 5 * found[0]


def test_learning_rate_rises_and_falls_as_published() -> None:
    assert learning_rate_ramp(0.0) == 0
    assert learning_rate_ramp(0.025) == pytest.approx(0.5)
    assert [learning_rate_ramp(at) for at in (0.05, 0.4, 0.75)] == pytest.approx([1, 1, 1])
    assert learning_rate_ramp(0.875) == pytest.approx(0.5)
    assert learning_rate_ramp(0.95) == pytest.approx(0.5 - 0.5 * math.cos(0.2 * math.pi))


def test_spread_of_styles_is_their_root_mean_squared_distance(run: TrainedRun) -> None:
    mapping = run.generator.mapping_background
    found = style_statistics(mapping, run.generator.z_dim_background, seed=0)
    w = mapping(torch.randn(4000, run.generator.z_dim_background)).double().numpy()
    expected = np.sqrt(((w - w.mean(axis=0)) ** 2).sum(axis=1).mean())
    assert found.spread == pytest.approx(expected, rel=0.05)
    assert np.abs(found.mean.numpy() - w.mean(axis=0)).max() < 0.2 * w.std()


def test_discriminator_distance_is_zero_for_the_same_and_grows_with_the_difference(
    discriminator: Discriminator,
) -> None:
    distance = DiscriminatorDistance(discriminator)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    features = distance.features(images)
    assert len(features) == 2 + 3  # pixels, from_rgb, and a block for each of 16, 8 and 4 px
    assert distance.between(features, features).tolist() == [0, 0]
    near, far = (
        distance.between(features, distance.features(images + scale * torch.randn_like(images)))
        for scale in (0.05, 0.5)
    )
    assert (near > 0).all() and (far > 3 * near).all()


def test_lpips_by_a_file_equals_the_packages_own(tmp_path: Path, discriminator: Discriminator) -> None:
    lpips = pytest.importorskip("lpips")
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    state = {f"features.{name.partition('.')[2]}": value for name, value in network.net.state_dict().items()}
    torch.save(state, tmp_path / "vgg.pth")
    distance = choose_distance(discriminator, tmp_path / "vgg.pth", CPU)
    assert isinstance(distance, LpipsDistance)
    ours, theirs = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    with torch.no_grad():
        expected = network(ours, theirs).flatten()
        found = distance.between(distance.features(ours), distance.features(theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert (found > 0).all()

    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth is no state of torchvision's vgg16"):
        choose_distance(discriminator, tmp_path / "other.pth", CPU)


def test_without_the_weights_of_lpips_the_discriminator_takes_its_place(
    discriminator: Discriminator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert isinstance(choose_distance(discriminator, None, CPU), DiscriminatorDistance)
    with pytest.raises(UserError, match=r"none\.pth does not exist"):
        choose_distance(discriminator, tmp_path / "none.pth", CPU)


def test_the_fade_in_of_the_checkpoint_is_used(run: TrainedRun) -> None:
    images, distance = made_by(run, 1), DiscriminatorDistance(run.discriminator)
    early = replace(run, iteration=0)
    masks = [project(r, images, distance, ProjectionOptions(steps=1)).output for r in (run, early)]
    assert torch.equal(masks[1].mask, masks[1].mask_coarse) and not torch.equal(masks[0].mask, masks[0].mask_coarse)

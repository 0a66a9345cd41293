"""Each ablation takes away what it names and nothing else; what is left is trained, on one rank and on two."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_gradients_agree, gradients, lived_in
from evaluating import FEATURES, SMALL, evaluate_in_process, results
from helpers import TINY, furballs, shard_cache, train_in_new_process, train_in_process
from numpy.typing import NDArray
from reference import reference_d_main, reference_d_r1, reference_g_main
from test_phases import assert_terms_agree
from two_ranks import GLOBAL_BATCH, TWO_RANKS, assert_weights_alike

from models.discriminator import Discriminator
from models.generator import FurryGenerator
from pipeline.config import Config
from pipeline.config.architecture import make_discriminator, make_generator
from pipeline.config.files import config_from_dict, merge, save_config
from pipeline.generation.sample_grid import CELL, MARGIN, ROWS, draw_grid, sample_column
from pipeline.methods.furrygan.phases import Networks, PhaseResult, Step, d_main, d_r1, g_main
from pipeline.methods.randomness import Stream, draw
from pipeline.runs.checkpoints import checkpoint_path, load_checkpoint
from pipeline.studies.ablation.variants import FULL, VARIANTS, Variant

B, PITCH = 8, CELL + MARGIN
HALFWAY = 2500  # gamma is 1/2; consistency and participation are due
SIZES = {"model": {"channel_base": 512, "channel_max": 24, "z_dim": 16, "z_dim_background": 8}}
# Thresholds that fire.
LOSS = {"loss": {"phi1": 0.6, "phi2": 0.02, "fade_in_iterations": 5000}}
ABLATIONS = [variant for variant in VARIANTS if variant is not FULL]
# The other two leave every network and its passes as they are: a weight of 0 is an iteration at which nothing is due.
RUNS = [variant for variant in ABLATIONS if variant.name not in ("no-participation", "no-consistency")]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)

TERMS = {
    "full": {"adversarial", "binarization", "area", "fine", "consistency", "participation"},
    "no-fine-mask": {"adversarial", "binarization", "area", "consistency", "participation"},
    "no-participation": {"adversarial", "binarization", "area", "fine", "consistency"},
    "no-consistency": {"adversarial", "binarization", "area", "fine", "participation"},
    "no-dual-fake-input": {"adversarial", "binarization", "area", "fine", "consistency", "participation"},
    "no-mask-predictor": {"adversarial", "binarization", "area", "fine", "participation"},
}


def config_of(variant: Variant) -> Config:
    return config_from_dict(merge(merge(SIZES, LOSS), dict(variant.overrides)))


def networks_of(config: Config) -> Networks:
    generator, discriminator = lived_in(make_generator(config)), lived_in(make_discriminator(config))
    return Networks(generator, discriminator, generator, discriminator)


def make_step(config: Config, iteration: int = HALFWAY) -> Step:
    networks = networks_of(config)
    sizes = {"z_dim": networks.generator.z_dim, "num_noise": networks.generator.num_noise}
    given = draw(0, Stream.G_MAIN, iteration, range(B), **sizes, device=torch.device("cpu"))
    images = torch.rand(B, 3, config.resolution, config.resolution) * 2.0 - 1.0
    return Step(networks, config.loss, iteration, images, given)


def named(name: str) -> Variant:
    return next(variant for variant in VARIANTS if variant.name == name)


@every_variant
def test_terms_are_those_that_the_ablation_leaves_and_equal_the_equations(variant: Variant) -> None:
    """Against the slow reading in float64, where without dual fake input all B are composites."""
    step = make_step(config_of(variant))
    assert step.draw is not None
    generator, discriminator, loss = step.networks.generator, step.networks.discriminator, step.config
    z, noise, images = step.draw.z.double(), step.draw.noise.double(), step.images.double()
    dual = {"dual_fake_input": variant.name != "no-dual-fake-input"}
    expected = reference_g_main(
        *(generator, discriminator, z, noise, step.fade_in),
        phi1=loss.phi1,
        phi2=loss.phi2,
        with_consistency=variant.name != "no-consistency",
        with_participation=variant.name != "no-participation",
        **dual,
    )
    assert expected.keys() == TERMS[variant.name]
    result = g_main(step)
    assert_terms_agree(result, expected)
    assert_whole_agrees(result, expected, generator)

    expected = reference_d_main(generator, discriminator, images, z, noise, step.fade_in, **dual)
    assert ("prediction" in expected) == (variant.name != "no-mask-predictor")
    result = d_main(step)
    assert_terms_agree(result, expected)
    assert_whole_agrees(result, expected, discriminator)

    assert_terms_agree(d_r1(step), reference_d_r1(discriminator, images))


def assert_whole_agrees(result: PhaseResult, expected: dict[str, torch.Tensor], network: torch.nn.Module) -> None:
    """The gradients of the weighted sum, where each weight is the configuration's."""
    total = torch.stack([result.weights[name] * value for name, value in expected.items()]).sum()
    assert_gradients_agree(gradients(result.loss, network), gradients(total, network))


@every_variant
@pytest.mark.parametrize("compute", [d_main, d_r1, g_main])
def test_every_parameter_that_exists_gets_a_gradient(variant: Variant, compute: Callable[[Step], PhaseResult]) -> None:
    """DDP waits for each of them, or lets its ranks drift apart."""
    for iteration in (0, 1):  # what is lazy is due, and is not
        step = make_step(config_of(variant), iteration)
        network = step.networks.generator if compute is g_main else step.networks.discriminator
        compute(step).loss.backward()
        missing = [name for name, parameter in network.named_parameters() if parameter.grad is None]
        assert missing == [], iteration


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parts_that_are_taken_away_do_not_exist() -> None:
    """The published sizes: each mask network has half of 80,130 parameters, the mask predictor 295,456."""
    with torch.device("meta"):
        assert count(FurryGenerator(256)) - count(FurryGenerator(256, fine_mask=False)) == 40_065
        assert count(Discriminator(256)) - count(Discriminator(256, mask_predictor=False)) == 295_456
    full = {name for network in _both(FULL) for name in network.state_dict()}
    for variant in ABLATIONS:
        gone = full - {name for network in _both(variant) for name in network.state_dict()}
        part = {"no-fine-mask": "mask_network_fine.", "no-mask-predictor": "mask_predictor."}.get(variant.name)
        assert gone == ({name for name in full if name.startswith(part)} if part else set()), variant.name


def _both(variant: Variant) -> tuple[FurryGenerator, Discriminator]:
    config = config_of(variant)
    return make_generator(config), make_discriminator(config)


@every_variant
def test_all_variants_make_the_same_foreground_of_the_same_latents_and_weights(variant: Variant) -> None:
    """The noise of what is missing is left out in its place: rows of an image grid can be compared."""
    full, other = make_generator(config_of(FULL)), make_generator(config_of(variant))
    other.load_state_dict(full.state_dict(), strict=variant.name != "no-fine-mask")
    assert other.num_noise == full.num_noise
    z, noise = torch.randn(4, full.z_dim), torch.randn(4, full.num_noise)
    expected, out = full(z, noise=noise), other(z, noise=noise)
    for name in ("foreground", "background", "mask_coarse"):
        assert torch.equal(getattr(out, name), getattr(expected, name)), name


def test_without_a_fine_mask_network_the_mask_is_the_coarse_one() -> None:
    generator = lived_in(make_generator(config_of(named("no-fine-mask"))))
    out = generator(torch.randn(4, generator.z_dim))
    assert torch.equal(out.mask, out.mask_coarse)
    assert not out.mask_fine.any()


def test_without_dual_fake_input_all_fakes_are_composites() -> None:
    seen: list[torch.Tensor] = []
    step = make_step(config_of(named("no-dual-fake-input")))
    step.networks.discriminator.from_rgb.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    fake = step.generate(step.networks.generator)
    d_main(step)
    g_main(step)
    assert [len(images) for images in seen] == [3 * B, 2 * B]  # foregrounds go to the mask predictor alone
    for images, start in zip(seen, (B, 0), strict=True):
        assert torch.equal(images[start : start + B], fake.composite)
        assert torch.equal(images[start + B :], fake.foreground)


@pytest.mark.parametrize("name", ["no-consistency", "no-mask-predictor"])
def test_without_consistency_no_foreground_goes_through_the_discriminator_for_it(name: str) -> None:
    """A weight of 0 is no term of value 0: the discriminator is spared half as many images again."""
    passes: list[int] = []
    step = make_step(config_of(named(name)))
    step.networks.discriminator.from_rgb.register_forward_hook(
        lambda _module, inputs, _out: passes.append(len(inputs[0]))
    )
    d_main(step)
    g_main(step)
    assert passes == [2 * B + (B // 2 if name == "no-consistency" else 0), B]


def test_weight_0_is_the_same_training_as_a_loss_without_the_term() -> None:
    for name in ("participation", "consistency"):
        step = make_step(config_of(FULL))
        result = g_main(step)
        without = g_main(replace(step, config=replace(step.config, **{name: 0.0})))
        rest = [result.weights[term] * value for term, value in result.terms.items() if term != name]
        assert without.loss.item() == pytest.approx(torch.stack(rest).sum().item(), rel=1e-5)
        assert name not in without.terms


# Whole runs

RUN_ALL = """
import sys
from pathlib import Path
from pipeline.config.files import config_from_dict, load_config
from pipeline.training.interrupt import Interrupt
from pipeline.training.run import train
from pipeline.training.trainer import make_accelerator

accelerator = make_accelerator(60.0)
with Interrupt() as interrupt:
    for path in sorted(Path().glob("*.yaml")):
        train(config_from_dict(load_config(path) | {"run_dir": Path("two") / path.stem}), accelerator, interrupt)
accelerator.end_training()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with runs on one rank."""
    cwd = tmp_path_factory.mktemp("ablations")
    cache = shard_cache(tmp_path_factory)
    sizes = {"cache_dir": str(cache), "data": str(furballs(cache)), "steps": 2, "batch": GLOBAL_BATCH}
    for variant in RUNS:
        config = config_from_dict(merge(merge(TINY, sizes), dict(variant.overrides)))
        save_config(config, cwd / f"{variant.name}.yaml")
        outcome = train_in_process(cwd, "--config", f"{variant.name}.yaml", "--run-dir", f"one/{variant.name}")
        assert outcome.code == 0, outcome.err
    return cwd


def test_ablations_train_on_two_ranks_as_on_one(runs: Path) -> None:
    (runs / "all.py").write_text(RUN_ALL)
    outcome = train_in_new_process(runs, launcher=TWO_RANKS, script=runs / "all.py")
    assert outcome.code == 0, outcome.err
    for variant in RUNS:
        paths = [checkpoint_path(runs / ranks / variant.name / "checkpoints", 2) for ranks in ("two", "one")]
        assert_weights_alike(*map(load_checkpoint, paths))


def test_a_run_tells_of_the_mask_predictor_where_there_is_one(runs: Path) -> None:
    for variant in RUNS:
        summary = json.loads((runs / "one" / variant.name / "summary.json").read_text())
        assert ("mask_pred_real/iou_fg" in summary) == (variant.name != "no-mask-predictor")
        assert "mask/miou" in summary
        assert list((runs / "one" / variant.name / "samples").iterdir())


@pytest.mark.parametrize("name", ["no-fine-mask", "no-mask-predictor"])
def test_runs_without_a_network_are_evaluated(name: str, runs: Path) -> None:
    arguments = [*SMALL[2:], *FEATURES, "--run", f"one/{name}", "--psi", "1.0", "--out", name]
    outcome = evaluate_in_process(runs, *arguments)
    assert outcome.code == 0, outcome.err
    tree = results(runs / name)
    assert tree["generated"][0]["masks"]["fitted"]["miou"] is not None
    assert tree["real"]["mask_pred"].keys() == ({"alpha"} if name == "no-fine-mask" else set())
    assert ("The mask predictor" in outcome.out) == (name == "no-fine-mask")


def test_fine_panel_of_a_grid_is_empty_without_a_fine_mask_network() -> None:
    def grid(variant: Variant) -> NDArray[np.uint8]:
        generator = lived_in(make_generator(config_of(variant)))
        z, noise = torch.randn(2, generator.z_dim), torch.randn(2, generator.num_noise)
        columns = [
            sample_column(generator, *latent, fade_in=1.0, psis=(1.0,))
            for latent in zip(z.split(1), noise.split(1), strict=True)
        ]
        return np.asarray(draw_grid(columns, psis=(1.0,)))

    for variant, empty in ((named("no-fine-mask"), True), (FULL, False)):
        pixels = grid(variant)
        bottom = len(pixels) - (len(ROWS) - ROWS.index("fine mask adds") - 1) * PITCH
        panel = pixels[bottom - PITCH : bottom - MARGIN, -PITCH:-MARGIN]
        assert panel.any() != empty, variant.name

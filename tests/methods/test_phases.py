"""Phases compute the papers' losses on the right halves, move the right parameters, and are due when they should be.

The expected values come from `reference.py` in float64, where the equations are written out.
"""

from dataclasses import asdict, replace

import pytest
import torch
from conftest import RESOLUTION, assert_gradients_agree, gradients
from reference import reference_d_main, reference_d_r1, reference_g_main
from torch import Tensor

from models.discriminator import Discriminator
from models.generator import FurryGenerator
from pipeline.config import LossConfig
from pipeline.config.files import config_from_dict
from pipeline.methods.furrygan.phases import Networks, PhaseResult, Step, d_main, d_r1, g_main, training_phases
from pipeline.methods.randomness import Stream, draw

B, HALF = 8, 4
# No two weights alike, and thresholds that fire for some images of the fixtures and not for others.
DISTINCT = LossConfig(
    r1=3.0, prediction=1.7, consistency=1.3, area=4.1, phi1=0.4, fine=5.9, phi2=0.075, participation=0.7
)
HALFWAY = 2500  # gamma is 1/2, lambda_bin 2.75; consistency and participation are due
BIASES_AFTER_STDDEV = ("final_conv.bias", "final_linear.0.bias", "final_linear.1.bias")


@pytest.fixture
def networks(generator: FurryGenerator, discriminator: Discriminator) -> Networks:
    return Networks(generator, discriminator, generator, discriminator)


def make_step(networks: Networks, config: LossConfig = DISTINCT, iteration: int = HALFWAY) -> Step:
    sizes = {"z_dim": networks.generator.z_dim, "num_noise": networks.generator.num_noise}
    given = draw(0, Stream.G_MAIN, iteration, range(B), **sizes, device=torch.device("cpu"))
    images = torch.rand(B, 3, RESOLUTION, RESOLUTION) * 2.0 - 1.0
    return Step(networks, config, iteration, images, given)


def slow_d_main(step: Step) -> dict[str, Tensor]:
    assert step.draw is not None
    z, noise = step.draw.z.double(), step.draw.noise.double()
    networks = step.networks
    return reference_d_main(networks.generator, networks.discriminator, step.images.double(), z, noise, step.fade_in)


def slow_g_main(step: Step) -> dict[str, Tensor]:
    assert step.draw is not None
    z, noise = step.draw.z.double(), step.draw.noise.double()
    networks, config = step.networks, step.config
    return reference_g_main(
        networks.generator,
        networks.discriminator,
        z,
        noise,
        step.fade_in,
        phi1=config.phi1,
        phi2=config.phi2,
        area_over_batch=config.area_over_batch,
    )


def assert_terms_agree(result: PhaseResult, expected: dict[str, Tensor]) -> None:
    assert result.terms.keys() == expected.keys()
    for name, value in expected.items():
        assert value.item() > 1e-4, f"{name} does not fire: the comparison would be idle"
        assert result.terms[name].item() == pytest.approx(value.item(), rel=1e-4), name


# d_main


def test_d_main_equals_real_and_fake_judged_apart(networks: Networks) -> None:
    step = make_step(networks)
    result, expected = d_main(step), slow_d_main(step)
    assert_terms_agree(result, expected)
    total = expected["adversarial"] + 1.7 * expected["prediction"]
    assert result.loss.item() == pytest.approx(total.item(), rel=1e-4)
    assert_gradients_agree(gradients(result.loss, networks.discriminator), gradients(total, networks.discriminator))


def test_d_main_moves_every_discriminator_parameter_and_no_other(networks: Networks) -> None:
    d_main(make_step(networks)).loss.backward()
    for name, parameter in networks.discriminator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert all(parameter.grad is None for parameter in networks.generator.parameters())


def test_d_main_reports_the_share_of_right_judgements(networks: Networks) -> None:
    step = make_step(networks)
    assert step.draw is not None
    observed = d_main(step).observed
    fake = step.generate(networks.generator)
    real_logits = networks.discriminator(step.images).logits
    fake_logits = networks.discriminator(torch.cat([fake.composite, fake.foreground[HALF:]])).logits
    num_right = (real_logits > 0).sum() + (fake_logits < 0).sum()
    assert observed["score/accuracy"].item() == pytest.approx(num_right.item() / (2 * B))
    assert observed["score/real"].item() == pytest.approx(real_logits.mean().item(), rel=1e-3)
    assert observed["score/fake"].item() == pytest.approx(fake_logits.mean().item(), rel=1e-3)


# d_r1


def test_d_r1_equals_the_slow_gradient_penalty(networks: Networks) -> None:
    step = make_step(networks)
    result = d_r1(step)
    expected = reference_d_r1(networks.discriminator, step.images.double())
    assert_terms_agree(result, expected)
    total = 3.0 / 2 * 16 * expected["r1"]
    assert result.loss.item() == pytest.approx(total.item(), rel=1e-4)
    assert_gradients_agree(gradients(result.loss, networks.discriminator), gradients(total, networks.discriminator))


@pytest.mark.parametrize(("r1", "interval", "expected"), [(1.0, 16, 8.0), (10.0, 16, 80.0), (1.0, 4, 2.0)])
def test_r1_weight_makes_up_for_its_interval(networks: Networks, r1: float, interval: int, expected: float) -> None:
    config = LossConfig(r1=r1, r1_interval=interval)
    assert d_r1(make_step(networks, config)).weights == {"r1": expected}


def test_d_r1_gives_every_discriminator_parameter_a_gradient(networks: Networks) -> None:
    step = make_step(networks)
    d_r1(step).loss.backward()
    for name, parameter in networks.discriminator.named_parameters():
        assert parameter.grad is not None, name
        # Below the stddev everything is linear in pieces: these biases move no slope.
        unreached = name.startswith("mask_predictor") or name in BIASES_AFTER_STDDEV
        assert parameter.grad.any() != unreached, name
    assert all(parameter.grad is None for parameter in networks.generator.parameters())
    assert step.images.grad is None
    assert not step.images.requires_grad


# g_main


@pytest.mark.parametrize("area_over_batch", [False, True])
def test_g_main_equals_the_equations(networks: Networks, area_over_batch: bool) -> None:
    step = make_step(networks, replace(DISTINCT, area_over_batch=area_over_batch))
    networks.discriminator.requires_grad_(False)
    result, expected = g_main(step), slow_g_main(step)
    assert_terms_agree(result, expected)
    weights = {
        "adversarial": 1.0,
        "binarization": 2.75,
        "area": 4.1,
        "fine": 5.9,
        "consistency": 1.3,
        "participation": 0.7,
    }
    total = sum(weights[name] * value for name, value in expected.items())
    assert isinstance(total, Tensor)
    assert result.loss.item() == pytest.approx(total.item(), rel=1e-4)
    assert_gradients_agree(gradients(result.loss, networks.generator), gradients(total, networks.generator))


def test_area_recipes_differ(networks: Networks) -> None:
    aligned = g_main(make_step(networks)).terms["area"]
    unaligned = g_main(make_step(networks, replace(DISTINCT, area_over_batch=True))).terms["area"]
    assert aligned > unaligned > 0.0  # some images are above phi1: the hinge is convex


@pytest.mark.parametrize("iteration", [0, 1, HALFWAY])
def test_g_main_gives_every_generator_parameter_a_gradient_and_no_other(networks: Networks, iteration: int) -> None:
    networks.discriminator.requires_grad_(False)
    result = g_main(make_step(networks, iteration=iteration))
    result.loss.backward()
    for name, parameter in networks.generator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(parameter.grad is None for parameter in networks.discriminator.parameters())
    assert result.generated is not None
    assert result.generated.w_foreground.shape == (B, 384)
    assert result.generated.w_background.shape == (HALF, 128)


def test_lazy_terms_are_there_when_due_and_not_before_their_start(networks: Networks) -> None:
    config = LossConfig(consistency_interval=2, consistency_start=3, participation_interval=3)
    present = [set(g_main(make_step(networks, config, iteration)).terms) for iteration in range(7)]
    assert [i for i, terms in enumerate(present) if "consistency" in terms] == [4, 6]
    assert [i for i, terms in enumerate(present) if "participation" in terms] == [0, 3, 6]
    assert all({"adversarial", "binarization", "area", "fine"} <= terms for terms in present)


def test_lazy_terms_are_not_rescaled_by_their_interval(networks: Networks) -> None:
    weights = g_main(make_step(networks, LossConfig(consistency_interval=5, participation_interval=5))).weights
    assert (weights["consistency"], weights["participation"]) == (1.0, 1.0)


@pytest.mark.parametrize(("iteration", "lambda_bin"), [(0, 5.0), (2500, 2.75), (5000, 0.5), (90_000, 0.5)])
def test_paper_weights_the_terms_so(networks: Networks, iteration: int, lambda_bin: float) -> None:
    weights = g_main(make_step(networks, LossConfig(), iteration)).weights
    rest = {"adversarial": 1.0, "area": 5.0, "fine": 5.0, "consistency": 1.0, "participation": 1.0}
    assert weights == {"binarization": lambda_bin, **rest}


@pytest.mark.parametrize(("iteration", "gamma"), [(0, 0.0), (1250, 0.25), (5000, 1.0), (6000, 1.0)])
def test_fine_mask_fades_in(networks: Networks, iteration: int, gamma: float) -> None:
    out = g_main(make_step(networks, iteration=iteration)).generated
    assert out is not None
    torch.testing.assert_close(out.mask, (out.mask_coarse + gamma * out.mask_fine).clip(0.0, 1.0))


def test_mask_statistics_are_those_of_the_masks(networks: Networks) -> None:
    result = g_main(make_step(networks))
    out, observed = result.generated, result.observed
    assert out is not None
    expected = {
        "mask/area": out.mask.mean(),
        "mask/area_coarse": out.mask_coarse.mean(),
        "mask/area_fine": out.mask.mean() - out.mask_coarse.mean(),
        "mask/binarization": result.terms["binarization"],
        "mask/min": out.mask.flatten(1).min(dim=1).values.mean(),
        "mask/max": out.mask.flatten(1).max(dim=1).values.mean(),
    }
    for name, value in expected.items():
        assert observed[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
        assert not observed[name].requires_grad


# All


def test_each_phase_runs_the_discriminator_once(networks: Networks) -> None:
    passes: list[int] = []
    networks.discriminator.from_rgb.register_forward_hook(lambda _module, inputs, _out: passes.append(len(inputs[0])))
    d_main(make_step(networks))
    assert passes == [2 * B + HALF]  # real, dual fake, foregrounds of the composites
    d_r1(make_step(networks))
    assert passes[1:] == [B]
    g_main(make_step(networks, iteration=2))
    g_main(make_step(networks, iteration=1))
    assert passes[2:] == [B + HALF, B]


def test_phases_run_in_order_with_randomness_of_their_own() -> None:
    phases = training_phases(LossConfig())
    assert [(p.name, p.trains, p.interval) for p in phases] == [
        ("d_main", "discriminator", 1),
        ("d_r1", "discriminator", 16),
        ("g_main", "generator", 1),
    ]
    assert [p.stream for p in phases] == [Stream.D_MAIN, None, Stream.G_MAIN]


def test_unaligned_recipe_differs_as_the_table_says() -> None:
    aligned, unaligned = (
        asdict(config_from_dict({"dataset": name, "data": "shards"}).loss) for name in ("ffhq", "cub")
    )
    differences = {name: (aligned[name], unaligned[name]) for name in aligned if aligned[name] != unaligned[name]}
    assert differences == {
        "binarization_end": (0.5, 2.0),
        "consistency_start": (0, 5000),
        "area_over_batch": (False, True),
        "phi1": (0.35, 0.15),  # a guess, so marked
    }


def test_unaligned_recipe_waits_with_consistency_and_binarizes_more(networks: Networks) -> None:
    config = config_from_dict({"dataset": "cub", "data": "shards"}).loss
    early, late = (g_main(make_step(networks, config, iteration)) for iteration in (4998, 5000))
    assert "consistency" not in early.terms
    assert "participation" in early.terms
    assert "consistency" in late.terms
    assert late.weights["binarization"] == 2.0

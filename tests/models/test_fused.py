"""The networks as a GPU computes them are the networks: outputs, gradients, and R1's gradients of gradients.

Here the operators compute by their plain forms; `test_kernels.py` compares the kernels with those.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, TypeVar

import pytest
import torch
from conftest import RESOLUTION, WIDTHS, assert_gradients_agree, gradients, lived_in
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import fused
from models.discriminator import Discriminator
from models.fused_ops import input_gradients_alone
from models.generator import FurryGenerator, GeneratorOutput
from pipeline.config import preset
from pipeline.methods.furrygan.losses import r1_penalty
from pipeline.training.learner import Learner

B = 8
IMAGES = ("foreground", "background", "mask_coarse", "mask_fine", "mask", "composite")
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.float64: {"rtol": 1e-9, "atol": 1e-10}}

Result = TypeVar("Result")


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Of a network. In float64 nothing is float32, statistics neither: the two forms differ by the order of sums."""
    if request.param == torch.float64:
        monkeypatch.setattr(Tensor, "float", lambda x: x)
    found: torch.dtype = request.param
    return found


def both(function: Callable[[], Result]) -> tuple[Result, Result]:
    """Results as on a GPU, and in the plain form."""
    with fused.on_every_device():
        on_gpu = function()
    return on_gpu, function()


def latents(generator: FurryGenerator, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(B, generator.z_dim, dtype=dtype), torch.randn(B, generator.num_noise, dtype=dtype)


def some_images(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(n, 3, RESOLUTION, RESOLUTION, dtype=dtype) * 2.0 - 1.0


def weighted(*tensors: Tensor) -> Tensor:
    """A loss whose gradient has another value at each element of each tensor."""
    random = torch.Generator().manual_seed(1)
    return torch.stack([(x * torch.randn(x.shape, generator=random)).mean() for x in tensors]).sum()


def weighted_images(out: GeneratorOutput) -> Tensor:
    return weighted(*(getattr(out, name) for name in IMAGES))


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        return assert_gradients_agree(actual, expected)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12, name
    return None


def assert_images_agree(actual: GeneratorOutput, expected: GeneratorOutput, dtype: torch.dtype) -> None:
    for name in IMAGES:
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), **TOLERANCE[dtype], msg=name)


# Generator


@pytest.mark.parametrize(("fine_mask", "num_composites"), [(True, None), (True, 3), (False, 1)])
def test_generator_and_its_gradients(dtype: torch.dtype, fine_mask: bool, num_composites: int | None) -> None:
    generator = lived_in(FurryGenerator(RESOLUTION, WIDTHS, fine_mask=fine_mask)).to(dtype)
    z, noise = latents(generator, dtype)

    def run() -> tuple[GeneratorOutput, dict[str, Tensor]]:
        out = generator(z, noise=noise, fade_in=0.4, num_composites=num_composites)
        return out, gradients(weighted_images(out), generator)

    (actual, actual_gradients), (expected, expected_gradients) = both(run)
    assert_images_agree(actual, expected, dtype)
    assert_same_gradients(actual_gradients, expected_gradients, dtype)
    assert sum(bool(g.any()) for g in actual_gradients.values()) == len(actual_gradients)


def test_generator_of_a_style_for_each_layer(dtype: torch.dtype, generator: FurryGenerator) -> None:
    generator.to(dtype)
    _, noise = latents(generator, dtype)
    sizes = (B, generator.z_dim), (4, generator.z_dim_background)
    networks = generator.synthesis_foreground, generator.synthesis_background
    styles = [
        torch.randn(n, network.num_styles, size, dtype=dtype, requires_grad=True)
        for (n, size), network in zip(sizes, networks, strict=True)
    ]

    def run() -> tuple[GeneratorOutput, dict[str, Tensor]]:
        out = generator.synthesize(*styles, noise, fade_in=0.4)
        return out, dict(zip(("w", "w_background"), torch.autograd.grad(weighted_images(out), styles), strict=True))

    (actual, actual_gradients), (expected, expected_gradients) = both(run)
    assert_images_agree(actual, expected, dtype)
    assert_same_gradients(actual_gradients, expected_gradients, dtype)
    for gradient in actual_gradients.values():  # of each layer's style
        assert (gradient != 0).any(dim=2).all()


def test_second_derivatives_of_the_generator(generator: FurryGenerator) -> None:
    """Path-length regularisation, or fitting a latent by Newton's method, would need them."""
    _, noise = latents(generator)
    w = torch.randn(2, generator.z_dim, requires_grad=True)
    w_background = torch.randn(2, generator.z_dim_background)

    def run() -> dict[str, Tensor]:
        out = generator.synthesize(w, w_background, noise[:2])
        (gradient,) = torch.autograd.grad(weighted(out.foreground, out.mask), w, create_graph=True)
        return gradients(gradient.square().sum(), generator)

    actual, expected = both(run)
    assert_gradients_agree(actual, expected)
    assert any(g.any() for g in actual.values())


# Discriminator


@pytest.mark.parametrize(("n", "judged"), [(8, None), (12, (4, 4)), (6, (2, 3))])
def test_discriminator_and_its_gradients(
    discriminator: Discriminator, dtype: torch.dtype, n: int, judged: tuple[int, ...] | None
) -> None:
    discriminator.to(dtype)
    images = some_images(n, dtype).requires_grad_()

    def run() -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        out = discriminator(images, judged=judged)
        loss = weighted(out.logits, out.mask_pred)
        (of_images,) = torch.autograd.grad(loss, images, retain_graph=True)
        return out.logits, out.mask_pred, of_images, gradients(loss, discriminator)

    actual, expected = both(run)
    for one, other in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE[dtype])
    assert_same_gradients({"images": actual[2]}, {"images": expected[2]}, dtype)
    assert_same_gradients(actual[3], expected[3], dtype)


def test_mask_prediction_alone(discriminator: Discriminator, dtype: torch.dtype) -> None:
    discriminator.to(dtype)
    images = some_images(3, dtype).requires_grad_()

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        mask_pred = discriminator.predict_mask(images)
        loss = weighted(mask_pred)
        (of_images,) = torch.autograd.grad(loss, images, retain_graph=True)
        return mask_pred, gradients(loss, discriminator) | {"images": of_images}

    (actual, actual_gradients), (expected, expected_gradients) = both(run)
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])
    assert_same_gradients(actual_gradients, expected_gradients, dtype)


def test_discriminator_without_a_mask_predictor() -> None:
    discriminator = lived_in(Discriminator(RESOLUTION, WIDTHS, mask_predictor=False))
    images = some_images(4)
    actual, expected = both(lambda: discriminator(images))
    assert actual.mask_pred is None
    torch.testing.assert_close(actual.logits, expected.logits, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_r1(dtype: torch.dtype, recompute: bool) -> None:
    discriminator = lived_in(Discriminator(RESOLUTION, WIDTHS, recompute=recompute)).to(dtype)
    images = some_images(B, dtype).requires_grad_()

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        penalty = r1_penalty(discriminator(images).logits, images)
        return penalty.detach(), gradients(penalty, discriminator)

    (actual, actual_gradients), (expected, expected_gradients) = both(run)
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])
    assert_same_gradients(actual_gradients, expected_gradients, dtype)
    # Not the biases behind the minibatch stddev: the rest is piecewise linear.
    reached = {name for name, gradient in actual_gradients.items() if gradient.any()}
    unreached = ("mask_predictor.", "final_conv.bias", "final_linear.0.bias", "final_linear.1.bias")
    assert reached == {name for name in actual_gradients if not name.startswith(unreached)}


@pytest.mark.parametrize("num_real", [4, 8])
def test_r1_beside_other_losses_of_the_same_pass(discriminator: Discriminator, num_real: int) -> None:
    """Its derivative of the gradient and the logits' own reach the same operators."""
    images = some_images(B).requires_grad_()

    def run() -> dict[str, Tensor]:
        out = discriminator(images, judged=(4, 4))
        penalty = r1_penalty(out.logits[:num_real], images)
        return gradients(penalty + weighted(out.logits, out.mask_pred), discriminator)

    assert_gradients_agree(*both(run))


# Both


def test_recomputing_changes_nothing() -> None:
    found: list[dict[str, Tensor]] = []
    for recompute in (False, True):
        torch.manual_seed(1)
        generator = lived_in(FurryGenerator(RESOLUTION, WIDTHS, recompute=recompute))
        discriminator = lived_in(Discriminator(RESOLUTION, WIDTHS, recompute=recompute))
        z, noise = latents(generator)
        with fused.on_every_device():
            out = generator(z, noise=noise, num_composites=4)
            judged = discriminator(torch.cat([out.composite, out.foreground[4:]]))
            loss = weighted(judged.logits, judged.mask_pred, out.mask)
            found.append(gradients(loss, nn.ModuleList([generator, discriminator])))
    assert_gradients_agree(found[1], found[0])


@pytest.mark.parametrize("name", ["d_main", "d_r1", "g_main"])
def test_training_phases_and_their_gradients(name: str) -> None:
    config = preset("furballs", batch=B, model={"channel_base": 512, "channel_max": 24})
    images = some_images(B)

    def run() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        learner = Learner(config, torch.device("cpu"))
        lived_in(learner.generator), lived_in(learner.discriminator)
        (phase,) = (phase for phase in learner.phases if phase.name == name)
        result = learner.run(phase, 2, images, range(B))
        network = getattr(learner, phase.trains)
        return dict(result.terms), {k: p.grad for k, p in network.named_parameters() if p.grad is not None}

    (terms, found), (expected_terms, expected) = both(run)
    torch.testing.assert_close(terms, expected_terms, rtol=1e-4, atol=1e-5)
    assert_gradients_agree(found, expected)


# What is computed


class Operators(TorchDispatchMode):
    """Notes each operator with its arguments and result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func.overloadpacket.__name__, args, result))
        return result

    def named(self, name: str) -> Iterator[tuple[tuple[Any, ...], Any]]:
        yield from ((args, result) for each, args, result in self.calls if each == name)


def weight_gradients(operators: Operators) -> int:
    """Calls that compute the gradient at the weight of a convolution."""
    return sum(args[-1][1] for args, _ in operators.named("convolution_backward"))


def test_input_gradients_alone_are_the_same_and_come_without_those_of_weights(discriminator: Discriminator) -> None:
    images = some_images(4).requires_grad_()
    found, counts = [], []
    with fused.on_every_device():
        for context in (nullcontext, input_gradients_alone):
            loss = discriminator(images).logits.sum()
            with Operators() as operators, context():
                found += torch.autograd.grad(loss, images, create_graph=True)
            counts.append(weight_gradients(operators))
        # Afterwards they are computed again.
        with Operators() as operators:
            gradients(discriminator(images).logits.sum(), discriminator)
    assert torch.equal(found[0], found[1])
    assert counts[1] == 0 < counts[0]
    assert weight_gradients(operators) > 0


@pytest.mark.parametrize("as_on_a_gpu", [True, False])
def test_no_convolution_of_r1_has_a_kernel_as_large_as_the_image(
    discriminator: Discriminator, as_on_a_gpu: bool
) -> None:
    """torch's own second derivative of a convolution has such, which the plain form shows."""
    images = some_images(4).requires_grad_()

    def run() -> Operators:
        with Operators() as operators:
            gradients(r1_penalty(discriminator(images).logits, images), discriminator)
        return operators

    operators = both(run)[0 if as_on_a_gpu else 1]
    kernels = Counter(max(args[1].shape[2:]) for args, _ in operators.named("convolution") if args[8] == 1)
    assert kernels[3] > 0
    assert (max(kernels) > 3) != as_on_a_gpu, kernels


BFLOAT16 = {"styled", "styled_adjoint", "blur_activated", "blur_linearized", "blur_adjoint", "block_output"}
BFLOAT16 |= {"block_output_linearized", "block_output_adjoint", "rgb_output", "rgb_output_linearized", "blur"}


def test_under_autocast_activations_are_bfloat16_and_images_masks_logits_and_gradients_float32(
    generator: FurryGenerator, discriminator: Discriminator
) -> None:
    z, noise = latents(generator)
    with fused.on_every_device(), torch.autocast("cpu", torch.bfloat16), Operators() as operators:
        out = generator(z, noise=noise, num_composites=4)
        images = torch.cat([out.composite, out.foreground[4:]])
        judged = discriminator(images)
        found = gradients(weighted_images(out) + weighted(judged.logits, judged.mask_pred), generator)
        real = images.detach().requires_grad_()
        found |= gradients(r1_penalty(discriminator(real).logits, real), discriminator)
        mask_pred = discriminator.predict_mask(real)
    results = [*(getattr(out, name) for name in IMAGES), judged.logits, judged.mask_pred, mask_pred, *found.values()]
    assert {x.dtype for x in results} == {torch.float32}
    # Each operator's first result is an activation or its gradient; what follows may be sums, which are float32.
    for name in BFLOAT16:
        firsts = {(x if isinstance(x, Tensor) else x[0]).dtype for _, x in operators.named(name)}
        assert firsts == {torch.bfloat16}, name
    assert {x.dtype for _, result in operators.named("heads") for x in result} == {torch.float32}
    # In float32 are the convolutions of the mask predictor and the last one, which reads the stddev channel.
    kernels = {torch.float32: set[tuple[int, ...]](), torch.bfloat16: set[tuple[int, ...]]()}
    for (x, weight, *_), result in operators.named("convolution"):
        assert x.dtype == weight.dtype == result.dtype
        kernels[x.dtype].add(tuple(weight.shape))
    at_16, at_4 = WIDTHS(16), WIDTHS(4)
    assert kernels[torch.float32] == {(at_16, at_16, 1, 1), (32, at_16, 1, 1), (at_4, at_4 + 1, 3, 3)}
    assert {shape[2] for shape in kernels[torch.bfloat16]} == {1, 3}


def test_bfloat16_turns_the_gradient_of_r1_by_less_than_a_thousandth(discriminator: Discriminator) -> None:
    images = some_images(B).requires_grad_()

    def gradient(half: bool) -> Tensor:
        with fused.on_every_device(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            penalty = r1_penalty(discriminator(images).logits, images)
        return torch.cat([g.flatten() for g in gradients(penalty, discriminator).values()])

    exact, half = gradient(False), gradient(True)
    assert not torch.equal(exact, half)
    assert 1.0 - torch.cosine_similarity(exact, half, dim=0) < 1e-3

"""A step in half precision or recomputed is the same step; one with what is not finite is none."""

import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import assert_gradients_agree
from helpers import assert_same_bits
from torch import Tensor, nn

from data_shards.errors import UserError
from models.layers import EqualizedLinear
from pipeline.config import Config, preset
from pipeline.training.finite_guard import FiniteGuard, NonFiniteLossError
from pipeline.training.learner import Learner, uses_bfloat16

CPU = torch.device("cpu")
B = 8


@pytest.fixture
def config() -> Config:
    return preset("furballs", batch=B, model={"channel_base": 512, "channel_max": 24})


def images(config: Config) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(B, 3, config.resolution, config.resolution, generator=generator) * 2.0 - 1.0


def run(config: Config, name: str, iteration: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor], Learner]:
    """Loss terms and gradients of one phase from the start."""
    learner = Learner(config, CPU)
    (phase,) = (phase for phase in learner.phases if phase.name == name)
    result = learner.run(phase, iteration, images(config), range(B))
    network = getattr(learner, phase.trains)
    gradients = {k: p.grad for k, p in network.named_parameters() if p.grad is not None}
    return dict(result.terms), gradients, learner


@pytest.mark.parametrize("name", ["d_main", "g_main"])
def test_bfloat16_changes_losses_and_gradients_by_its_rounding_only(config: Config, name: str) -> None:
    distances = []
    for seed in range(3):
        config = replace(config, seed=seed)
        terms, gradients, _ = run(replace(config, precision="fp32"), name)
        terms16, gradients16, _ = run(replace(config, precision="bf16"), name)
        assert any(not torch.equal(terms16[k], terms[k]) for k in terms), "bfloat16 was not used"
        for k, value in terms.items():
            assert terms16[k].dtype == torch.float32
            assert terms16[k].item() == pytest.approx(value.item(), rel=0.02, abs=2e-3), k
        assert all(gradient.dtype == torch.float32 for gradient in gradients16.values())
        # As a whole: the gradient of a noise strength is a sum that cancels.
        whole, whole16 = (torch.cat([g[k].flatten() for k in gradients]) for g in (gradients, gradients16))
        distances.append(float((whole16 - whole).norm() / whole.norm()))
    # 8 bits of mantissa through a dozen layers. The median of three seeds: with some, two pixels of a mask nearly share
    # its minimum or maximum, rounding swaps them, and min-max sends a large gradient to the other one.
    assert statistics.median(distances) < 0.2, distances


def test_r1_is_float32_whatever_the_precision(config: Config) -> None:
    terms, gradients, _ = run(replace(config, precision="fp32"), "d_r1")
    terms16, gradients16, _ = run(replace(config, precision="bf16"), "d_r1")
    assert_same_bits((terms16, gradients16), (terms, gradients))


def test_in_bfloat16_are_the_convolutions_and_not_the_styles_the_pictures_and_the_logits(config: Config) -> None:
    seen: dict[str, Counter[torch.dtype]] = {"linear": Counter(), "block": Counter(), "output": Counter()}

    def note(kind: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, out: Any) -> None:
            tensors = [out] if isinstance(out, Tensor) else list(vars(out).values())
            seen[kind].update(x.dtype for x in tensors)

        return hook

    learner = Learner(replace(config, precision="bf16"), CPU)
    for network in (learner.generator, learner.discriminator):
        network.register_forward_hook(note("output"))
        for module in network.modules():
            if isinstance(module, EqualizedLinear):
                module.register_forward_hook(note("linear"))
    for module in (*learner.generator.synthesis_foreground.layers, *learner.discriminator.blocks_to_mask):
        module.register_forward_hook(note("block"))
    for phase in learner.phases:
        if not phase.second_order:
            learner.run(phase, 0, images(config), range(B))
    assert {kind: set(dtypes) for kind, dtypes in seen.items()} == {
        "linear": {torch.float32},
        "block": {torch.bfloat16},
        "output": {torch.float32},
    }


def test_auto_is_float32_on_a_cpu() -> None:
    assert not uses_bfloat16("auto", CPU)
    assert uses_bfloat16("bf16", CPU)


@pytest.mark.parametrize("name", ["d_main", "d_r1", "g_main"])
def test_recomputing_changes_no_gradient_and_keeps_less(config: Config, name: str) -> None:
    kept: list[int] = []

    def measured(recompute: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        kept.append(0)

        def keep(x: Tensor) -> Tensor:
            kept[-1] += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            terms, gradients, _ = run(replace(config, recompute=recompute), name)
        return terms, gradients

    (terms, gradients), (terms2, gradients2) = measured(False), measured(True)
    assert_gradients_agree(gradients2, gradients)
    for k, value in terms.items():
        torch.testing.assert_close(terms2[k], value)
    if name == "g_main":  # elsewhere hooks also see what is recomputed
        assert kept[1] < 0.7 * kept[0]


@pytest.mark.parametrize("name", ["d_main", "d_r1", "g_main"])
def test_tripped_guard_keeps_the_weights_before_the_host_knows(config: Config, name: str) -> None:
    """As on a GPU, where the answer to the check comes when the next steps are already queued."""
    _, _, learner = run(config, name)
    before = {k: v.clone() for k, v in learner.state_dict()["generator"].items() if "w_average" not in k}
    before |= {k: v.clone() for k, v in learner.state_dict()["discriminator"].items()}
    learner.guard.tripped.fill_(1.0)
    for phase in learner.phases:
        learner.run(phase, 3, images(config), range(B))
    after = learner.state_dict()["generator"] | learner.state_dict()["discriminator"]
    assert_same_bits({k: after[k] for k in before}, before)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_guard_names_the_loss_and_else_the_gradient(broken: float) -> None:
    guard = FiniteGuard(CPU)
    fine, bad = torch.tensor(1.0), torch.tensor(broken)

    def watch(iteration: int, a: Tensor, b: Tensor, norm: Tensor) -> None:
        guard.watch("g_main", iteration, ("a", "b"), guard.check((a, b), norm))

    watch(1, fine, fine, fine)
    assert guard.tripped == 0.0
    with pytest.raises(NonFiniteLossError, match=r"^loss b is not finite at iteration 2"):
        watch(2, fine, bad, bad)
    assert guard.tripped == 1.0
    with pytest.raises(NonFiniteLossError, match=r"^averaged gradient of g_main is not finite at iteration 3"):
        watch(3, fine, fine, bad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_guard_raises_soon_and_no_weight_moves_until_then(config: Config) -> None:
    device = torch.device("cuda")
    learner = Learner(config, device)
    with torch.no_grad():
        learner.generator.synthesis_foreground.constant[0, 0, 0, 0] = math.nan
    before = {k: v.clone() for k, v in learner.discriminator.state_dict().items()}
    with pytest.raises(NonFiniteLossError, match="iteration 0"):
        for iteration in range(10):
            for phase in learner.phases:
                learner.run(phase, iteration, images(config).to(device), range(B))
        learner.guard.wait()
    assert_same_bits(dict(learner.discriminator.state_dict()), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_waits_for_the_gpu(config: Config) -> None:
    device = torch.device("cuda")
    learner, batch = Learner(config, device), images(config).to(device)
    for iteration in (0, 1):  # the first calls set things up
        for phase in learner.phases:
            learner.run(phase, iteration, batch, range(B))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for iteration in (2, 3):
            for phase in learner.phases:
                learner.run(phase, iteration, batch, range(B))
            learner.update_ema(iteration * B)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bf16_is_refused_where_the_gpu_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with pytest.raises(UserError, match="--precision fp32"):
        uses_bfloat16("bf16", torch.device("cuda"))

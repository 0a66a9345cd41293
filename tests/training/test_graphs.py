"""What a CUDA graph needs of a training step: its kernels follow from its key, its values from its inputs.

A graph records a step once and replays its kernels with other inputs. On a CPU, `Replayed` stands for it: it calls the
function of the first iteration, with that iteration's Python values, on the inputs of later ones.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import fused
from pipeline.config import Config, preset
from pipeline.methods.schedules import is_due
from pipeline.training.graphs import Inputs
from pipeline.training.learner import Learner

CPU = torch.device("cpu")
B, STEPS = 8, 7
MAX_LAUNCHES = 30


class Replayed:
    """In the place of `pipeline.training.graphs.Graphs`."""

    def __init__(self, inside: Callable[[], Any]) -> None:
        self._functions: dict[Hashable, Callable[[Inputs], Any]] = {}
        self._inside = inside

    def run(self, key: Hashable, function: Callable[[Inputs], Any], inputs: Inputs) -> Any:
        first = self._functions.setdefault(key, function)
        held = {name: value.clone() for name, value in inputs.items()}
        with self._inside():
            return first(held)

    def forget(self) -> None:
        self._functions.clear()


class Watch(TorchDispatchMode):
    """Counts the operators outside of graphs, and refuses those inside that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.outside, self._inside = 0, False

    @contextmanager
    def inside(self) -> Iterator[None]:
        self._inside = True
        yield
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self._inside:
            assert name not in ("_local_scalar_dense", "nonzero", "equal"), f"{name} waits for the device"
        elif not func.is_view and "empty" not in name:
            self.outside += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def config() -> Config:
    """Schedules that move, and terms that are due at every other iteration and from the third on."""
    sizes = {"channel_base": 512, "channel_max": 24, "z_dim": 16, "z_dim_background": 8}
    loss = {"r1_interval": 3, "fade_in_iterations": 5, "binarization_iterations": 6, "consistency_start": 3}
    return preset("furballs", batch=B, model=sizes, loss=loss, optimizer={"ema_rampup": 0.1})


def trained(config: Config, graphs: Any = None) -> tuple[dict[str, Any], list[Tensor]]:
    """State and measured values after some iterations."""
    learner, measured = Learner(config, CPU), []
    learner._graphs = graphs
    generator = torch.Generator().manual_seed(1)
    for iteration in range(STEPS):
        images = torch.rand(B, 3, config.resolution, config.resolution, generator=generator) * 2.0 - 1.0
        due = [phase for phase in learner.phases if is_due(iteration, phase.interval)]
        measured += [learner.run(phase, iteration, images, range(B)).values.clone() for phase in due]
        learner.update_ema(iteration * B)
    return learner.state_dict(), measured


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("area_over_batch", [False, True])
def test_what_is_recorded_once_serves_all_later_iterations(
    config: Config, accumulate: int, area_over_batch: bool
) -> None:
    config = replace(config, accumulate=accumulate, loss=replace(config.loss, area_over_batch=area_over_batch))
    watch = Watch()
    expected_state, expected = trained(config)
    state, measured = trained(config, Replayed(watch.inside))
    assert_same_bits(measured, expected)
    # The average is moved by a share on the device: ((p - a) * s) + a instead of a lerp.
    ema, expected_ema = state.pop("ema"), expected_state.pop("ema")
    assert_same_bits(state, expected_state)
    for name, value in expected_ema.items():
        torch.testing.assert_close(ema[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_step_does_not_wait_for_the_device_and_has_few_launches_beside_its_graph(config: Config) -> None:
    learner, watch = Learner(config, CPU), Watch()
    learner._graphs = Replayed(watch.inside)
    images = torch.rand(B, 3, config.resolution, config.resolution) * 2.0 - 1.0
    with fused.on_every_device():
        for iteration in (0, 3):
            watch.outside = 0
            with watch:
                for phase in learner.phases:
                    learner.run(phase, iteration, images, range(B))
                learner.update_ema(iteration * B)
    # Copies of what the stand-in is given count too, as a graph's inputs are copied.
    assert 0 < watch.outside <= MAX_LAUNCHES, f"{watch.outside} operators beside the graphs"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_with_graphs_equals_one_without_to_rounding() -> None:
    config = preset("furballs", batch=B, precision="fp32", deterministic=True)
    runs = []
    for graphs in (True, False):
        learner = Learner(replace(config, cuda_graphs=graphs), torch.device("cuda"))
        assert (learner._graphs is not None) == graphs
        generator, values = torch.Generator().manual_seed(1), list[Tensor]()
        for iteration in range(6):
            images = torch.rand(B, 3, config.resolution, config.resolution, generator=generator) * 2.0 - 1.0
            values += [learner.run(phase, iteration, images.cuda(), range(B)).values.cpu() for phase in learner.phases]
            learner.update_ema(iteration * B)
        learner.guard.wait()
        runs.append(torch.cat(values))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-3, atol=1e-4)

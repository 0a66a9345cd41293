"""Recording and replay of work on a GPU as CUDA graphs. Needs torch alone."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]  # what the graph reads: each replay copies new values into them
    result: Any  # what it writes, over and over


class Graphs:
    """Runs functions of tensors, by key: the first call of a key as it is, the second while it is recorded.

    The first call lets cuDNN choose its algorithms, Triton compile its kernels and optimizers make their state. All
    graphs share one pool of memory, as they are replayed one after the other.

    What a function does must follow from its key: the recorded kernels are replayed whatever the host would do. What
    changes from call to call is among its inputs. It must not ask the device for a value.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._recorded: dict[Hashable, _Recorded | None] = {}

    def run(self, key: Hashable, function: Callable[[Inputs], Any], inputs: Inputs) -> Any:
        """The result of ``function(inputs)``; good until the next call with this key.

        Args:
            key: of this function with inputs of these shapes.
            function: to call or to replay.
            inputs: on the device or on the host.
        """
        # From pinned memory a copy does not wait for the device. torch keeps it until the copy is done.
        inputs = {name: x if x.is_cuda else x.pin_memory() for name, x in inputs.items()}
        if key not in self._recorded:
            self._recorded[key] = None
            return self._as_it_is(function, inputs)
        recorded = self._recorded[key]
        if recorded is None:
            recorded = self._recorded[key] = self._record(function, inputs)
        for name, value in inputs.items():
            recorded.inputs[name].copy_(value, non_blocking=True)
        recorded.graph.replay()
        return recorded.result

    def forget(self) -> None:
        """Record all again: tensors that the graphs know by their addresses were replaced."""
        self._recorded.clear()

    def _as_it_is(self, function: Callable[[Inputs], Any], inputs: Inputs) -> Any:
        # On the stream that will be recorded: autograd remembers on which one a parameter was first used.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function({k: v.to(self._device, non_blocking=True) for k, v in inputs.items()})
        current.wait_stream(self._stream)
        return result

    def _record(self, function: Callable[[Inputs], Any], inputs: Inputs) -> _Recorded:
        held = {k: torch.empty_like(v, device=self._device) for k, v in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: those of a loader may allocate memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = function(held)
        return _Recorded(graph, held, result)

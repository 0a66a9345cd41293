"""Engine that shards optimizer state and gradients across ranks with DeepSpeed ZeRO (Rajbhandari et al. 2020).

Stage 0 parts nothing, stage 1 Adam's state, stage 2 the gradients too. Forward passes go through the bare network at
all stages: what DeepSpeed hangs on the outputs of a pass of its own takes R1's inner derivative for the whole backward
pass. Its `backward` needs none.
"""

import contextlib
import importlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.optim import Optimizer

from data_shards.errors import UserError
from pipeline.config import Config
from pipeline.ranks.collectives import num_ranks
from pipeline.ranks.engine import Engine

SETTINGS = Path(__file__).resolve().parents[2] / "cluster" / "deepspeed"


def check_installed() -> None:
    """Whether DeepSpeed is there, without the seconds that its import takes.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "--backend deepspeed needs the package deepspeed: "
            "pip install 'furrygan-pipeline[deepspeed]', or uv sync --extra deepspeed"
        )


def settings(stage: int) -> dict[str, Any]:
    """What DeepSpeed is told at a stage: `cluster/deepspeed/zero<stage>.json`.

    Raises:
        UserError: the file is missing or no JSON.
    """
    path = SETTINGS / f"zero{stage}.json"
    try:
        tree: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): train from a checkout") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return tree


def zero_engine(network: nn.Module, optimizer: Optimizer, config: Config, device: torch.device) -> Engine:
    """The engine of the configured stage.

    Args:
        network: on `device`, its weights channels-last.
        optimizer: Adam of all its parameters; from stage 1 on, it will be of this rank's part.
        config: of the run.
        device: of this rank.
    """
    return (PartitionedEngine if config.zero_stage else ReplicatedEngine)(network, optimizer, config, device)


class ReplicatedEngine(Engine):
    """Stage 0."""

    recordable = False

    def __init__(self, network: nn.Module, optimizer: Optimizer, config: Config, device: torch.device) -> None:
        super().__init__(network, optimizer)
        self._engine = _initialize(network, optimizer, config, device)

    def zero_grad(self) -> None:
        self._engine.zero_grad()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(False)
        yield
        self._engine.set_gradient_accumulation_boundary(True)

    def step(self) -> None:
        self._engine.step()


class PartitionedEngine(ReplicatedEngine):
    """Stages 1 and 2.

    The parameters, in order, lie in one buffer that is padded to as many equal parts as there are ranks. Each rank's
    Adam knows one part, so what it remembers is the same part of what an Adam of everything would.

    DeepSpeed takes every tensor for a row of elements. So that weights stay channels-last all the same, they and their
    gradients are shown to it in the order in which they lie in memory.
    """

    def __init__(self, network: nn.Module, optimizer: Optimizer, config: Config, device: torch.device) -> None:
        for parameter in network.parameters():
            parameter.data = _in_memory_order(parameter.data)
            parameter.register_post_accumulate_grad_hook(self._show)  # comes before DeepSpeed's
        super().__init__(network, optimizer, config, device)
        self._stage = config.zero_stage
        self._restore()

    def _show(self, parameter: Tensor) -> None:
        # Stage 1 looks at gradients once all micro-batches have added theirs.
        if self._stage > 1 or self._engine.is_gradient_accumulation_boundary():
            assert parameter.grad is not None
            parameter.grad = _in_memory_order(parameter.grad)

    def _restore(self) -> None:
        for parameter in self._network.parameters():
            parameter.data = _in_logical_order(parameter.data)

    def gradient_norm(self) -> Tensor:
        part = [x for group in self._engine.optimizer.averaged_gradients.values() for x in group]
        norms = torch.empty(num_ranks(), device=part[0].device)
        dist.all_gather_into_tensor(norms, torch.nn.utils.get_total_norm(part)[None])
        norm: Tensor = torch.linalg.vector_norm(norms)
        return norm

    def step(self) -> None:
        super().step()
        self._restore()

    def optimizer_state(self) -> dict[str, Any]:
        state = self._optimizer.state_dict()
        (group,) = state["param_groups"]
        shapes = [p.shape for p in self._network.parameters()]
        # A step of each parameter's own: Adam counts them up one by one.
        columns = {
            key: [x.clone() for _ in shapes] if key == "step" else self._gather(x, shapes)
            for key, x in state["state"].get(0, {}).items()
        }
        whole = {i: dict(zip(columns, row, strict=True)) for i, row in enumerate(zip(*columns.values(), strict=False))}
        return {"state": whole, "param_groups": [group | {"params": list(range(len(shapes)))}]}

    def _gather(self, part: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
        """What belongs to the parameters, in host memory, from all ranks' parts; on rank 0 alone."""
        parts = [torch.empty_like(part) for _ in range(num_ranks())] if dist.get_rank() == 0 else None
        dist.gather(part, parts)
        if parts is None:
            return []
        sizes = [shape.numel() for shape in shapes]
        flat = torch.cat([x.cpu() for x in parts])[: sum(sizes)]
        return [_in_logical_order(x.view(shape)) for x, shape in zip(flat.split(sizes), shapes, strict=True)]

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        self._engine.optimizer.refresh_fp32_params()  # Adam moves a copy of this rank's part of the weights
        (group,) = state["param_groups"]
        part: dict[int, dict[str, Tensor]] = {}
        if state["state"]:
            rows = [state["state"][i] for i in group["params"]]
            assert len({float(row["step"]) for row in rows}) == 1
            part[0] = {
                key: x if key == "step" else self._part([row[key] for row in rows]) for key, x in rows[0].items()
            }
        self._optimizer.load_state_dict({"state": part, "param_groups": [group | {"params": [0]}]})

    def _part(self, tensors: list[Tensor]) -> Tensor:
        """This rank's part of what belongs to the parameters."""
        size = self._optimizer.param_groups[0]["params"][0].numel()
        flat = torch.cat([_in_memory_order(x).flatten() for x in tensors])
        padded = torch.nn.functional.pad(flat, (0, size * num_ranks() - len(flat)))
        return padded[size * dist.get_rank() :][:size].clone()


def _in_memory_order(x: Tensor) -> Tensor:
    """``[O, C, H, W]``, channels-last, as a contiguous tensor of the same shape and memory; others as they are."""
    return x.permute(0, 2, 3, 1).reshape(x.shape) if x.ndim == 4 else x


def _in_logical_order(x: Tensor) -> Tensor:
    """The inverse of `_in_memory_order`."""
    if x.ndim != 4:
        return x
    out, channels, height, width = x.shape
    return x.view(out, height, width, channels).permute(0, 3, 1, 2)


def _initialize(network: nn.Module, optimizer: Optimizer, config: Config, device: torch.device) -> Any:
    """DeepSpeed's engine."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else a GPU is taken where there is one
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.ops.__compatible_ops__ = {}  # else it compiles some at its first start
    if not dist.is_initialized():  # one rank, without a launcher
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")
    for parameter in network.parameters():
        # Its mark for what need not be sent to the other ranks: all have drawn the same, and it cannot send scalars.
        parameter.ds_optim_param = True  # type: ignore[attr-defined]
    micro_batch = config.batch // num_ranks() // config.accumulate
    given = settings(config.zero_stage) | {"train_micro_batch_size_per_gpu": micro_batch}
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=given, dist_init_required=False)
    return engine

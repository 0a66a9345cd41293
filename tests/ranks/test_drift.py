"""Weights that differ between ranks stop the run, and the tensor is named."""

from pathlib import Path

import pytest
import torch
from helpers import patched, shard_cache, tiny, train_in_new_process
from two_ranks import TWO_RANKS

from pipeline.ranks.drift import fingerprint
from pipeline.runs.checkpoints import list_checkpoints

NUDGE = """
    from pipeline.training.trainer import Trainer
    step = Trainer.step
    def nudged(self):
        step(self)
        if RANK == 1 and self.iteration == 2:
            x = self.ema.synthesis_foreground.layers[2].conv.weight.data
            x[0, 0, 0, 0] = torch.nextafter(x[0, 0, 0, 0], torch.tensor(9.0))
    Trainer.step = nudged
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_any_change_of_an_element_changes_the_fingerprint(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 4, 5, 5) * 100).to(dtype).to(memory_format=torch.channels_last)
    before = fingerprint(x)
    assert fingerprint(x.contiguous()) == before
    x[1, 2, 3, 4] = x[1, 2, 3, 4] + 1 if dtype == torch.int64 else torch.nextafter(x[1, 2, 3, 4], x.new_tensor(1e9))
    assert fingerprint(x) != before
    assert fingerprint(torch.tensor([0.0])) != fingerprint(torch.tensor([-0.0]))
    assert fingerprint(torch.tensor([float("nan")])) == fingerprint(torch.tensor([float("nan")]))


@pytest.mark.parametrize(("drift_interval", "images", "told_at"), [(3, 1000, 3), (500, 16, 2)])
def test_drift_by_one_bit_stops_both_ranks_and_names_the_tensor(
    drift_interval: int, images: int, told_at: int, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """At the next comparison; and before a checkpoint is written, which is not."""
    log = {"checkpoint_interval_images": images}
    arguments = tiny(shard_cache(tmp_path_factory), run_dir="run", steps=6, drift_interval=drift_interval, log=log)
    script = patched(tmp_path, NUDGE)
    outcome = train_in_new_process(tmp_path, *arguments, launcher=TWO_RANKS, script=script)
    assert outcome.code != 0
    said = f"ema.synthesis_foreground.layers.2.conv.weight of rank 0 differs from that of rank 1 at iteration {told_at}"
    assert [line.split(": ")[2] for line in outcome.errors] == [said] * 2, outcome.err
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []

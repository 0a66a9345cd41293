"""What an iteration moves and launches on a GPU stays what it is: a change that adds a pass over memory fails here.

Counted with fake tensors on a small configuration; nothing is computed. A change that lowers a count lowers the bound.
"""

import pytest

from pipeline.benchmarks.scaling_model import PhaseWork, count
from pipeline.config import preset

BATCH = 16
# Of a step of each phase. The largest activation of the discriminator has 5.2 MB in d_main, 3.1 MB in g_main and 2.1 MB
# in d_r1: one more pass reads and writes it.
MEGABYTES = {"d_main": 401.1, "d_r1": 272.3, "g_main": 361.2}
OPERATORS = {"d_main": 469, "d_r1": 381, "g_main": 931}


@pytest.fixture(scope="module")
def work() -> list[PhaseWork]:
    return count(preset("furballs", resolution=64))


def test_bytes_per_iteration(work: list[PhaseWork]) -> None:
    moved = {phase.name: float((phase.fixed + BATCH * phase.per_image)[:, 1].sum()) / 1e6 for phase in work}
    for name, megabytes in moved.items():
        assert megabytes <= MEGABYTES[name], f"{name} moves {megabytes:.2f} MB"


def test_operators_per_iteration(work: list[PhaseWork]) -> None:
    launched = {phase.name: len(phase.fixed) for phase in work}
    for name, number in launched.items():
        assert number <= OPERATORS[name], f"{name} launches {number} operators"

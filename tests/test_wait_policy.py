"""Every command decides how torch's threads wait before torch is loaded, unless its user has decided."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PIPES

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(
    path
    for path in [ROOT / "ray_tune.py", *ROOT.glob("pipeline/*.py"), *ROOT.glob("data_shards/*.py")]
    if "run_command(main" in path.read_text()
)
# Says what the environment holds at the first import of torch, and ends there.
PROBE = """
import os, runpy, sys
class Torch:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            tell()
def tell():
    print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), flush=True)
    os._exit(0)
sys.meta_path.insert(0, Torch())
path = sys.argv[1]
sys.path.insert(0, os.path.dirname(path))
runpy.run_path(path, run_name="probed")
tell()  # it has imported all but torch
"""


def policy(command: Path, **environment: str) -> str:
    own = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", PROBE, str(command)], env=own | environment, timeout=120, **PIPES)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.name)
def test_every_command_has_threads_wait_without_long_spins(command: Path) -> None:
    assert policy(command) == "PASSIVE 5000"


def test_what_the_user_has_set_stays() -> None:
    command = ROOT / "pipeline" / "train.py"
    assert policy(command, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE None"
    assert policy(command, GOMP_SPINCOUNT="7") == "None 7"


def test_commands_were_found() -> None:
    assert {"train.py", "segment.py", "build.py", "ray_tune.py"} <= {path.name for path in COMMANDS}

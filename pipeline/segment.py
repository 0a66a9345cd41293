"""Alpha and cut-outs of real photographs.

python pipeline/segment.py PHOTO... --run runs/mine             by the distilled network, at the photo's own size
python pipeline/segment.py project PHOTO... --run runs/mine     by projection into the generator's latent space
python pipeline/segment.py compare --run runs/mine              all ways on images with ground-truth alpha, as a table
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from data_shards.command import parse_options, run_command

import tyro

from pipeline.photographs.compare import Comparison, compare
from pipeline.photographs.project import Project
from pipeline.photographs.segment import Segment
from pipeline.runs.reproducible import make_repeatable


@dataclass(frozen=True)
class Compare:
    """Every way to segment, on new images with ground-truth alpha: IoU, matting errors, time."""

    comparison: Annotated[Comparison, tyro.conf.arg(name="")]
    """What is compared, and on what."""
    out: Path | None = None
    """Directory for comparison.md, .json and .png; RUN/comparison by default."""
    num_threads: int = 0
    """CPU threads; 0 is all cores."""

    def __call__(self) -> None:
        """Compare."""
        make_repeatable(self.num_threads)
        out = self.out or self.comparison.run / "comparison"
        print(compare(self.comparison, out))


COMMANDS: dict[str, Any] = {"project": Project, "compare": Compare}


def main() -> None:
    """Segment as the command line says."""
    argv = sys.argv[1:]
    name = argv[0] if argv and argv[0] in COMMANDS else None
    kind: Any = COMMANDS[name] if name else Segment
    command = parse_options(
        kind,
        kind.__doc__ if name else f"{kind.__doc__}\n\n{__doc__}",
        args=argv[1:] if name else argv,
        prog=f"segment.py {name}" if name else None,
    )
    command()


if __name__ == "__main__":
    run_command(main, memory_remedy="give smaller photos, or a smaller --batch to project them")

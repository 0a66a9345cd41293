"""Build a shard set from a collection of images, or verify one.

    python data_shards/build.py --kind folder --source ~/photos --out shards/mine --resolution 256
    python data_shards/build.py --verify shards/mine

Stopped or killed, the same command resumes where it stood.
"""

import argparse
import sys
from dataclasses import dataclass
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, cast

from data_shards.command import one_line_errors, run_command

import tyro

from data_shards.building.builder import BuildOptions, build
from data_shards.errors import UserError
from data_shards.format.manifest import Manifest
from data_shards.reading.verify import verify
from data_shards.sources.kinds import KINDS
from data_shards.sources.source import Source

AnySource = TypeVar("AnySource", bound=Source)


@dataclass(frozen=True)
class Arguments(Generic[AnySource]):
    """What the command line says."""

    pictures: Annotated[AnySource, tyro.conf.arg(name="")]
    """Where the images are from."""
    out: Path
    """Directory to make: tars, an index beside each, and manifest.json."""
    options: Annotated[BuildOptions, tyro.conf.arg(name="")]
    """How they become shards."""
    kind: str = "folder"
    """Of source, see above; each has options of its own: --kind cub --help."""


def parse(argv: list[str]) -> Arguments[Any] | Path:
    """The arguments of a build, or the set to verify.

    Raises:
        UserError: an argument that does not exist, is missing or is invalid.
        SystemExit: after `--help`.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--kind", default="folder")
    first.add_argument("--verify", type=Path)
    try:
        named, _ = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    if named.verify is not None:
        if len(argv) > 2:
            raise UserError("--verify goes alone, with the directory of a shard set: --verify shards/mine")
        return cast(Path, named.verify)
    if named.kind not in KINDS:
        raise UserError(f"there is no kind '{named.kind}'; choose one of {', '.join(KINDS)}")
    with one_line_errors(passthrough=bool({"-h", "--help"} & set(argv))):
        of_kind: Any = KINDS[named.kind]
        arguments: Arguments[Any] = tyro.cli(
            Arguments[of_kind],
            prog=Path(sys.argv[0]).name,
            description=f"{__doc__}\nKinds of sources:\n\n{_kinds()}",
            args=argv,
        )
    return arguments


def main() -> None:
    """Build or verify."""
    arguments = parse(sys.argv[1:])
    if isinstance(arguments, Path):
        print(f"{arguments} is whole: {_summary(verify(arguments, progress=True))}")
        return
    try:
        manifest = build(arguments.pictures, arguments.out, arguments.options, progress=True)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command resumes from here\n")
        sys.exit(130)
    print(f"{arguments.out}: {_summary(manifest)}")


def _kinds() -> str:
    return "\n".join(f"{kind}: {getdoc(source)}\n" for kind, source in KINDS.items())


def _summary(manifest: Manifest) -> str:
    mib = sum(shard.num_bytes for shard in manifest.shards) / 2**20
    parts = [
        f"{manifest.num_samples:,} images of {manifest.resolution} px",
        f"{len(manifest.shards):,} shard{'s' * (len(manifest.shards) > 1)}, {mib:,.1f} MiB",
        f"{manifest.num_alphas:,} with alpha" + ("" if manifest.has_alpha or not manifest.num_alphas else " (not all)"),
        f"{manifest.num_upsampled:,} enlarged",
        f"{len(manifest.skipped):,} skipped" + (" (manifest.json says why)" if manifest.skipped else ""),
    ]
    return "; ".join(parts)


if __name__ == "__main__":
    run_command(main, memory_remedy="give fewer --workers")

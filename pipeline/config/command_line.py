"""Command lines over the configuration tree.

They come from, in rising order: the preset of `--dataset`, the file of `--config` (or the saved configuration of
`--resume`), the command line.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from data_shards.command import one_line_errors

import tyro

from data_shards.errors import UserError
from data_shards.format.manifest import MANIFEST_NAME, Manifest
from data_shards.reading.shard_set import local_directory
from pipeline.config import Config
from pipeline.config.files import config_from_dict, load_config, merge

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    tree: Annotated[Config, tyro.conf.arg(name="")]
    """The configuration."""
    config: Path | None = None
    """YAML file of overrides, complete or partial; every run saves one."""
    resume: Path | None = None
    """Run directory to resume, under its own configuration."""


class HasTree(Protocol):
    """Arguments of a command on a configuration."""

    def __init__(self, tree: Config) -> None: ...


Parsed = TypeVar("Parsed", bound=HasTree)


def parse_config(description: str, argv: list[str] | None = None) -> Config:
    """Read the command line of a command on a configuration alone; errors as in `parse_arguments`."""
    return parse_arguments(Arguments, description, argv).tree


def parse_arguments(kind: type[Parsed], description: str, argv: list[str] | None = None) -> Parsed:
    """Read the command line.

    Args:
        kind: dataclass of all arguments. Its field `tree` is the configuration; all others have defaults.
        description: for `--help`.
        argv: arguments, those of the process by default.

    Raises:
        UserError: an argument or value that does not exist or is invalid.
        SystemExit: after `--help`.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--dataset", "--config", "--resume", "--data", "--resolution"):
        first.add_argument(name)
    try:
        named, _ = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None

    values: dict[str, Any] = {}
    if named.resume is not None:
        saved = Path(named.resume) / CONFIG_FILE
        if not saved.is_file():
            raise UserError(f"--resume {named.resume}: there is no {CONFIG_FILE} in it, so it is not a run directory")
        values = load_config(saved) | {"run_dir": named.resume}
    if named.config is not None:
        values = merge(values, load_config(Path(named.config)))
    # Known before the rest is parsed: both decide whether the defaults are possible at all.
    values |= {name: value for name in ("dataset", "data") if (value := getattr(named, name)) is not None}
    if named.resolution is None and (directory := local_directory(values.get("data") or "")) is not None:
        values = _resolution_of(directory) | values
    helping = bool({"-h", "--help"} & set(argv))
    if helping and values.get("dataset", "furballs") != "furballs":
        values.setdefault("data", "DIRECTORY")  # help on a preset must not ask for its images first
    base = config_from_dict(values)

    with one_line_errors(passthrough=helping):
        return tyro.cli(kind, prog=Path(sys.argv[0]).name, description=description, args=argv, default=kind(tree=base))


def _resolution_of(directory: Path) -> dict[str, Any]:
    """That of the shards in a directory, where their manifest says it: nobody should have to say it again."""
    return {"resolution": Manifest.read(directory).resolution} if (directory / MANIFEST_NAME).is_file() else {}

"""Configuration from and to mappings and YAML files."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from data_shards.errors import UserError
from pipeline.config import PRESETS, Config

_ADAPTER = TypeAdapter(Config)
FORMER_KEYS = ("compile",)
"""Keys of older runs' files that no longer say anything about the numbers."""


def config_from_dict(values: dict[str, Any]) -> Config:
    """Validate a nested mapping, complete or partial, over the preset that its `dataset` names.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of bounds, or an impossible combination; the line
            names the field.
    """
    dataset = values.get("dataset", Config.__dataclass_fields__["dataset"].default)
    if not isinstance(dataset, str) or dataset not in PRESETS:
        raise UserError(f"dataset {dataset!r} is unknown: choose one of {', '.join(PRESETS)}")
    values = {key: value for key, value in values.items() if key not in FORMER_KEYS}
    try:
        return _ADAPTER.validate_python(merge(PRESETS[dataset], values))
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def config_to_dict(config: Config) -> dict[str, Any]:
    """The tree as plain JSON types; `config_from_dict` takes it back."""
    tree: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return tree


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`base` with `overrides` laid over it, nested mapping by nested mapping."""
    merged = dict(base)
    for key, value in overrides.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys such as ``loss.phi1``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"])
        if isinstance(cause := problem.get("ctx", {}).get("error"), UserError):
            lines.append(str(cause))
        elif problem["type"] == "unexpected_keyword_argument":
            lines.append(f"config key {field!r} is unknown: see --help for those there are")
        else:
            lines.append(f"config key {field!r}: {problem['msg']}, not {problem['input']!r}")
    return "; ".join(lines)


def load_config(path: Path) -> dict[str, Any]:
    """Read a YAML file of overrides, such as the `config.yaml` that every run saves.

    Raises:
        UserError: there is no such file, or it is not a YAML mapping.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"config file {path} holds no mapping: write lines such as 'steps: 1000'")
    return values


def save_config(config: Config, path: Path) -> None:
    """Write the resolved tree as YAML."""
    path.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))

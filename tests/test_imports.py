"""Imports between the folders go one way: each folder imports only what the table allows, and there is no cycle."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Folder: those that its modules may import. "commands" are the files that are run, "base" the rest beside the folders.
ALLOWED = {
    "models": "",
    "data_shards.base": "",
    "data_shards.format": "base",
    "data_shards.remote": "base format",
    "data_shards.reading": "base format remote",
    "data_shards.sources": "base format",
    "data_shards.building": "base format reading sources",
    "data_shards.commands": "base format reading sources building",
    "pipeline.base": "",
    "pipeline.config": "",
    "pipeline.runs": "config",
    "pipeline.ranks": "config",
    "pipeline.methods": "config ranks",
    "pipeline.generation": "config runs methods",
    "pipeline.evaluation": "config runs ranks methods generation",
    "pipeline.training": "config runs ranks methods generation evaluation",
    "pipeline.photographs": "runs methods generation evaluation training",
    "pipeline.studies": "config runs methods generation evaluation training",
    "pipeline.pages": "generation photographs",
    "pipeline.benchmarks": "config runs ranks methods training",
    "pipeline.commands": "config runs generation evaluation training photographs studies pages benchmarks",
}
BELOW: dict[str, set[str]] = {"models": set(), "data_shards": set(), "pipeline": {"models", "data_shards"}}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in BELOW
    for path in sorted((ROOT / package).rglob("*.py"))
} | {"ray_tune": ROOT / "ray_tune.py"}


def folder(module: str) -> str:
    package, *rest = module.split(".")
    if package == "models":
        return package
    if package == "ray_tune":
        return "pipeline.commands"
    if not rest:
        return f"{package}.base"
    if (ROOT / package / rest[0]).is_dir():
        return f"{package}.{rest[0]}"
    return f"{package}.{'commands' if 'run_command(main' in MODULES[module].read_text() else 'base'}"


def imports(module: str) -> Iterator[str]:
    """Modules of the project."""
    tree = ast.parse(MODULES[module].read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inner]
        else:
            continue
        yield from (name for name in names if name in MODULES)


def test_folders_import_only_what_the_table_allows() -> None:
    def is_allowed(module: str, imported: str) -> bool:
        own = folder(module)
        package = own.split(".")[0]
        within = {f"{package}.{name}" for name in ALLOWED[own].split()} | {own}
        return folder(imported) in within or imported.split(".")[0] in BELOW[package]

    wrong = [
        f"{module} imports {name}" for module in MODULES for name in imports(module) if not is_allowed(module, name)
    ]
    assert not wrong


def test_table_holds_no_cycle() -> None:
    above: set[str] = set()
    for name, allowed in ALLOWED.items():
        package = name.split(".")[0]
        assert {f"{package}.{other}" for other in allowed.split()} <= above
        above.add(name)


def test_no_modules_import_each_other() -> None:
    graph = {module: set(imports(module)) - {module} for module in MODULES}
    while leaves := {module for module, needed in graph.items() if not needed & graph.keys()}:
        for module in leaves:
            del graph[module]
    assert not graph


def test_every_folder_is_in_the_table() -> None:
    assert {folder(module) for module in MODULES} == set(ALLOWED)

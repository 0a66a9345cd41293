"""Files that are either as they were or wholly new, whenever the machine stops."""

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a file under another name and give it its own when it is whole."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    fsync(unfinished)
    unfinished.replace(path)
    fsync(path.parent)

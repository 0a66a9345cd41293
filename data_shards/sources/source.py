"""What a kind of source is: a dataclass of its options that lists its images and reads one.

A new kind is a subclass in a file of its own, and its name in `data_shards.sources.kinds`. Its fields become options of
the command, and its docstring the help.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from data_shards.errors import UserError
from data_shards.sources.images import Picture, picture_extensions


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """A collection of images. It is pickled for each worker, which opens files of its own."""

    kind: ClassVar[str]
    """Its name on the command line."""

    resolution: int = 256
    """Side of the images to make, pixels."""
    seed: int = 0
    """Of the order of the images, and of all that is drawn."""
    max_images: int | None = None
    """Take only the first so many, in the order of their names."""

    @abstractmethod
    def references(self) -> Sequence[str]:
        """The images, each by a name that `read` understands, in an order that is the same everywhere.

        Raises:
            UserError: the source is missing or is not of this kind.
        """

    @abstractmethod
    def read(self, reference: str) -> Picture:
        """One image; a function of the options and the reference alone.

        Raises:
            BrokenPictureError: it cannot be read, with the reason.
        """

    def other_inputs(self) -> Sequence[str]:
        """The names of all else that goes into the images: a build that was stopped resumes only with the same."""
        return ()

    def __getstate__(self) -> dict[str, Any]:
        """The options, without open files."""
        return {option.name: getattr(self, option.name) for option in fields(self)}


@dataclass(frozen=True, kw_only=True)
class BoxedSource(Source):
    """A collection that knows where in each image the object is."""

    crop: Literal["center", "box"] = "center"
    """Crop to the centre, as the paper does, or to the object's box with a margin of 10% on each side."""


def existing_folder(path: Path, remedy: str) -> Path:
    """The folder itself.

    Raises:
        UserError: there is none; `remedy` says what to give.
    """
    if not path.is_dir():
        problem = "is a file, not a folder" if path.is_file() else "does not exist"
        raise UserError(f"{path} {problem}; {remedy}")
    return path


def picture_names(folder: Path) -> list[str]:
    """All images in a folder and its subfolders, by their extensions: relative paths with ``/``, sorted.

    Hidden files and folders, and links to folders, are passed over.

    Raises:
        UserError: there are none, or a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); mend that, or move it away")

    extensions = picture_extensions()
    names = []
    for directory, subdirectories, files in os.walk(folder, onerror=refuse):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        parent = Path(directory).relative_to(folder)
        names += [
            (parent / name).as_posix()
            for name in files
            if Path(name).suffix.lower() in extensions and not name.startswith(".")
        ]
    if not names:
        raise UserError(f"{folder} holds no images (files named .jpg, .png, .webp, ...); give another folder")
    return sorted(names)


def text_lines(path: Path, remedy: str) -> list[list[str]]:
    """The words of each line of a text file that is not empty.

    Raises:
        UserError: it cannot be read; `remedy` says what to do.
    """
    try:
        return [words for line in path.read_text(encoding="utf-8").splitlines() if (words := line.split())]
    except (OSError, UnicodeDecodeError):
        problem = "cannot be read" if path.exists() else "does not exist"
        raise UserError(f"{path} {problem}; {remedy}") from None

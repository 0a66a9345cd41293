"""Animal Faces-HQ."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_shards.sources.images import Picture, read_picture
from data_shards.sources.source import Source, existing_folder, picture_names


@dataclass(frozen=True, kw_only=True)
class Afhq(Source):
    """One class of AFHQ v2: faces of 512 px. The paper takes the cats.

    SOURCE/train/cat/*.png, and SOURCE/test/..., SOURCE/.../dog, SOURCE/.../wild
    """

    kind = "afhq"

    source: Path
    """The folder that holds train and test."""
    category: Literal["cat", "dog", "wild"] = "cat"
    """Which animals."""
    split: Literal["train", "test", "all"] = "train"
    """Which part of them."""

    def references(self) -> Sequence[str]:
        """See `Source.references`: ``train/cat/NAME.png``."""
        splits = ("test", "train") if self.split == "all" else (self.split,)
        folders = [f"{split}/{self.category}" for split in splits]
        remedy = "give the folder that holds train/cat, or --kind folder for images in another order"
        return [
            f"{folder}/{name}"
            for folder in folders
            for name in picture_names(existing_folder(self.source / folder, remedy))
        ]

    def read(self, reference: str) -> Picture:
        """See `Source.read`."""
        return read_picture(self.source / reference)

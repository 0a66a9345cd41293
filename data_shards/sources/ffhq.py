"""Flickr-Faces-HQ."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError
from data_shards.sources.images import Picture, read_picture
from data_shards.sources.source import Source, existing_folder, picture_names

_NAME = re.compile(r"(.*/)?\d{5}\.png")


@dataclass(frozen=True, kw_only=True)
class Ffhq(Source):
    """FFHQ's aligned faces: 70,000 of 1024 px. The images in the wild and the thumbnails beside them are left out.

    SOURCE/images1024x1024/00000/00000.png ... 69000/69999.png
    """

    kind = "ffhq"

    source: Path
    """The data set's folder, or images1024x1024 itself."""

    def references(self) -> Sequence[str]:
        """See `Source.references`: ``00000/00000.png``."""
        names = picture_names(existing_folder(self._folder, "give the folder that holds images1024x1024"))
        faces = [name for name in names if _NAME.fullmatch(name)]
        if not faces:
            raise UserError(f"{self._folder} holds no faces named NNNNN.png; --kind folder takes images of any name")
        return faces

    def read(self, reference: str) -> Picture:
        """See `Source.read`."""
        return read_picture(self._folder / reference)

    @property
    def _folder(self) -> Path:
        inner = self.source / "images1024x1024"
        return inner if inner.is_dir() else self.source

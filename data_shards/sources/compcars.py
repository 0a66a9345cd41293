"""Comprehensive Cars."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_shards.errors import UserError
from data_shards.sources.images import Box, BrokenPictureError, Picture, read_picture
from data_shards.sources.source import BoxedSource, existing_folder, picture_names, text_lines


@dataclass(frozen=True, kw_only=True)
class Compcars(BoxedSource):
    """CompCars, the images from the web: 136,726 whole cars.

    SOURCE/image/MAKE/MODEL/YEAR/*.jpg, SOURCE/label/MAKE/MODEL/YEAR/*.txt (for --crop box)
    """

    kind = "compcars"

    source: Path
    """The folder data that holds image and label."""

    def references(self) -> Sequence[str]:
        """See `Source.references`: ``MAKE/MODEL/YEAR/NAME.jpg``."""
        remedy = "give CompCars' folder data, which holds image and label"
        if self.crop == "box":
            existing_folder(self.source / "label", remedy)
        return picture_names(existing_folder(self.source / "image", remedy))

    def read(self, reference: str) -> Picture:
        """See `Source.read`."""
        picture = read_picture(self.source / "image" / reference)
        if self.crop == "center":
            return picture
        return replace(picture, box=self._box(self.source / "label" / Path(reference).with_suffix(".txt")))

    def _box(self, label: Path) -> Box:
        """Of a label's lines: the viewpoint, the number of boxes, and x1 y1 x2 y2, which count from 1."""
        try:
            left, top, right, bottom = map(int, text_lines(label, "unpack CompCars again")[2])
        except (IndexError, ValueError, UserError):
            raise BrokenPictureError("its label is missing or damaged") from None
        return left - 1, top - 1, right, bottom

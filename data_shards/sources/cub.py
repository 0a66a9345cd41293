"""Caltech-UCSD Birds-200-2011."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from data_shards.errors import UserError
from data_shards.sources.images import Box, BrokenPictureError, Picture, read_mask, read_picture
from data_shards.sources.source import BoxedSource, text_lines

_REMEDY = "give the folder CUB_200_2011 that CUB_200_2011.tgz unpacks to"


@dataclass(frozen=True, kw_only=True)
class Cub(BoxedSource):
    """CUB-200-2011: 11,788 birds with segmentations, whose greys are the share of annotators who said bird.

    SOURCE/images.txt, SOURCE/bounding_boxes.txt, SOURCE/images/001.Black_footed_Albatross/*.jpg,
    SOURCE/segmentations/001.Black_footed_Albatross/*.png (segmentations.tgz, unpacked in SOURCE or beside it)
    """

    kind = "cub"

    source: Path
    """The folder CUB_200_2011."""
    masks: bool = True
    """Whether the segmentations go into the shards."""

    def references(self) -> Sequence[str]:
        """See `Source.references`: ``001.Black_footed_Albatross/NAME.jpg``, in the order of images.txt."""
        names = list(self._names.values())
        if not names:
            raise UserError(f"{self.source / 'images.txt'} names no images; {_REMEDY}")
        if self.masks and not self._segmentations.is_dir():
            raise UserError(
                f"{self.source} has no segmentations: unpack segmentations.tgz in it, or build with --no-masks"
            )
        if self.crop == "box" and not set(names) <= set(self._boxes):
            raise UserError(f"{self.source / 'bounding_boxes.txt'} lacks boxes; {_REMEDY}")
        return names

    def read(self, reference: str) -> Picture:
        """See `Source.read`."""
        picture = read_picture(self.source / "images" / reference)
        box = self._boxes[reference] if self.crop == "box" else None
        alpha = None
        if self.masks:
            mask = self._segmentations / Path(reference).with_suffix(".png")
            if not mask.is_file():
                raise BrokenPictureError("it has no segmentation")
            alpha = read_mask(mask)
        return replace(picture, alpha=alpha, box=box)

    @property
    def _segmentations(self) -> Path:
        inside = self.source / "segmentations"
        return inside if inside.is_dir() else self.source.absolute().parent / "segmentations"

    @cached_property
    def _names(self) -> Mapping[str, str]:
        """By the images' numbers, which are words here."""
        path = self.source / "images.txt"
        lines = text_lines(path, _REMEDY)
        try:
            return dict(lines)
        except ValueError:  # a line is not of two words
            raise UserError(f"{path} is damaged; {_REMEDY}") from None

    @cached_property
    def _boxes(self) -> Mapping[str, Box]:
        """By the images' names."""
        path = self.source / "bounding_boxes.txt"
        boxes = {}
        for line in text_lines(path, _REMEDY):
            try:
                left, top, width, height = map(float, line[1:])
                boxes[self._names[line[0]]] = (left, top, left + width, top + height)
            except (KeyError, ValueError):
                raise UserError(f"{path} is damaged at {' '.join(line)!r}; {_REMEDY}") from None
        return boxes

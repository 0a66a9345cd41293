"""Any folder of images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_shards.sources.images import Picture, read_picture
from data_shards.sources.source import Source, existing_folder, picture_names


@dataclass(frozen=True, kw_only=True)
class Folder(Source):
    """Any folder of images, in subfolders or not, of any format that Pillow opens.

    SOURCE/**/*.jpg, *.png, *.webp, *.tif, ...
    """

    kind = "folder"

    source: Path
    """The folder. Images with transparency are put on white, and their alpha goes into the shards."""

    def references(self) -> Sequence[str]:
        """See `Source.references`: relative paths."""
        return picture_names(existing_folder(self.source, "give a folder of images, or --kind zip for a zip file"))

    def read(self, reference: str) -> Picture:
        """See `Source.read`."""
        return read_picture(self.source / reference)

"""Any zip file of images, read where it lies: nothing is unpacked, and no name in it is used as a path."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath

from data_shards.errors import UserError
from data_shards.sources.images import BrokenPictureError, Picture, one_line, picture_extensions, read_picture
from data_shards.sources.source import Source

MAX_FILE_BYTES = 256 << 20
"""Of one unpacked file: a zip of kilobytes can hold a file of gigabytes."""


@dataclass(frozen=True, kw_only=True)
class Zip(Source):
    """Any zip file of images, in folders or not, of any format that Pillow opens; it is not unpacked.

    SOURCE.zip: **/*.jpg, *.png, *.webp, *.tif, ...
    """

    kind = "zip"

    source: Path
    """The zip file. Images with transparency are put on white, and their alpha goes into the shards."""

    def references(self) -> Sequence[str]:
        """See `Source.references`: names in the zip."""
        extensions = picture_extensions()
        names = set()
        for info in self._archive.infolist():
            path = PurePosixPath(info.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or PureWindowsPath(info.filename).drive:
                raise UserError(f"{self.source} names a file outside itself ({info.filename!r}): do not trust it")
            hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
            if path.suffix.lower() in extensions and not (info.is_dir() or hidden):
                names.add(info.filename)
        if not names:
            raise UserError(f"{self.source} holds no images (files named .jpg, .png, .webp, ...); give another zip")
        return sorted(names)

    def read(self, reference: str) -> Picture:
        """See `Source.read`."""
        info = self._archive.getinfo(reference)
        if info.file_size > MAX_FILE_BYTES:
            raise BrokenPictureError(f"it unpacks to {info.file_size:,} bytes, more than {MAX_FILE_BYTES:,}")
        try:
            with self._archive.open(info) as file:
                return read_picture(file)
        except BrokenPictureError:
            raise
        except Exception as error:  # encrypted, of a compression that is not known, or no member at its place
            raise BrokenPictureError(one_line(error)) from None

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        if not self.source.is_file():
            problem = "is a folder, not a zip file" if self.source.is_dir() else "does not exist"
            raise UserError(f"{self.source} {problem}; give a zip file, or --kind folder for a folder")
        try:
            return zipfile.ZipFile(self.source)
        except (OSError, zipfile.BadZipFile) as error:
            problem = f"{self.source} cannot be read as a zip ({one_line(error)})"
            raise UserError(f"{problem}; it may be cut off: fetch it again, or give another") from None

"""LSUN's databases: LMDB, whose values are encoded images."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from data_shards.errors import UserError
from data_shards.sources.images import BrokenPictureError, Picture, one_line, read_picture
from data_shards.sources.source import Source

if TYPE_CHECKING:
    import lmdb

_KEYS = "latin-1"  # any bytes are text in it, and sort the same


@dataclass(frozen=True, kw_only=True)
class Lmdb(Source):
    """An LMDB whose values are WebP or JPEG files, as those of LSUN. The paper takes --max-images 100000.

    SOURCE/data.mdb, as horse_train_lmdb/ or church_outdoor_train_lmdb/
    """

    kind = "lmdb"

    source: Path
    """The database's folder, or the database's file itself."""

    def references(self) -> Sequence[str]:
        """See `Source.references`: keys."""
        with self._opened() as environment, environment.begin() as transaction:
            keys = islice(transaction.cursor().iternext(keys=True, values=False), self.max_images)
            references = [key.decode(_KEYS) for key in keys]
        if not references:
            raise UserError(f"{self.source} holds no values; give another database")
        return references

    def read(self, reference: str) -> Picture:
        """See `Source.read`."""
        with self._environment.begin(buffers=False) as transaction:
            content = transaction.get(reference.encode(_KEYS))
        if content is None:
            raise BrokenPictureError("there is no such key")
        return read_picture(io.BytesIO(content))

    @cached_property
    def _environment(self) -> "lmdb.Environment":
        import lmdb

        # No lock: nobody writes it, and the folder may be read-only. No readahead: keys are taken in any order.
        return lmdb.open(str(self.source), subdir=self.source.is_dir(), readonly=True, lock=False, readahead=False)

    @contextmanager
    def _opened(self) -> Iterator["lmdb.Environment"]:
        """The database, checked and closed after: a process may have it open only once."""
        import lmdb

        file = self.source / "data.mdb" if self.source.is_dir() else self.source
        if not file.is_file():
            problem = f"holds no {file.name}" if self.source.is_dir() else "does not exist"
            raise UserError(f"{self.source} {problem}; give the folder that LSUN's zip unpacks to")
        try:
            with self._environment as environment:
                num_bytes = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
                if file.stat().st_size < num_bytes:  # to read beyond its end would kill the process
                    raise UserError(
                        f"{file} is truncated: {file.stat().st_size} bytes of {num_bytes}; fetch it again and unpack it"
                    )
                yield environment
        except lmdb.Error as error:
            raise UserError(f"{file} cannot be read as an LMDB ({one_line(error)}); give another") from None
        finally:
            self.__dict__.pop("_environment", None)

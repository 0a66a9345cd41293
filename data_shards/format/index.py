"""DALI's index of a tar, ``.idx`` version 1.2: the offset and size of each sample's files.

The format is that of DALI's ``wds2idx``: a line ``v1.2 <samples>``, then one line per sample of
``<extension> <offset> <size> <member name>`` for each of its files. It is written here with `tarfile`, because machines
without DALI need it too; a loader that has it need not walk the tar's headers at each start.
"""

import os
import tarfile
from pathlib import Path
from typing import BinaryIO

from data_shards.errors import UserError

INDEX_VERSION = "v1.2"
BLOCK_BYTES = 512  # a tar is a row of blocks: a file's header is the one before its content
_END_MARKER = bytes(2 * BLOCK_BYTES)  # POSIX: an archive ends with two blocks of zeros
_SIZE_FIELD = slice(124, 136)
_CHECKSUM_FIELD = slice(148, 156)

SampleIndex = dict[str, tuple[int, int]]
"""Of one sample: extension -> (offset, size) in its tar, bytes."""


def index_path(tar: Path) -> Path:
    """Where the index of `tar` lies."""
    return tar.with_suffix(".idx")


def write_index(tar: Path) -> Path:
    """Write the index of `tar` beside it and return its path.

    Raises:
        UserError: the tar is empty, truncated or no tar.
    """
    with tar.open("rb") as file:
        samples = _scan(file, str(tar))
    lines = [f"{INDEX_VERSION} {len(samples)}"]
    lines += [" ".join(f"{ext} {offset} {size} {name}" for ext, offset, size, name in sample) for sample in samples]
    path = index_path(tar)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def scan_index(file: BinaryIO, name: str) -> list[SampleIndex]:
    """The samples of an open tar without an index, in their order; walks the headers of all its members.

    Args:
        file: the tar.
        name: of the tar, for messages.

    Raises:
        UserError: the tar is empty, truncated or no tar.
    """
    return [{ext: (offset, size) for ext, offset, size, _ in sample} for sample in _scan(file, name)]


def read_index(tar: Path) -> list[SampleIndex]:
    """The samples of a tar by its ``.idx``, in their order.

    Raises:
        UserError: the index cannot be parsed, is of another tar, or an entry lies beyond the end of the tar.
    """
    path = index_path(tar)
    try:
        version, *lines = path.read_text(encoding="utf-8").splitlines()
        if version != f"{INDEX_VERSION} {len(lines)}":
            raise ValueError(f"its first line is not '{INDEX_VERSION} {len(lines)}'")
        samples = [_parse(line.split()) for line in lines]
        _check_order(samples)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no DALI index {INDEX_VERSION} ({reason}); delete it or rebuild the set") from None
    last_offset, last_size = max((entry for sample in samples for entry in sample.values()), default=(0, 0))
    num_bytes, end = tar.stat().st_size, last_offset + last_size
    if end > num_bytes:
        raise UserError(
            f"{tar} is truncated: {num_bytes} bytes where its index reaches to {end}; rebuild the set or delete it"
        )
    if samples and not _is_member(tar, last_offset, last_size):
        raise UserError(f"{path} is not the index of {tar.name} as it is now; delete it or rebuild the set")
    return samples


def check_end(tar: Path) -> None:
    """Check that a tar ends as a tar does.

    Raises:
        UserError: it is empty, or its end is missing.
    """
    with tar.open("rb") as file:
        _check_end(file, str(tar))


def is_header(block: bytes, size: int) -> bool:
    """Whether a block is a tar's header of a file of `size` bytes: its checksum and its size say so."""
    try:
        checksum = int(block[_CHECKSUM_FIELD].strip(b" \0"), 8)
        named_size = int(block[_SIZE_FIELD].strip(b" \0"), 8)
    except ValueError:
        return False
    blank = b" " * 8  # what the checksum's own field counts as
    return named_size == size and sum(block) - sum(block[_CHECKSUM_FIELD]) + sum(blank) == checksum


def _check_end(file: BinaryIO, name: str) -> None:
    num_bytes = file.seek(0, os.SEEK_END)
    if num_bytes == 0:
        raise UserError(f"{name} is empty: 0 bytes; rebuild the set or delete it")
    file.seek(max(0, num_bytes - len(_END_MARKER)))
    if num_bytes % BLOCK_BYTES or file.read() != _END_MARKER:
        raise UserError(
            f"{name} is truncated: its {num_bytes} bytes do not end with a tar's end marker;"
            " rebuild the set or delete it"
        )


def _is_member(tar: Path, offset: int, size: int) -> bool:
    with tar.open("rb") as file:
        file.seek(offset - BLOCK_BYTES)
        return is_header(file.read(BLOCK_BYTES), size)


def _parse(fields: list[str]) -> SampleIndex:
    if not fields or len(fields) % 4:
        raise ValueError("a line is not groups of extension, offset, size and name")
    sample: SampleIndex = {}
    for extension, offset, size, name in zip(*(fields[i::4] for i in range(4)), strict=True):
        if _split(name)[1] != extension:
            raise ValueError(f"{name} has not the extension {extension}")
        sample[extension] = int(offset), int(size)
    return sample


def _split(name: str) -> tuple[str, str]:
    """Key and extension of a member: the extension is all after the first dot of the file name."""
    directory, slash, file_name = name.rpartition("/")
    stem, _, extension = file_name.partition(".")
    return directory + slash + stem, extension


def _check_order(samples: list[SampleIndex]) -> None:
    """Files lie one after the other, each behind its header: else an entry might point into another file."""
    end = 0
    for sample in samples:
        for offset, size in sample.values():
            if offset % BLOCK_BYTES or offset < end + BLOCK_BYTES or size < 0:
                raise ValueError(f"no file of {size} bytes can begin at {offset}")
            end = offset + -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _scan(file: BinaryIO, name: str) -> list[list[tuple[str, int, int, str]]]:
    _check_end(file, name)
    file.seek(0)
    samples: list[list[tuple[str, int, int, str]]] = []
    last_key = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                key, extension = _split(member.name)
                if not member.isreg() or not extension or not key or key.endswith("/"):  # a hidden file has no key
                    continue
                if key != last_key:
                    samples.append([])
                    last_key = key
                samples[-1].append((extension, member.offset_data, member.size, member.name))
            file.seek(archive.offset)
            if any(file.read(BLOCK_BYTES)):  # tarfile takes a damaged header in the middle for the end
                raise tarfile.ReadError(f"no header at byte {archive.offset}")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{name} cannot be read as a tar ({error}); rebuild the set or delete it") from None
    if not samples:
        raise UserError(f"{name} is empty: it holds no sample; rebuild the set or delete it")
    return samples

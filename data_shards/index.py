"""DALI's index of a tar, ``.idx`` version 1.2: where in the tar each sample's files lie.

The format is that of DALI's ``wds2idx``: a line ``v1.2 <samples>``, then one line per sample of
``<extension> <offset> <size> <member name>`` for each of its files. It is written here with `tarfile`, because machines
without DALI need it too; a loader that has it need not walk the tar's headers at each start.
"""

import tarfile
from pathlib import Path

from data_shards.errors import UserError

INDEX_VERSION = "v1.2"
_END_MARKER = bytes(1024)  # POSIX: an archive ends with two blocks of zeros

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
    samples = _scan(tar)
    lines = [f"{INDEX_VERSION} {len(samples)}"]
    lines += [" ".join(f"{ext} {offset} {size} {name}" for ext, offset, size, name in sample) for sample in samples]
    path = index_path(tar)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def scan_index(tar: Path) -> list[SampleIndex]:
    """The samples of a tar without an index, in their order; walks the headers of all its members.

    Raises:
        UserError: the tar is empty, truncated or no tar.
    """
    return [{ext: (offset, size) for ext, offset, size, _ in sample} for sample in _scan(tar)]


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
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no DALI index {INDEX_VERSION} ({reason}); delete it or rebuild the set") from None
    last_offset, last_size = max((entry for sample in samples for entry in sample.values()), default=(0, 0))
    num_bytes, end = tar.stat().st_size, last_offset + last_size
    if end > num_bytes:
        raise UserError(
            f"{tar} is truncated: {num_bytes} bytes where its index reaches to {end}; rebuild the set or delete it"
        )
    if last_offset and not _is_member(tar, last_offset):
        raise UserError(f"{path} is not the index of {tar.name} as it is now; delete it or rebuild the set")
    return samples


def check_end(tar: Path) -> None:
    """Check that a tar ends as a tar does.

    Raises:
        UserError: it is empty, or its end is missing.
    """
    num_bytes = tar.stat().st_size
    if num_bytes == 0:
        raise UserError(f"{tar} is empty: 0 bytes; rebuild the set or delete it")
    with tar.open("rb") as file:
        file.seek(max(0, num_bytes - len(_END_MARKER)))
        if num_bytes % 512 or file.read() != _END_MARKER:
            raise UserError(
                f"{tar} is truncated: its {num_bytes} bytes do not end with a tar's end marker;"
                " rebuild the set or delete it"
            )


def _is_member(tar: Path, offset: int) -> bool:
    """Whether a file's content begins at `offset`: its header, the block before, bears tar's magic."""
    with tar.open("rb") as file:
        file.seek(offset - 512 + 257)
        return file.read(5) == b"ustar"


def _parse(fields: list[str]) -> SampleIndex:
    if not fields or len(fields) % 4:
        raise ValueError("a line is not groups of extension, offset, size and name")
    return {fields[i]: (int(fields[i + 1]), int(fields[i + 2])) for i in range(0, len(fields), 4)}


def _scan(tar: Path) -> list[list[tuple[str, int, int, str]]]:
    check_end(tar)
    samples: list[list[tuple[str, int, int, str]]] = []
    last_key = None
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                # The extension is all after the first dot of the file name; hidden files belong to no sample.
                directory, slash, file_name = member.name.rpartition("/")
                stem, dot, extension = file_name.partition(".")
                if not (member.isreg() and stem and dot):
                    continue
                key = directory + slash + stem
                if key != last_key:
                    samples.append([])
                    last_key = key
                samples[-1].append((extension, member.offset_data, member.size, member.name))
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{tar} cannot be read as a tar ({error}); rebuild the set or delete it") from None
    if not samples:
        raise UserError(f"{tar} is empty: it holds no sample; rebuild the set or delete it")
    return samples

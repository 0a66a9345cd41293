"""Verification of a shard set against its manifest, to the last byte."""

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory

from data_shards.errors import UserError
from data_shards.format.index import index_path, write_index
from data_shards.format.manifest import MANIFEST_NAME, Manifest, ShardRecord
from data_shards.progress import progress_bar
from data_shards.reading.shard_set import ShardSet


def verify(directory: Path, *, progress: bool = False) -> Manifest:
    """Check all tars' checksums, counts and indices.

    Args:
        directory: of the set.
        progress: whether to show a bar on stderr.

    Raises:
        UserError: something is not as the manifest says; it names every shard that is not.
    """
    ShardSet.open(directory).close()
    if not (directory / MANIFEST_NAME).exists():
        raise UserError(f"{directory} has no {MANIFEST_NAME} to check it against; build it with data_shards/build.py")
    manifest = Manifest.read(directory)
    shards = progress_bar(manifest.shards, unit="shard", disable=not progress)
    problems = [f"{shard.name} {problem}" for shard in shards if (problem := _problem(directory, shard))]
    num_samples = sum(shard.num_samples for shard in manifest.shards)
    if num_samples != manifest.num_samples:
        problems.append(f"{MANIFEST_NAME} counts {manifest.num_samples} images where its shards hold {num_samples}")
    if problems:
        raise UserError(f"{directory} is not what was built: {'; '.join(problems)}; delete it and build it again")
    return manifest


def _problem(directory: Path, shard: ShardRecord) -> str | None:
    tar = directory / shard.name
    with tar.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            return "has another sha256"
    if not index_path(tar).is_file():
        return "has no index"
    with TemporaryDirectory() as elsewhere:
        link = Path(elsewhere) / tar.name
        link.symlink_to(tar.absolute())
        right = write_index(link).read_bytes() == index_path(tar).read_bytes()
    return None if right else "has the index of another tar"

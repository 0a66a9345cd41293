"""Shard sets that the package draws itself, without a download."""

import shutil
import uuid
from functools import partial
from pathlib import Path

from data_shards.building.writer import EncodedSample, encode_sample, write_encoded_shards
from data_shards.errors import UserError
from data_shards.format.manifest import MANIFEST_NAME
from data_shards.parallel import num_cores, ordered_map
from data_shards.progress import progress_bar
from data_shards.reading.shard_set import ShardSet
from data_shards.sources.furballs import VERSION, draw

_MIN_IMAGES_PER_WORKER = 256  # below, a worker's start costs more than it saves


def furballs_shards(
    root: Path, *, resolution: int, num_images: int, seed: int, num_workers: int | None = None, progress: bool = False
) -> Path:
    """The directory of a furballs set, drawn first where it is not there yet.

    The bytes depend on resolution, number and seed alone, not on the number of workers. Processes may call this at the
    same time: all draw, one set stays. Called with several workers from a script, the script's own code must stand
    under ``if __name__ == "__main__"``, as its workers are spawned.

    Args:
        root: directory of shard sets; this one is ``furballs-v{VERSION}-{resolution}px-{num_images}-seed{seed}`` in
            it.
        resolution: side of the images, pixels.
        num_images: how many.
        seed: of the drawing.
        num_workers: processes that draw; None: one per core, fewer for a small set.
        progress: whether to show a bar on stderr.
    """
    path = root / f"furballs-v{VERSION}-{resolution}px-{num_images}-seed{seed}"
    if path.exists():
        if _is_whole(path, resolution):
            return path
        _remove(path)
    source = {"kind": "furballs", "version": VERSION, "resolution": resolution, "num_images": num_images, "seed": seed}
    if num_workers is None:
        num_workers = min(num_cores(), num_images // _MIN_IMAGES_PER_WORKER)
    draw_one = partial(_draw_encoded, resolution=resolution, seed=seed)
    with ordered_map(draw_one, range(num_images), num_workers=num_workers) as samples:
        shown = progress_bar(samples, total=num_images, desc=path.name, unit="img", disable=not progress)
        try:
            write_encoded_shards(shown, path, resolution=resolution, source=source)
        except UserError:
            if not _is_whole(path, resolution):  # else another process was first: its set is the same
                raise
    return path


def _is_whole(path: Path, resolution: int) -> bool:
    try:
        ShardSet.open(path, resolution=resolution).close()
    except UserError:
        return False
    return (path / MANIFEST_NAME).is_file()


def _remove(path: Path) -> None:
    """Remove a broken set; by a rename first, so that the name never stands for a half-removed one."""
    trash = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        path.rename(trash)
    except FileNotFoundError:
        return
    shutil.rmtree(trash, ignore_errors=True)


def _draw_encoded(index: int, *, resolution: int, seed: int) -> EncodedSample:
    return encode_sample(draw(index, seed=seed, resolution=resolution), resolution=resolution)

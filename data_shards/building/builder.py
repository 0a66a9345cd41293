"""Building of a shard set from a source: shuffled, parallel, and resumable at any point.

A build fills ``OUT.partial`` and gives it the name ``OUT`` at its end. After each shard, ``progress.json`` says which
images are done; a build that was killed resumes from there, with the same bytes as one that was not.
"""

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import __version__ as pillow_version
from tqdm import tqdm

from data_shards.building.writer import (
    ALPHA_EXTENSION,
    EncodedSample,
    Encoding,
    EncodingName,
    ShardWriter,
    encode_sample,
    encoding_named,
    shard_name,
    size_in_tar,
)
from data_shards.errors import UserError
from data_shards.files import fsync, write_atomically
from data_shards.format.manifest import MANIFEST_NAME, MANIFEST_VERSION, Manifest, ShardRecord, SkippedPicture
from data_shards.format.sample import Sample
from data_shards.parallel import num_cores, ordered_map
from data_shards.progress import progress_bar
from data_shards.sources.images import (
    ALPHA_FILTER,
    BOX_MARGIN,
    DOWNSCALE_FILTER,
    UPSCALE_FILTER,
    BrokenPictureError,
    fit,
    one_line,
)
from data_shards.sources.source import BoxedSource, Source

PROGRESS_NAME = "progress.json"

_MIN_IMAGES_PER_WORKER = 32  # below, a worker's start costs more than it saves


@dataclass(frozen=True)
class BuildOptions:
    """How images become shards."""

    encoding: EncodingName = "png"
    """Of the images: png and webp are lossless, webp is smaller and faster to build, jpeg is a third of the size."""
    jpeg_quality: int = 95
    """95 to 100."""
    shard_mib: int = 256
    """Greatest size of a tar, MiB."""
    max_skipped: float = 0.01
    """Greatest share of the images that may be broken: more end the build."""
    workers: int | None = None
    """Processes that decode, resize and encode; one per core where not given. The bytes do not depend on it."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserError: one is invalid.
        """
        if self.shard_mib < 1:
            raise UserError(f"--shard-mib {self.shard_mib} is not positive; give 1 or more")
        if not 0 <= self.max_skipped <= 1:
            raise UserError(f"--max-skipped {self.max_skipped} is not a share; give 0 to 1, such as 0.01 for 1%")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers {self.workers} is not positive; give 1 or more")
        encoding_named(self.encoding, self.jpeg_quality)


def build(source: Source, out: Path, options: BuildOptions = BuildOptions(), *, progress: bool = False) -> Manifest:
    """Build the shard set `out`, or resume a build of it.

    The bytes depend on the source, its options, the encoding and the size of shards, and on the versions of Pillow and
    its codecs; not on the number of workers, nor on how often the build was stopped. Called with several workers from a
    script, the script's own code must stand under ``if __name__ == "__main__"``, as its workers are spawned.

    Args:
        source: where the images are from, with seed and resolution.
        out: directory to make; its parents are made too. A set that is there already and is the same stays.
        options: how to make it.
        progress: whether to show a bar, and each skipped image, on stderr.

    Raises:
        UserError: the source is unusable, too many images are broken, `out` is something else, another process builds
            it, or it cannot be written.
    """
    _check_out(out)
    references = _shuffled(source)
    recipe = _recipe(source, references, options)
    if manifest := _built(out, recipe):
        return manifest
    try:
        with _partial_directory(out) as directory:
            if manifest := _built(out, recipe):  # by a process that had the directory until now
                return manifest
            manifest = _Build(directory, recipe, source, references, options).run(progress=progress)
            (directory / PROGRESS_NAME).unlink(missing_ok=True)
            fsync(directory)
            directory.rename(out)
            fsync(out.parent)
            return manifest
    except BrokenProcessPool:
        problem = "a worker was killed, perhaps for want of memory"
        raise UserError(f"{problem}; run the same command again to resume, with fewer --workers") from None
    except OSError as error:
        problem = f"{out} cannot be written ({one_line(error)})"
        raise UserError(f"{problem}; mend that, and run the same command again to resume") from None


@dataclass(frozen=True)
class Outcome:
    """What became of one image: its files, or the reason why there are none."""

    reference: str
    files: EncodedSample | None = None
    is_upsampled: bool = False
    reason: str = ""


def prepare(reference: str, *, source: Source, image_encoding: Encoding) -> Outcome:
    """Read, crop, resize and encode one image."""
    try:
        picture = source.read(reference)
        sample, is_upsampled = fit(picture, source.resolution)
    except BrokenPictureError as error:
        return Outcome(reference, reason=str(error))
    metadata = {"reference": reference, "width": picture.image.width, "height": picture.image.height}
    sample = Sample(sample.image, sample.alpha, {**metadata, **sample.metadata})
    files = encode_sample(sample, resolution=source.resolution, image_encoding=image_encoding)
    return Outcome(reference, files, is_upsampled)


@dataclass(frozen=True)
class _Recipe:
    """All that decides the bytes."""

    source: Mapping[str, Any]
    preparation: Mapping[str, Any]

    def check_same(self, other: "_Recipe", where: Path) -> None:
        """Raise a `UserError` that names what is other in `where`."""
        ours, theirs = {**self.source, **self.preparation}, {**other.source, **other.preparation}
        different = [name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name)]
        if different:
            name = different[0]  # the kind, if it is that, which the others follow from
            was, asked = (json.dumps(values.get(name)) for values in (theirs, ours))
            raise UserError(f"{where} was made with {name} {was}, not {asked}; delete it, or choose another --out")


def _recipe(source: Source, references: Sequence[str], options: BuildOptions) -> _Recipe:
    inputs = hashlib.sha256()
    for name in (*references, *source.other_inputs()):
        inputs.update(name.encode("utf-8", "surrogateescape") + b"\n")
    of_source = {
        option.name: str(value.expanduser().resolve()) if isinstance(value, Path) else value
        for option in fields(source)
        if (value := getattr(source, option.name)) is not None
    }
    preparation = {
        "crop": source.crop if isinstance(source, BoxedSource) else "center",
        "downscale_filter": DOWNSCALE_FILTER.name.lower(),
        "upscale_filter": UPSCALE_FILTER.name.lower(),
        "alpha_filter": ALPHA_FILTER.name.lower(),
        "encoding": dict(encoding_named(options.encoding, options.jpeg_quality).options),
        "shard_mib": options.shard_mib,
        "pillow": pillow_version,
    }
    if preparation["crop"] == "box":
        preparation["box_margin"] = BOX_MARGIN
    # Through JSON, as what it is compared with: a tuple is a list there.
    return _Recipe(
        json.loads(
            json.dumps(
                {
                    "kind": source.kind,
                    **of_source,
                    "num_pictures": len(references),
                    "pictures_sha256": inputs.hexdigest(),
                }
            )
        ),
        preparation,
    )


@dataclass
class _Progress:
    """What the finished shards hold. Of the shuffled images, those before `position` are done."""

    position: int = 0
    num_samples: int = 0
    num_alphas: int = 0
    num_upsampled: int = 0
    skipped: list[SkippedPicture] = field(default_factory=list)
    shards: list[ShardRecord] = field(default_factory=list)

    def count(self, outcome: Outcome) -> None:
        self.position += 1
        if outcome.files is None:
            self.skipped.append(SkippedPicture(outcome.reference, outcome.reason))
        else:
            self.num_samples += 1
            self.num_alphas += ALPHA_EXTENSION in outcome.files
            self.num_upsampled += outcome.is_upsampled


@dataclass(frozen=True)
class _Build:
    """One build in its partial directory."""

    directory: Path
    recipe: _Recipe
    source: Source
    references: Sequence[str]
    options: BuildOptions

    def run(self, *, progress: bool) -> Manifest:
        """Fill the directory, from wherever it stands."""
        if (self.directory / MANIFEST_NAME).exists():  # it was stopped right before its name was to be given
            manifest = Manifest.read(self.directory)
            self.recipe.check_same(_Recipe(manifest.source, manifest.preparation), self.directory)
            return manifest
        done = self._load()
        encoding = encoding_named(self.options.encoding, self.options.jpeg_quality)
        with (
            ordered_map(
                partial(prepare, source=self.source, image_encoding=encoding),
                self.references[done.position :],
                num_workers=self._num_workers(len(self.references) - done.position),
            ) as outcomes,
            progress_bar(total=len(self.references), initial=done.position, unit="img", disable=not progress) as bar,
        ):
            self._write(done, outcomes, bar)
        if not done.num_samples:
            raise UserError(f"all {len(self.references)} images are broken, the first: {_skip_line(done.skipped[0])}")
        manifest = Manifest(
            version=MANIFEST_VERSION,
            num_samples=done.num_samples,
            resolution=self.source.resolution,
            image_extension=encoding.extension,
            has_alpha=done.num_alphas == done.num_samples,
            source=self.recipe.source,
            shards=tuple(done.shards),
            preparation=self.recipe.preparation,
            num_alphas=done.num_alphas,
            num_upsampled=done.num_upsampled,
            skipped=tuple(done.skipped),
        )
        manifest.write(self.directory)
        return manifest

    def _write(self, done: _Progress, outcomes: Iterator[Outcome], bar: "tqdm[Any]") -> None:
        """Write the outcomes as shards; a shard is full when the next sample would make it too large."""
        following = next(outcomes, None)
        while following is not None:
            with ShardWriter(self.directory / shard_name(len(done.shards))) as shard:
                while following is not None:
                    files = following.files
                    if files is not None:
                        if shard.num_samples and shard.num_bytes + size_in_tar(files) > self.options.shard_mib << 20:
                            break
                        shard.add(done.num_samples, files)
                    elif not bar.disable:
                        bar.write(f"skipped {_skip_line(following)}", file=sys.stderr)
                    done.count(following)
                    self._check_skipped(done)
                    bar.update()
                    following = next(outcomes, None)
                if shard.num_samples:
                    done.shards.append(shard.finish())
                    self._save(done)

    def _check_skipped(self, done: _Progress) -> None:
        if len(done.skipped) > self.options.max_skipped * len(self.references):
            raise UserError(
                f"{len(done.skipped)} of {len(self.references)} images are broken, more than"
                f" --max-skipped {self.options.max_skipped:g} allows; the last: {_skip_line(done.skipped[-1])};"
                " remove or mend them, or raise --max-skipped to leave them out"
            )

    def _num_workers(self, num_images: int) -> int:
        return self.options.workers or min(num_cores(), max(1, num_images // _MIN_IMAGES_PER_WORKER))

    def _save(self, done: _Progress) -> None:
        write_atomically(
            self.directory / PROGRESS_NAME, json.dumps({**asdict(self.recipe), **asdict(done)}, indent=1) + "\n"
        )

    def _load(self) -> _Progress:
        path = self.directory / PROGRESS_NAME
        if not path.exists():
            return _Progress()
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            recipe = _Recipe(saved.pop("source"), saved.pop("preparation"))
            saved["skipped"] = [SkippedPicture(**picture) for picture in saved["skipped"]]
            saved["shards"] = [ShardRecord(**shard) for shard in saved["shards"]]
            done = _Progress(**saved)
            sizes = [(self.directory / shard.name).stat().st_size for shard in done.shards]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            problem = f"{self.directory} is damaged ({one_line(error)})"
            raise UserError(f"{problem}; delete it, to build from the start") from None
        self.recipe.check_same(recipe, self.directory)
        for shard, size in zip(done.shards, sizes, strict=True):
            if size != shard.num_bytes:
                raise UserError(f"{self.directory / shard.name} was changed; delete {self.directory}, to start again")
        return done


def _shuffled(source: Source) -> list[str]:
    if source.resolution < 1:
        raise UserError(f"--resolution {source.resolution} is not positive; give pixels, such as 256")
    if source.seed < 0:
        raise UserError(f"--seed {source.seed} is negative; give 0 or more")
    if source.max_images is not None and source.max_images < 1:
        raise UserError(f"--max-images {source.max_images} is not positive; give 1 or more")
    references = source.references()[: source.max_images]
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence(source.seed))).permutation(len(references))
    return [references[i] for i in order]


def _check_out(out: Path) -> None:
    if out.exists() and not (out / MANIFEST_NAME).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not a shard set; choose another --out")


def _built(out: Path, recipe: _Recipe) -> Manifest | None:
    """The manifest of `out` where it is there already, checked to be the same; an empty directory is nothing."""
    if not (out / MANIFEST_NAME).exists():
        return None
    manifest = Manifest.read(out)
    recipe.check_same(_Recipe(manifest.source, manifest.preparation), out)
    return manifest


@contextmanager
def _partial_directory(out: Path) -> Iterator[Path]:
    """``OUT.partial``, locked against other processes; it stays, unless it is empty."""
    directory = out.with_name(f"{out.name}.partial")
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process builds {out} at this moment; wait for it, or end it") from None
        except OSError:  # a file system without locks
            pass
        for path in directory.glob("*.unfinished"):
            path.unlink()
        yield directory
    finally:
        os.close(descriptor)
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def _skip_line(picture: Outcome | SkippedPicture) -> str:
    name = picture.reference
    return f"{name if name.isprintable() else ascii(name)}: {picture.reason}"

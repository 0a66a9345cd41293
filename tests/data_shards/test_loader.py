"""The loaders: the same images in the same order for any number of ranks and either library, resumable exactly."""

import gc
import io
import tarfile
import threading
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_shards.building.writer import write_encoded_shards, write_shards
from data_shards.errors import UserError
from data_shards.format.sample import Sample
from data_shards.reading.batches import Batch, Loader
from data_shards.reading.decode import decode
from data_shards.reading.loader import LoaderKind, make_loader
from data_shards.reading.order import BatchOrder, ShardWindows, epoch_order, rank_slots
from data_shards.reading.shard_set import ShardSet
from data_shards.reading.wds import BatchMemory

NUM_SAMPLES, RESOLUTION = 22, 16
KINDS = ("dali", "webdataset")


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardSet]:
    """Images of noise whose red channel is their alpha."""
    images = np.random.default_rng(0).integers(256, size=(NUM_SAMPLES, RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    out = tmp_path_factory.mktemp("shards") / "set"
    samples = (Sample(image, image[..., 0].copy()) for image in images)
    write_shards(samples, out, resolution=RESOLUTION, source={}, samples_per_shard=8)
    shard_set = ShardSet.open(out)
    yield shard_set
    shard_set.close()


def loader_of(
    shard_set: ShardSet,
    kind: LoaderKind,
    *,
    global_batch: int = 8,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 5,
    flip: bool = True,
    with_alpha: bool = True,
    device: str = "cpu",
    num_threads: int = 1,
) -> Loader:
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    return make_loader(
        kind,
        shard_set,
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        seed=seed,
        flip=flip,
        with_alpha=with_alpha,
        device=torch.device(device),
        num_threads=num_threads,
    )


def take(loader: Loader, num_batches: int) -> list[Batch]:
    return [next(loader) for _ in range(num_batches)]


def assert_equal(batches: list[Batch], others: list[Batch], atol: float = 0.0) -> None:
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.indices, other.indices)
        torch.testing.assert_close(batch.images, other.images, rtol=0, atol=atol)
        torch.testing.assert_close(batch.alphas, other.alphas, rtol=0, atol=atol)


# --- order ---


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_partition_the_batch_and_keep_groups_and_halves(world_size: int) -> None:
    n = 32
    slots = [rank_slots(n, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(slots)) == list(range(n))
    groups = {tuple(group) for slot in slots for group in slot.reshape(4, -1).T}
    assert groups == {(g, g + n // 4, g + n // 2, g + 3 * n // 4) for g in range(n // 4)}
    for slot in slots:
        assert slot[: len(slot) // 2].max() < n // 2 <= slot[len(slot) // 2 :].min()


def test_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="24 is not a multiple of 4 x 4 ranks"):
        rank_slots(24, 0, 4)


def test_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match="the set has 7 images, fewer than one global batch of 8"):
        BatchOrder(7, global_batch=8, seed=0, flip=True)


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_see_the_same_global_batch(world_size: int) -> None:
    alone = BatchOrder(100, global_batch=16, seed=1, flip=True)
    ranks = [
        BatchOrder(100, global_batch=16, rank=rank, world_size=world_size, seed=1, flip=True)
        for rank in range(world_size)
    ]
    for step in range(2 * alone.steps_per_epoch):
        indices, flips = alone.batch_at(step)
        gathered = np.empty_like(indices), np.empty_like(flips)
        for rank, order in enumerate(ranks):
            slots = rank_slots(16, rank, world_size)
            gathered[0][slots], gathered[1][slots] = order.batch_at(step)
        assert np.array_equal(indices, gathered[0]) and np.array_equal(flips, gathered[1])


def test_no_sample_comes_twice_in_an_epoch_and_each_epoch_is_new() -> None:
    order = BatchOrder(100, global_batch=16, seed=1, flip=True)
    steps = range(order.steps_per_epoch)
    epochs = [
        np.concatenate([order.batch_at(epoch * order.steps_per_epoch + step)[0] for step in steps])
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 96
    for epoch, following in pairwise(epochs):
        assert not np.array_equal(epoch, following)
        assert set(epoch) != set(following)  # the remainder dropped is another one


WINDOWS = [
    ShardWindows((7, 7, 7, 7, 7), 2),
    ShardWindows((1, 30, 4), 1),
    ShardWindows((40,), 1),
    ShardWindows((3,) * 16, 2),
]


@pytest.mark.parametrize("windows", WINDOWS, ids=["five", "uneven", "one", "smaller than a batch"])
def test_windows_hold_whole_shards_and_every_sample_once(windows: ShardWindows) -> None:
    num_samples = sum(windows.sizes)
    shard_of = np.repeat(np.arange(len(windows.sizes)), windows.sizes)
    epochs = [epoch_order(num_samples, 3, epoch, windows) for epoch in range(3)]
    for order in epochs:
        assert sorted(order.permutation) == list(range(num_samples))
        assert sorted(shard for window in order.windows for shard in window) == list(range(len(windows.sizes)))
        for window, samples in zip(order.windows, np.split(order.permutation, order.ends[:-1]), strict=True):
            assert set(shard_of[samples]) == set(window) and len(window) <= windows.per_window
    for order, following in pairwise(epochs):
        assert not np.array_equal(order.permutation, following.permutation)


@pytest.mark.parametrize("windows", WINDOWS, ids=["five", "uneven", "one", "smaller than a batch"])
def test_shards_of_a_step_are_those_it_reads_and_those_of_the_next_window(windows: ShardWindows) -> None:
    order = BatchOrder(sum(windows.sizes), global_batch=12, seed=3, flip=True, windows=windows)
    shard_of = np.repeat(np.arange(len(windows.sizes)), windows.sizes)
    foreseen: set[int] = set()
    for step in range(4 * order.steps_per_epoch):
        needed, at_hand = set(shard_of[order.batch_at(step)[0]]), order.shards_at(step)
        assert needed <= set(at_hand) and len(at_hand) == len(set(at_hand))
        if sum(windows.sizes[:1]) * windows.per_window >= 12 and step % order.steps_per_epoch:
            assert needed <= foreseen  # so that they can be fetched meanwhile
            assert len(at_hand) <= 2 * windows.per_window  # the room that the cache has
        foreseen = set(at_hand)


@pytest.mark.parametrize("windows", [None, ShardWindows((13,) * 5, 2)], ids=["whole", "windows"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_never_share_a_sample_in_an_epoch(world_size: int, windows: ShardWindows | None) -> None:
    sizes = {"global_batch": 24, "world_size": world_size, "seed": 0, "flip": False, "windows": windows}
    orders = [BatchOrder(65, rank=rank, **sizes) for rank in range(world_size)]
    assert {order.steps_per_epoch for order in orders} == {2}
    for epoch in range(3):
        seen = [index for order in orders for step in range(2) for index in order.batch_at(2 * epoch + step)[0]]
        assert len(seen) == len(set(seen)) == 48


def test_order_is_a_function_of_seed_and_step_alone() -> None:
    def drawn(seed: int, flip: bool = True) -> list[int]:
        order = BatchOrder(64, global_batch=16, seed=seed, flip=flip)
        order.batch_at(17)
        return order.batch_at(9)[0].tolist()

    assert drawn(1) == drawn(1) == drawn(1, flip=False) != drawn(2)


def test_flips_are_fair_and_can_be_turned_off() -> None:
    orders = [BatchOrder(4096, global_batch=4096, seed=0, flip=flip) for flip in (True, False)]
    assert 0.45 < orders[0].batch_at(0)[1].mean() < 0.55
    assert not orders[1].batch_at(0)[1].any()


# --- loaders ---


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_stored_pixels_with_alpha_flipped_alike(shard_set: ShardSet, kind: LoaderKind) -> None:
    loader = loader_of(shard_set, kind)
    order = BatchOrder(NUM_SAMPLES, global_batch=8, seed=5, flip=True)
    seen_flips = set()
    for step, batch in enumerate(take(loader, 4)):
        indices, flips = order.batch_at(step)
        assert batch.images.dtype == torch.float32 and batch.images.shape == (8, 3, RESOLUTION, RESOLUTION)
        assert batch.alphas is not None and batch.alphas.shape == (8, 1, RESOLUTION, RESOLUTION)
        assert batch.indices.tolist() == indices.tolist() and batch.indices.dtype == torch.int64
        assert batch.images.min() >= -1 and batch.images.max() <= 1
        for image, alpha, index, flip in zip(batch.images, batch.alphas, indices, flips, strict=True):
            stored = np.asarray(Image.open(io.BytesIO(shard_set.image_bytes(int(index)))))
            stored = stored[:, ::-1] if flip else stored
            np.testing.assert_allclose(image.permute(1, 2, 0) * 127.5 + 127.5, stored, atol=1e-3)
            np.testing.assert_allclose(alpha[0] * 255, stored[..., 0], atol=1e-3)
            seen_flips.add(bool(flip))
    assert seen_flips == {True, False}
    loader.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_shards", [1, 2, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_once_per_epoch(kind: LoaderKind, num_shards: int, world_size: int, tmp_path: Path) -> None:
    """Up to a remainder below a global batch; told by the pixels, not by what the loader says of them."""
    num_samples, global_batch, epochs = 55, 24, 2
    write_numbered(tmp_path / "set", num_samples, num_shards)
    shard_set = ShardSet.open(tmp_path / "set")
    sizes = {"global_batch": global_batch, "world_size": world_size, "with_alpha": False}
    ranks = [loader_of(shard_set, kind, rank=rank, **sizes) for rank in range(world_size)]
    assert {loader.steps_per_epoch for loader in ranks} == {2}
    orders = []
    for _ in range(epochs):
        seen = []
        for _ in range(2):
            for loader in ranks:
                batch = next(loader)
                assert len(batch.images) == global_batch // world_size
                numbers = ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
                assert numbers == batch.indices.tolist()
                seen += numbers
        assert len(seen) == len(set(seen)) == num_samples - num_samples % global_batch
        orders.append(seen)
    assert orders[0] != orders[1]
    for loader in ranks:
        loader.close()
    shard_set.close()


def write_numbered(out: Path, num_samples: int, num_shards: int) -> None:
    """Each image has its number for a colour."""
    images = [np.full((RESOLUTION, RESOLUTION, 3), number, np.uint8) for number in range(num_samples)]
    per_shard = -(-num_samples // num_shards)
    write_shards(map(Sample, images), out, resolution=RESOLUTION, source={}, samples_per_shard=per_shard)
    assert len(list(out.glob("*.tar"))) == num_shards


@pytest.mark.parametrize(
    ("extension", "options"),
    [
        ("png", {}),
        ("jpg", {"quality": 95}),
        ("jpg", {"quality": 75}),
        ("jpg", {"quality": 95, "progressive": True}),
        ("webp", {"quality": 95}),
        ("webp", {"lossless": True}),
    ],
)
def test_dali_and_webdataset_deliver_the_same(extension: str, options: dict[str, Any], tmp_path: Path) -> None:
    """PNG within rounding of the normalisation; JPEG and WebP to a grey level, as two decoders may round otherwise."""
    write_pictures(tmp_path, extension, options)
    shard_set = ShardSet.open(tmp_path)
    dali, webdataset = (take(loader_of(shard_set, kind), 3) for kind in KINDS)
    for batch, other in zip(dali, webdataset, strict=True):
        tolerance = 1e-6 if extension == "png" else 1.01 / 127.5
        torch.testing.assert_close(batch.images, other.images, rtol=0, atol=tolerance)
        torch.testing.assert_close(batch.alphas, other.alphas, rtol=0, atol=1e-6)
    assert any(len(set(batch.images.flatten().tolist())) > 100 for batch in dali)


def write_pictures(directory: Path, extension: str, options: dict[str, Any]) -> None:
    """A tar of smooth colours, as photographs have them; alpha is the red channel."""
    generator = np.random.default_rng(0)
    with tarfile.open(directory / "some.tar", "w") as tar:
        for number in range(8):
            coarse = Image.fromarray(generator.integers(256, size=(8, 8, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            picture = coarse.resize((64, 64), Image.Resampling.BICUBIC)
            picture.save(buffer, {"jpg": "jpeg"}.get(extension, extension), **options)
            for name, content in ((extension, buffer.getvalue()), ("alpha.png", png_of(picture.getchannel(0)))):
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_state_resumes_exactly_at_any_step(shard_set: ShardSet, kind: LoaderKind, step: int) -> None:
    loader = loader_of(shard_set, kind)
    assert loader.steps_per_epoch == 2
    take(loader, step)
    state = loader.state_dict()
    expected = take(loader, 3)
    resumed = loader_of(shard_set, kind)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert_equal(take(resumed, 3), expected)
    loader.load_state_dict(state)  # in the loader that had prefetched beyond
    assert_equal(take(loader, 3), expected)


def test_state_passes_between_libraries_and_world_sizes(shard_set: ShardSet) -> None:
    loader = loader_of(shard_set, "dali")
    take(loader, 3)
    state, expected = loader.state_dict(), next(loader)
    for rank in range(2):
        resumed = loader_of(shard_set, "webdataset", rank=rank, world_size=2)
        resumed.load_state_dict(state)
        slots = rank_slots(8, rank, 2)
        torch.testing.assert_close(next(resumed).images, expected.images[slots], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_other_data_is_refused(shard_set: ShardSet, kind: LoaderKind) -> None:
    state = loader_of(shard_set, kind).state_dict()
    for other in ({"seed": 6}, {"global_batch": 4}):
        with pytest.raises(UserError, match=f"of other data: its {next(iter(other))} is"):
            loader_of(shard_set, kind, **other).load_state_dict(state)
    with pytest.raises(UserError, match="its digest is"):
        loader_of(shard_set, kind).load_state_dict({**state, "digest": "0"})


@pytest.mark.parametrize("kind", KINDS)
def test_kept_batches_are_not_overwritten(shard_set: ShardSet, kind: LoaderKind) -> None:
    loader = loader_of(shard_set, kind)
    kept = take(loader, 8)
    copies = [Batch(batch.images.clone(), batch.alphas.clone(), batch.indices.clone()) for batch in kept]
    take(loader, 8)
    assert_equal(kept, copies)
    loader.load_state_dict({**loader.state_dict(), "step": 0})
    assert_equal(kept, take(loader, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_loaders_without_alpha_or_flip_deliver_neither(shard_set: ShardSet, kind: LoaderKind) -> None:
    batch = next(loader_of(shard_set, kind, with_alpha=False, flip=False))
    assert batch.alphas is None
    stored = np.asarray(Image.open(io.BytesIO(shard_set.image_bytes(int(batch.indices[0])))))
    np.testing.assert_allclose(batch.images[0].permute(1, 2, 0) * 127.5 + 127.5, stored, atol=1e-3)


@pytest.mark.parametrize("with_alpha", [True, False], ids=["with alpha", "without"])
def test_webdataset_normalises_as_torch_does_bit_for_bit(shard_set: ShardSet, with_alpha: bool) -> None:
    loader = loader_of(shard_set, "webdataset", with_alpha=with_alpha)
    order = BatchOrder(NUM_SAMPLES, global_batch=8, seed=5, flip=True)
    levels: set[int] = set()
    for step, batch in enumerate(take(loader, 4)):
        for image, position in zip(batch.images, zip(*order.batch_at(step), strict=True), strict=True):
            stored = stored_pixels(shard_set, *position)
            assert torch.equal(image, (stored.float() - 127.5) / 127.5)
            levels |= set(stored.flatten().tolist())
        if with_alpha:
            reds = [stored_pixels(shard_set, *position)[:1] for position in zip(*order.batch_at(step), strict=True)]
            assert torch.equal(batch.alphas, torch.stack(reds).float() / 255.0)
    assert levels == set(range(256))


def stored_pixels(shard_set: ShardSet, index: int, flip: bool) -> torch.Tensor:
    """``[3, R, R]`` uint8 of a sample, by Pillow and torch."""
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(shard_set.image_bytes(int(index)))))).permute(2, 0, 1)
    return pixels.flip(-1) if flip else pixels


@pytest.mark.parametrize("source", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (64, 64), (2200, 2000)], ids=str)
def test_decoded_pixels_are_those_that_pillow_copies_out(source: str, mode: str, size: tuple[int, int]) -> None:
    """Of an image whose memory is in several pieces, too: the largest has 17 MB."""
    width, height = size
    pixels = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(source).save(buffer, "tiff")
    decoded = decode(buffer.getvalue(), mode)
    gc.collect()  # the image itself is gone
    expected = np.atleast_3d(np.asarray(Image.open(buffer).convert(mode))).transpose(2, 0, 1)
    assert decoded.shape == (len(mode), height, width) and np.array_equal(decoded, expected)


@pytest.mark.parametrize("num_threads", [2, 16])
def test_webdataset_works_on_several_batches_at_a_time(shard_set: ShardSet, num_threads: int) -> None:
    loader = loader_of(shard_set, "webdataset", global_batch=4, num_threads=num_threads)
    order = BatchOrder(NUM_SAMPLES, global_batch=4, seed=5, flip=True)
    step_of = {str(index): step for step in range(2) for index in order.batch_at(step)[0]}
    decoder, begun, both_begun = loader._decoder, set(), threading.Event()

    def waiting(sample: dict[str, Any]) -> dict[str, Any]:
        """Decode, but only once an image of each of two batches has begun."""
        begun.add(step_of.get(sample["__key__"], 0))
        if len(begun) > 1:
            both_begun.set()
        assert both_begun.wait(60)
        return decoder(sample)

    loader._decoder = waiting
    batches = take(loader, 2)
    assert_equal(batches, take(loader_of(shard_set, "webdataset", global_batch=4), 2))
    loader.close()


def test_memory_of_a_batch_is_used_again_when_nothing_of_it_is_left() -> None:
    memory = BatchMemory((4, 3), num_kept=2)
    lent = [torch.from_numpy(memory.take()) for _ in range(4)]
    addresses = [tensor.data_ptr() for tensor in lent]
    assert len(set(addresses)) == 4
    view = lent[0][1:].view(-1)
    array = lent[1].numpy()[2:]
    lent.clear()
    again = [torch.from_numpy(memory.take()) for _ in range(3)]
    assert {tensor.data_ptr() for tensor in again[:2]} == set(addresses[2:])  # the first two are in use
    assert again[2].data_ptr() not in addresses
    del view, array
    assert torch.from_numpy(memory.take()).data_ptr() in addresses[:2]


def test_memory_that_nobody_has_is_limited() -> None:
    memory = BatchMemory((4, 3), num_kept=2)
    lent = [memory.take() for _ in range(5)]
    kept = [weakref.ref(array.base) for array in lent]
    lent.clear()
    assert sum(reference() is not None for reference in kept) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delivered", [0, 1, 7])
def test_closed_loader_leaves_no_thread_and_batches_stay(shard_set: ShardSet, kind: LoaderKind, delivered: int) -> None:
    before = set(threading.enumerate())
    loader = loader_of(shard_set, kind, num_threads=3)
    pipelines = pipelines_of(loader) if kind == "dali" else []
    kept = take(loader, delivered)
    copies = [Batch(batch.images.clone(), batch.alphas.clone(), batch.indices.clone()) for batch in kept]
    loader.close()
    assert set(threading.enumerate()) <= before  # those of loaders that other tests left may end meanwhile
    assert [pipeline() for pipeline in pipelines] == [None] * (kind == "dali" and delivered > 0)  # nor DALI's threads
    assert_equal(kept, copies)


def pipelines_of(loader: Loader) -> list[weakref.ref[Any]]:
    """The DALI pipelines that a loader makes from now on; one that is gone has ended its threads."""
    make, made = loader._pipeline, []

    def recorded(inputs: Any) -> Any:
        pipeline = make(inputs)
        made.append(weakref.ref(pipeline))
        return pipeline

    loader._pipeline = recorded
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_loader_with_a_broken_image_closes(tmp_path: Path, kind: LoaderKind) -> None:
    files = {"png": png_of(noise(RESOLUTION)), "json": b"{}"}
    samples = [{**files, "png": files["png"][: 40 + number]} for number in range(16)]
    write_encoded_shards(samples, tmp_path / "set", resolution=RESOLUTION, source={})
    before = set(threading.enumerate())
    loader = loader_of(ShardSet.open(tmp_path / "set"), kind, with_alpha=False, num_threads=3)
    with pytest.raises(UserError, match="cannot be decoded"):
        next(loader)
    loader.close()
    assert set(threading.enumerate()) <= before  # those of loaders that other tests left may end meanwhile


@pytest.mark.parametrize("kind", KINDS)
def test_tars_beyond_the_limit_of_open_files_are_read(
    kind: LoaderKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_numbered(tmp_path / "set", 16, 8)
    expected = take(loader_of(ShardSet.open(tmp_path / "set"), "webdataset", with_alpha=False), 4)
    monkeypatch.setattr("data_shards.reading.shard_set._MAX_OPEN_FILES", 3)
    shard_set = ShardSet.open(tmp_path / "set")
    batches = take(loader_of(shard_set, kind, with_alpha=False), 4)
    assert [batch.indices.tolist() for batch in batches] == [batch.indices.tolist() for batch in expected]
    for batch, other in zip(batches, expected, strict=True):
        torch.testing.assert_close(batch.images, other.images, rtol=0, atol=1e-6)
    assert len(shard_set._descriptors) == 3


def test_alphas_of_a_set_without_are_refused(tmp_path: Path) -> None:
    image = np.zeros((RESOLUTION, RESOLUTION, 3), np.uint8)
    write_shards([Sample(image)] * 8, tmp_path / "set", resolution=RESOLUTION, source={})
    shard_set = ShardSet.open(tmp_path / "set")
    assert not shard_set.has_alpha
    with pytest.raises(UserError, match="has no alphas"):
        loader_of(shard_set, "webdataset")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda png: png[: len(png) // 2], "cannot be decoded"),
        (lambda png: png_of(noise(8)), "is 8x8 px in a set of 16 px"),
    ],
    ids=["broken", "other size"],
)
def test_bad_picture_is_named(tmp_path: Path, kind: LoaderKind, damage: Callable[[bytes], bytes], message: str) -> None:
    files = {"png": png_of(noise(RESOLUTION)), "json": b"{}"}
    samples = [{**files, "png": damage(files["png"])} if number == 5 else files for number in range(8)]
    write_encoded_shards(samples, tmp_path / "set", resolution=RESOLUTION, source={}, samples_per_shard=4)
    loader = loader_of(ShardSet.open(tmp_path / "set"), kind, with_alpha=False)
    for _ in range(2):  # and again, not an end of the iteration
        with pytest.raises(UserError, match=rf"000001\.tar: sample 1.*{message}"):
            next(loader)


def noise(resolution: int) -> Image.Image:
    pixels = np.random.default_rng(1).integers(256, size=(resolution, resolution, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png_of(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tar: tar.unlink(), r"000001\.tar cannot be read \(No such file or directory\)"),
        (lambda tar: tar.write_bytes(tar.read_bytes()[:1024]), r"000001\.tar has been truncated while in use"),
        (lambda tar: tar.write_bytes(bytes(tar.stat().st_size)), r"000001\.tar: sample \d is not where its index says"),
    ],
    ids=["gone", "truncated", "overwritten"],
)
def test_tar_that_changes_under_the_loader_is_named(
    tmp_path: Path, kind: LoaderKind, damage: Callable[[Path], None], message: str
) -> None:
    write_numbered(tmp_path / "set", 16, 2)
    loader = loader_of(ShardSet.open(tmp_path / "set"), kind, with_alpha=False)
    damage(tmp_path / "set" / "000001.tar")
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            next(loader)


def test_picture_that_dali_alone_cannot_decode_is_one_line(tmp_path: Path) -> None:
    """Pillow does without the end of a PNG."""
    pytest.importorskip("nvidia.dali")
    files = {"png": png_of(noise(RESOLUTION))[:-20], "json": b"{}"}
    write_encoded_shards([files] * 8, tmp_path / "set", resolution=RESOLUTION, source={})
    with pytest.raises(UserError, match=r"DALI cannot decode an image of .*/set that Pillow can; rebuild"):
        next(loader_of(ShardSet.open(tmp_path / "set"), "dali", with_alpha=False))


def test_dali_that_is_not_there_is_a_plain_error_and_auto_does_without(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_shards.reading.wds import WebDatasetLoader

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="DALI is not installed; install"):
        loader_of(shard_set, "dali")
    assert isinstance(loader_of(shard_set, "auto"), WebDatasetLoader)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_delivers_what_the_cpu_does_however_far_the_stream_lags(shard_set: ShardSet, kind: LoaderKind) -> None:
    loader = loader_of(shard_set, kind, device="cuda")
    take(loader, 1)
    batches = []
    for _ in range(12):
        torch.cuda._sleep(20_000_000)
        batch = next(loader)
        batches.append(Batch(batch.images * 1, batch.alphas * 1, batch.indices))
        del batch  # its memory may be given out again while the product above is still queued
    torch.cuda.synchronize()
    on_cpu = [Batch(batch.images.cpu(), batch.alphas.cpu(), batch.indices) for batch in batches]
    assert_equal(on_cpu, take(loader_of(shard_set, "webdataset"), 13)[1:], atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quality", [75, 95])
def test_jpeg_on_a_gpu_is_within_four_grey_levels_of_the_cpus(quality: int, tmp_path: Path) -> None:
    """nvJPEG rounds otherwise than libjpeg-turbo."""
    write_pictures(tmp_path, "jpg", {"quality": quality})
    shard_set = ShardSet.open(tmp_path)
    on_gpu, on_cpu = (take(loader_of(shard_set, "dali", device=device), 3) for device in ("cuda", "cpu"))
    for batch, expected in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(batch.images.cpu(), expected.images, rtol=0, atol=4.01 / 127.5)
        torch.testing.assert_close(batch.alphas.cpu(), expected.alphas, rtol=0, atol=1e-6)

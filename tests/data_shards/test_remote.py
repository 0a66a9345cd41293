"""Shard sets on URLs: the same images as on disk, through a bounded cache, whatever the network does."""

import functools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from filelock import FileLock
from helpers import RESOLUTION as TRAIN_RESOLUTION
from helpers import TINY, assert_same_bits, flags, train_in_process, write_noise
from remote_readers import read_all, read_when_all_are_ready

from data_shards.building.writer import write_shards
from data_shards.errors import UserError
from data_shards.format.manifest import MANIFEST_NAME, Manifest, ShardRecord
from data_shards.format.sample import Sample
from data_shards.reading.loader import LoaderKind, make_loader
from data_shards.reading.shard_set import ShardSet
from data_shards.remote import directory as remote
from data_shards.remote.cache import ShardCache
from pipeline.config.files import merge
from pipeline.runs.checkpoints import checkpoint_path, load_checkpoint

KINDS = ("dali", "webdataset")
NUM_SAMPLES, SAMPLES_PER_SHARD, RESOLUTION = 22, 4, 16
ENOUGH = 10**9


class Server(ThreadingHTTPServer):
    """Serves a directory, with the failures it is told to make.

    Attributes:
        failures: by file name, those of the requests to come, first one first.
        requests: how often each file was asked for.
        released: ends the requests that stall.
    """

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory = directory
        self.failures: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/set"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = Path(self.path).name
        self.server.requests[name] += 1
        failures = self.server.failures.get(name, [])
        failure = failures.pop(0) if failures else ""
        path = self.server.directory / name
        if failure.isdigit() or not path.exists():
            self.send_error(int(failure or 404))
            return
        content = path.read_bytes()
        self.send_response(200)
        if failure == "wrong":
            content = content[:700] + bytes([content[700] ^ 1]) + content[701:]
        if failure == "short":
            content = content[: len(content) // 2]
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if failure in ("cut", "stall"):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if failure == "stall":
                self.server.released.wait(30)
            self.close_connection = True
            return
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (NUM_SAMPLES, RESOLUTION, RESOLUTION, 3), dtype=torch.uint8, generator=generator)
    samples = (Sample(image.numpy(), image[..., 0].numpy().copy()) for image in images)
    out = tmp_path / "set"
    write_shards(samples, out, resolution=RESOLUTION, source={}, samples_per_shard=SAMPLES_PER_SHARD)
    return out


@pytest.fixture
def server(directory: Path) -> Iterator[Server]:
    yield from serving(directory)


def serving(directory: Path) -> Iterator[Server]:
    server = Server(directory)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def memory_url(directory: Path) -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    memory.put(str(directory), "/bucket/set", recursive=True)
    yield "memory://bucket/set"
    memory.rm("/bucket", recursive=True)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", ENOUGH)


def cache_of_tars(directory: Path, num_tars: int, place: Path) -> ShardCache:
    """With room for so many of a set's tars."""
    return ShardCache(place, num_tars * max(shard.num_bytes for shard in Manifest.read(directory).shards))


def batches(shard_set: ShardSet, kind: LoaderKind, num_steps: int, *, rank: int = 0, world_size: int = 1) -> list[Any]:
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    loader = loader_of(shard_set, kind, rank=rank, world_size=world_size)
    taken = [next(loader) for _ in range(num_steps)]
    loader.close()
    return taken


def loader_of(shard_set: ShardSet, kind: LoaderKind, *, rank: int = 0, world_size: int = 1) -> Any:
    return make_loader(
        kind,
        shard_set,
        global_batch=8,
        rank=rank,
        world_size=world_size,
        seed=5,
        flip=True,
        with_alpha=True,
        device=torch.device("cpu"),
        num_threads=1,
    )


# --- the same as on disk ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", ["memory", "http", "file"])
def test_set_on_a_url_delivers_what_it_does_on_disk(
    kind: LoaderKind, protocol: str, directory: Path, server: Server, memory_url: str, cache: ShardCache
) -> None:
    url = {"memory": memory_url, "http": server.url, "file": f"file://{directory}"}[protocol]
    there, here = ShardSet.open(url, resolution=RESOLUTION, cache=cache), ShardSet.open(directory)
    for name in ("num_samples", "resolution", "has_alpha", "image_extension", "digest", "windows"):
        assert getattr(there, name) == getattr(here, name), name
    for ours, expected in zip(batches(there, kind, 5), batches(here, kind, 5), strict=True):
        assert torch.equal(ours.indices, expected.indices)
        assert torch.equal(ours.images, expected.images) and torch.equal(ours.alphas, expected.alphas)
    there.close()
    here.close()


def test_each_tar_is_fetched_once_and_kept_for_the_next_run(server: Server, directory: Path, cache: ShardCache) -> None:
    expected = read_all(str(directory), cache)
    assert read_all(server.url, cache) == expected
    assert read_all(server.url, cache) == expected
    tars = {path.name for path in directory.glob("*.tar")}
    assert {name: server.requests[name] for name in tars} == dict.fromkeys(tars, 1)
    assert server.requests.keys() == tars | {MANIFEST_NAME}


def test_processes_that_share_a_cache_fetch_each_tar_once(server: Server, directory: Path, cache: ShardCache) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, digests = context.Barrier(3), context.Queue()
    arguments = (server.url, cache, barrier, digests)
    processes = [context.Process(target=read_when_all_are_ready, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = {digests.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert found == {read_all(str(directory), cache)}
    assert {server.requests[path.name] for path in directory.glob("*.tar")} == {1}


def test_training_on_a_url_ends_with_the_bits_of_training_on_disk(tmp_path: Path) -> None:
    data = write_noise(tmp_path / "data", TRAIN_RESOLUTION)
    states = []
    for server in serving(data):
        for name, location in (("disk", str(data)), ("url", server.url)):
            overrides = {"steps": 2, "data": location, "run_dir": name, "cache_dir": tmp_path / "cache"}
            outcome = train_in_process(tmp_path, *flags(merge(TINY, overrides)))
            assert outcome.code == 0, outcome.err
            states.append(load_checkpoint(checkpoint_path(tmp_path / name / "checkpoints", 2)))
    for part in ("discriminator", "generator", "loader"):
        assert_same_bits(states[1][part], states[0][part])


# --- what may go wrong ---


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        *(("000002.tar", failure) for failure in ("500", "503", "429", "408", "cut", "short", "wrong")),
        *((MANIFEST_NAME, failure) for failure in ("500", "503", "429", "408", "cut")),
    ],
)
def test_what_fails_by_accident_is_tried_again(
    name: str, failure: str, server: Server, directory: Path, cache: ShardCache
) -> None:
    server.failures[name] = [failure] * (remote.ATTEMPTS - 1)
    assert read_all(server.url, cache) == read_all(str(directory), cache)
    assert server.requests[name] == remote.ATTEMPTS


@pytest.mark.parametrize(
    ("failure", "num_requests", "words"),
    [
        ("500", remote.ATTEMPTS, ("cannot be fetched", "500", "connection")),
        ("cut", remote.ATTEMPTS, ("cannot be fetched", "connection")),
        ("short", remote.ATTEMPTS, ("bytes where its manifest says", "upload")),
        ("wrong", remote.ATTEMPTS, ("sha256", "where its manifest says", "upload")),
        ("404", 1, ("does not exist", "URL")),
        ("403", 1, ("is refused", "403", "credentials")),
    ],
)
def test_what_fails_for_good_is_one_line_that_names_it(
    failure: str, num_requests: int, words: tuple[str, ...], server: Server, cache: ShardCache
) -> None:
    server.failures["000002.tar"] = [failure] * 99
    with pytest.raises(UserError) as refusal:
        read_all(server.url, cache)
    for word in (f"{server.url}/000002.tar", *words):
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert server.requests["000002.tar"] == num_requests


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere", r"memory://nowhere/manifest\.json does not exist; check the URL"),
        ("http://127.0.0.1:9/set", r"http://127\.0\.0\.1:9/set/manifest\.json cannot be fetched, \d attempts failed"),
        ("s3://bucket/set", r"s3://bucket/set needs a package: pip install s3fs"),
        ("what://ever", r"what://ever cannot be opened \(Protocol not known: what\)"),
    ],
)
def test_url_that_leads_nowhere_is_one_line(
    url: str, message: str, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=message):
        ShardSet.open(url, cache=cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:50], "cannot be read"),
        (lambda text: text.replace('"000001.tar"', '"../escape.tar"'), "not named"),
        (lambda text: text.replace('"000001.tar"', '"000009.tar"'), "order of their names"),
        (lambda text: text.replace('"num_samples": 22', '"num_samples": 23'), "do not add up"),
        (lambda text: text.replace('"sha256": "', '"sha256": "../'), "no sha256"),
    ],
)
def test_damaged_manifest_on_a_url_is_refused_by_its_url(
    change: Callable[[str], str], message: str, server: Server, directory: Path, cache: ShardCache
) -> None:
    path = directory / MANIFEST_NAME
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message) as refusal:
        ShardSet.open(server.url, cache=cache)
    assert f"{server.url}/manifest.json" in str(refusal.value)


@pytest.mark.parametrize("loader", KINDS)
def test_tar_that_is_gone_ends_training_with_one_line_and_code_2(loader: str, tmp_path: Path) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    data = write_noise(tmp_path / "data", TRAIN_RESOLUTION)
    for server in serving(data):
        server.failures["000000.tar"] = ["404"]
        overrides = {"data": server.url, "run_dir": "run", "cache_dir": tmp_path / "cache", "loader": loader}
        outcome = train_in_process(tmp_path, *flags(merge(TINY, overrides)))
        assert outcome.code == 2, outcome.err
        assert outcome.errors == [
            f"error: {server.url}/000000.tar does not exist; check the URL, or upload the whole set again"
        ]
        assert "Traceback" not in outcome.err


# --- sets larger than the cache ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_larger_set_comes_once_an_epoch_through_a_cache_that_stays_bounded(
    kind: LoaderKind, world_size: int, server: Server, directory: Path, tmp_path: Path
) -> None:
    cache = cache_of_tars(directory, 4, tmp_path / "cache")
    shard_sets = [ShardSet.open(server.url, cache=cache) for _ in range(world_size)]
    assert shard_sets[0].windows is not None and shard_sets[0].windows.per_window == 2
    loaders = [loader_of(s, kind, rank=rank, world_size=world_size) for rank, s in enumerate(shard_sets)]
    orders = []
    for _ in range(3):
        seen: list[int] = []
        for _ in range(loaders[0].steps_per_epoch):
            for loader in loaders:
                seen += next(loader).indices.tolist()
                with FileLock(tmp_path / "cache" / "room.lock"):  # under which tars go
                    kept = [path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")]
                assert 0 < sum(kept) <= cache.max_bytes
        assert len(seen) == len(set(seen)) == NUM_SAMPLES // 8 * 8
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]
    for loader, shard_set in zip(loaders, shard_sets, strict=True):
        loader.close()
        shard_set.close()


def test_larger_set_resumes_exactly_with_another_number_of_ranks(
    server: Server, directory: Path, tmp_path: Path
) -> None:
    shard_set = ShardSet.open(server.url, cache=cache_of_tars(directory, 4, tmp_path / "cache"))
    loader = loader_of(shard_set, "webdataset")
    for _ in range(3):
        next(loader)
    state, expected = loader.state_dict(), next(loader)
    found = {}
    for rank in range(2):
        resumed = loader_of(shard_set, "webdataset", rank=rank, world_size=2)
        resumed.load_state_dict(state)
        batch = next(resumed)
        found |= dict(zip(batch.indices.tolist(), batch.images, strict=True))
        resumed.close()
    assert found.keys() == set(expected.indices.tolist())
    for index, image in zip(expected.indices.tolist(), expected.images, strict=True):
        assert torch.equal(found[index], image)
    whole = ShardSet.open(server.url, cache=ShardCache(tmp_path / "cache", ENOUGH))
    with pytest.raises(UserError, match="its shards_per_window is 2, but None"):
        loader_of(whole, "webdataset").load_state_dict(state)
    whole.close()
    loader.close()
    shard_set.close()


def test_next_window_is_fetched_before_it_is_needed(server: Server, directory: Path, tmp_path: Path) -> None:
    shard_set = ShardSet.open(server.url, cache=cache_of_tars(directory, 2, tmp_path / "cache"))
    assert shard_set.windows is not None and shard_set.windows.per_window == 1
    shard_set.expect((3, 1))
    wait_until(lambda: len(list((tmp_path / "cache").glob("*.tar"))) == 2)
    asked = {name for name in server.requests if name.endswith(".tar")}
    assert asked == {"000003.tar", "000001.tar"}
    shard_set.close()


def test_cache_without_room_for_two_tars_is_refused(server: Server, directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no room for two; give it more"):
        ShardSet.open(server.url, cache=cache_of_tars(directory, 1, tmp_path / "cache"))


# --- the cache itself ---


def record(letter: str, num_bytes: int = 100) -> ShardRecord:
    return ShardRecord(f"{letter}.tar", 1, num_bytes, letter * 64)


def kept(cache: Path) -> str:
    return "".join(sorted(path.name[0] for path in cache.glob("*.tar")))


def take(cache: ShardCache, shard: ShardRecord) -> None:
    os.close(cache.open(shard, lambda path: path.write_bytes(bytes(shard.num_bytes)) and None, threading.Event()))


def test_least_recently_used_tar_goes_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 300)
    for letter, expected in (("a", "a"), ("b", "ab"), ("c", "abc"), ("a", "abc"), ("d", "acd"), ("b", "abd")):
        take(cache, record(letter))
        time.sleep(0.002)  # the order is that of time stamps
        assert kept(tmp_path) == expected
    take(cache, record("e", 250))
    assert kept(tmp_path) == "e"


def test_open_tar_can_be_read_after_it_went(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 100)
    descriptor = cache.open(record("a"), lambda path: path.write_bytes(b"a" * 100) and None, threading.Event())
    take(cache, record("b"))
    assert kept(tmp_path) == "b" and os.pread(descriptor, 200, 0) == b"a" * 100
    os.close(descriptor)


def test_failed_fetch_leaves_nothing_and_takes_no_room(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 100)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        cache.open(record("a"), fail, threading.Event())
    assert not list(tmp_path.glob("*.partial"))
    take(cache, record("b"))


def test_what_is_being_fetched_counts(tmp_path: Path) -> None:
    """Room for two: the third waits until one of them is there, and replaces it."""
    cache, begun, go_on = ShardCache(tmp_path, 200), threading.Barrier(3), threading.Event()

    def slow(path: Path, shard: ShardRecord) -> None:
        begun.wait(10)
        go_on.wait(10)
        path.write_bytes(bytes(shard.num_bytes))

    def fetch_slowly(shard: ShardRecord) -> None:
        os.close(cache.open(shard, functools.partial(slow, shard=shard), threading.Event()))

    threads = [threading.Thread(target=fetch_slowly, args=(record(letter),)) for letter in "ab"]
    threads.append(threading.Thread(target=take, args=(cache, record("c"))))
    for thread in threads[:2]:
        thread.start()
    begun.wait(10)
    threads[2].start()
    threads[2].join(0.3)
    assert threads[2].is_alive() and kept(tmp_path) == ""
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(kept(tmp_path)) == 2 and "c" in kept(tmp_path)


def test_killed_fetch_leaves_no_lock_and_no_half_tar(server: Server, directory: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a transfer."""
    cache = cache_of_tars(directory, 2, tmp_path / "cache")
    tars = sorted(directory.glob("*.tar"))
    server.failures = {path.name: ["stall"] for path in tars}
    process = multiprocessing.get_context("spawn").Process(target=read_all, args=(server.url, cache))
    process.start()
    wait_until(lambda: bool(list((tmp_path / "cache").glob("*.partial"))))
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert list((tmp_path / "cache").glob("*.partial"))
    server.failures.clear()
    assert read_all(server.url, cache) == read_all(str(directory), cache)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_cache_that_cannot_be_made_is_one_line(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/cache cannot be made \(.*\); choose another cache"):
        read_all(server.url, ShardCache(tmp_path / "file" / "cache", ENOUGH))


@pytest.mark.parametrize("failure", ["500", "stall"])
def test_closing_ends_what_is_being_fetched(
    failure: str, server: Server, directory: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the wait between two attempts, and, at the next bytes, in a transfer; none is tried again."""
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 60.0)
    tars = [path.name for path in directory.glob("*.tar")]
    server.failures = {name: [failure] * 99 for name in tars}
    shard_set, other = (ShardSet.open(server.url, cache=cache) for _ in range(2))  # the other one waits for the first
    wait_until(lambda: sum(server.requests[name] for name in tars) >= 4)
    threading.Timer(0.2, server.released.set).start()
    other.close()
    shard_set.close()
    assert {server.requests[name] for name in tars} <= {0, 1}


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_copy_of_a_set_needs_no_second_fetch(
    server: Server, directory: Path, cache: ShardCache, tmp_path: Path
) -> None:
    """A tar is known by its content."""
    read_all(server.url, cache)
    shutil.copytree(directory, tmp_path / "copy")
    for other in serving(tmp_path / "copy"):
        read_all(other.url, cache)
        assert set(other.requests) == {MANIFEST_NAME}

"""Training on remote data gives the batches of training on local data, whatever the server, the cache or the disk
do."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import multiprocessing.process
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bfsys.config import Config
from bfsys.data.storage.prefetch import Prefetcher
from bfsys.data.storage.remote import Cache, RemoteFile
from bfsys.data.storage.shards import open_dataset
from bfsys.data.streaming import loader, shard_files
from bfsys.data.streaming.datasets import make_plan, open_evaluation, open_training, source_names
from bfsys.data.streaming.loader import evaluation_rounds, training_batches
from bfsys.data.streaming.plan import MicroBatch, lanes_of_rank
from bfsys.data.streaming.quarantine import BadSample, Quarantine
from bfsys.data.streaming.reader import ShardReader
from bfsys.data.streaming.run_data import open_run_data
from bfsys.dist import Ranks
from bfsys.errors import UserError
from tests.data.conftest import config_of, eventually, path_of, read_by
from tests.data.http_server import FaultyServer
from tests.data.packed import rank

ALONE = Ranks()
STEPS = 8
ATTEMPTS = 3
# (lanes, samples of a step) for 13 + 9 shards: fewer lanes than shards, and more
FEW_LANES, MANY_LANES = (4, 16), (32, 64)
forked = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Cache.__init__.__kwdefaults__, "back_off_s", 0.01)


class Watched(Prefetcher):
    """Fetches files one by one, in the order of the requests."""

    made: list[Watched]

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache, threads=1)
        self.made.append(self)

    def drain(self) -> None:
        eventually(lambda: not self._wanted)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    """The prefetchers of all loaders. They end after they have fetched all requested files: see `training`."""
    monkeypatch.setattr(Watched, "made", [], raising=False)
    monkeypatch.setattr(loader, "Prefetcher", Watched)
    return Watched.made


def content(batch) -> tuple:
    return tuple(x.numpy().tobytes() for x in (batch.sources, batch.samples, batch.labels, batch.offsets, batch.data))


def training(
    config: Config, ranks: Ranks = ALONE, first_step: int = 0, quarantine: Quarantine | None = None
) -> list[tuple]:
    """The micro-batches of a rank."""
    sources = open_training(config)
    plan = make_plan(config, sources)
    batches = training_batches(config, sources, plan, ranks, first_step=first_step, quarantine=quarantine)
    count = (config.train.steps - first_step) * plan.lanes // ranks.world_size
    got = [content(batch) for batch in itertools.islice(batches, count)]
    for prefetcher in getattr(Watched, "made", ()):
        prefetcher.drain()
    batches.close()
    return got


def evaluation(config: Config, ranks: Ranks = ALONE) -> list[tuple]:
    sources = open_evaluation(config, "val", open_training(config).classes)
    return [(content(batch), counts) for batch, counts in evaluation_rounds(config, sources, ranks, Quarantine(), 0)]


def tars(server: FaultyServer) -> dict[str, int]:
    """The number of requests for each shard by name, in the order of the first requests."""
    return {path: count for path, count in server.requests.items() if path.endswith(".tar")}


@pytest.mark.parametrize(
    ("scheme", "workers", "shape"),
    [("http", 0, FEW_LANES), ("http", 2, MANY_LANES), ("pipe", 0, MANY_LANES), ("pipe", 2, FEW_LANES)],
)
def test_batches_are_those_of_the_folder(
    served: FaultyServer, packed: Path, tmp_path: Path, scheme: str, workers: int, shape: tuple[int, int]
) -> None:
    change = [f"data.workers={workers}", f"data.lanes={shape[0]}", f"data.batch_samples={shape[1]}"]
    local = config_of(tmp_path, packed / "a", packed / "b", *change)
    places = [f"pipe:cat {packed}/{n}/{{file}}" if scheme == "pipe" else f"{served.url}/{n}" for n in "ab"]
    remote = config_of(tmp_path, *places, *change)
    assert source_names(remote) == ["a", "b"]
    plans = [make_plan(config, open_training(config)) for config in (local, remote)]
    assert plans[0].facts == plans[1].facts
    expected = training(local)
    assert len(expected) == STEPS * shape[0]
    assert training(remote) == expected  # with an empty cache
    assert training(remote, first_step=5) == expected[5 * shape[0] :]  # with much in the cache
    fresh = config_of(tmp_path, *places, *change, f"data.cache_dir={tmp_path / 'fresh'}")
    assert training(fresh, first_step=5) == expected[5 * shape[0] :]
    assert evaluation(remote) == evaluation(local)
    assert not list((tmp_path / "cache").glob("*.lock"))
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_cache_that_is_too_small_costs_time_only(
    served: FaultyServer, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_files, "OPEN_SHARDS", 2)
    change = ["train.steps=3", f"data.cache_gb={90_000 / 1e9}"]  # three or four shards
    expected = training(config_of(tmp_path, packed / "a", packed / "b", *change))
    remote = config_of(tmp_path, f"{served.url}/a", f"{served.url}/b", *change)
    assert training(remote) == expected
    assert sum(count > 1 for count in tars(served).values()) > 3
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 90_000


def test_the_ranks_of_a_node_fetch_every_shard_once(
    served: FaultyServer, packed: Path, tmp_path: Path, watched: list[Watched]
) -> None:
    expected = training(config_of(tmp_path, packed / "a", packed / "b"))
    remote = config_of(tmp_path, f"{served.url}/a", f"{served.url}/b")
    connections = [forked.Pipe(duplex=False) for _ in range(4)]

    def work(number: int) -> None:
        connections[number][1].send(training(remote, rank(number, 4)))

    processes = [forked.Process(target=work, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    got = [receive.recv() for receive, _ in connections]
    for process in processes:
        process.join()
    assert [batch for step in zip(*got, strict=True) for batch in step] == expected
    assert len(tars(served)) == 22
    assert {count for path, count in served.requests.items() if not path.endswith(".json")} == {1}


def test_shards_are_asked_for_in_the_order_of_need(
    served: FaultyServer, packed: Path, tmp_path: Path, watched: list[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefetcher uses this order too, so shards are in the cache when they are read, if there was enough time."""
    want = Watched.want
    monkeypatch.setattr(Watched, "want", lambda self, items: (want(self, items), self.drain()))
    remote = config_of(tmp_path, f"{served.url}/a", None, "data.shuffle_block=4", "train.steps=7")
    plan = make_plan(remote, open_training(remote))
    training(remote)
    (prefetcher,) = watched
    assert len(list(prefetcher._cache.folder.glob("*.tar"))) == len(tars(served))
    # A lane has 4 samples in a step and 4 in a block, so every step is a block.
    needed_at = {}
    for step, lane in itertools.product(range(remote.train.steps), range(plan.lanes)):
        for path in read_by(plan, range(step, step + 1), range(lane, lane + 1)):
            needed_at.setdefault(path, step)
    steps = [needed_at.get(path, remote.train.steps) for path in tars(served)]
    assert steps[: len({path_of(plan, *plan.shards_ahead(0, lane)[0]) for lane in range(plan.lanes)})][-1] == 0
    assert all(step >= max(steps[: i + 1]) - 1 for i, step in enumerate(steps)), steps  # with the next block


def test_workers_are_forked_before_the_prefetcher_runs(
    served: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forked processes would inherit the locks that its threads hold."""
    start, threads = multiprocessing.process.BaseProcess.start, []

    def watch(process: multiprocessing.process.BaseProcess) -> None:
        threads.append([thread.name for thread in threading.enumerate()])
        start(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", watch)
    remote = config_of(tmp_path, f"{served.url}/a", None, "data.workers=2", "train.steps=2")
    sources = open_training(remote)
    batches = training_batches(remote, sources, make_plan(remote, sources), ALONE, first_step=0)
    next(batches)
    assert "prefetch" in [thread.name for thread in threading.enumerate()]
    batches.close()
    assert len(threads) == 2
    assert not any("prefetch" in names for names in threads)


def test_local_datasets_are_not_cached(served: FaultyServer, packed: Path, tmp_path: Path, watched: list) -> None:
    mixed = config_of(tmp_path, packed / "a", f"{served.url}/b")
    assert training(mixed) == training(config_of(tmp_path, packed / "a", packed / "b"))
    cached = {path.name.partition("-")[2] for path in (tmp_path / "cache").iterdir()}
    assert cached
    assert all(name.startswith("b-") for name in cached)


def test_names_of_sources_show_no_secret(tmp_path: Path) -> None:
    for location in (
        "https://me:pw@host/x/a?sig=secret/secret",
        "pipe:curl -H 'Auth: secret/secret' https://host/x/a/{file}?sig=secret/secret",
        "pipe:aws s3 cp s3://bucket/a/{file} - --profile secret/secret",
        "pipe:ssh host 'cat /x/a/{file}'",
    ):
        assert source_names(config_of(tmp_path, location)) == ["a"]


def test_a_server_that_fails_now_and_then(
    served: FaultyServer, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Cache.__init__.__kwdefaults__, "stall_s", 4.0)
    faults = [["503"] * 4, ["wrong"], ["reset", "truncate"], ["unsized", "503"], ["wrong", "503", "reset"]]
    for path, script in zip(sorted(served.files), itertools.cycle(faults), strict=False):
        served.fail(path, script if not path.endswith(".json") else ["503", "reset"])  # dataset.json has no checksum
    served.fail("/a/a-train-000003.tar", ["stall"])
    expected = training(config_of(tmp_path, packed / "a", packed / "b"))
    quarantine = Quarantine()
    patient = config_of(tmp_path, f"{served.url}/a", f"{served.url}/b", "data.fetch_tries=9")
    assert training(patient, quarantine=quarantine) == expected
    assert not quarantine.news
    assert sum(served.requests.values()) > len(served.requests) + 20


def test_an_unreachable_server_is_reported(served: FaultyServer, tmp_path: Path) -> None:
    remote = config_of(tmp_path, f"{served.url}/a")
    sources = open_training(remote)
    served.stop()
    with pytest.raises(UserError, match=rf"{served.url}/a/dataset\.json: could not be fetched in 3 tries"):
        open_run_data(remote, ALONE)
    for workers in (0, 2):
        config = replace(remote, data=replace(remote.data, workers=workers))
        quarantine = Quarantine()
        batches = training_batches(
            config, sources, make_plan(config, sources), ALONE, first_step=0, quarantine=quarantine
        )
        with pytest.raises(UserError, match=rf"{served.url}/a/a-train-\d+\.tar: could not be fetched in 3 tries"):
            next(batches)
        assert not quarantine.news


def test_a_server_that_has_lost_its_files_makes_no_sample_bad(served: FaultyServer, tmp_path: Path) -> None:
    """It answers 404 for everything, as a web server does whose disk is not mounted."""
    remote = config_of(tmp_path, f"{served.url}/a")
    sources, quarantine = open_training(remote), Quarantine()
    plan = make_plan(remote, sources)
    served.files.clear()
    with pytest.raises(UserError, match=r"its dataset\.json cannot be fetched either: start again") as error:
        list(training_batches(remote, sources, plan, ALONE, first_step=0, quarantine=quarantine))
    assert error.value.exit_code == 1
    assert not quarantine.news


def test_a_dataset_that_was_packed_again_on_its_server_makes_no_sample_bad(
    served: FaultyServer, tmp_path: Path
) -> None:
    remote = config_of(tmp_path, f"{served.url}/a")
    sources, quarantine = open_training(remote), Quarantine()
    plan = make_plan(remote, sources)
    served.files |= {path: content[::-1] for path, content in served.files.items() if path.endswith(".tar")}
    description = json.loads(served.files["/a/dataset.json"])
    served.files["/a/dataset.json"] = json.dumps(description | {"notes": ["of the new files"]}).encode()
    with pytest.raises(UserError, match=r"/a: was packed again while the run trains on it") as error:
        list(training_batches(remote, sources, plan, ALONE, first_step=0, quarantine=quarantine))
    assert error.value.exit_code == 2
    assert not quarantine.news


def found(quarantine: Quarantine) -> set[BadSample]:
    return {row._replace(reason="") for row in quarantine._found}


@pytest.mark.parametrize("damage", ["wrong", "404"])
def test_a_shard_that_is_damaged_where_it_comes_from(
    served: FaultyServer, packed: Path, tmp_path: Path, damage: str
) -> None:
    """Its samples are replaced like those of a damaged local shard, on every rank and in every replay."""
    local = config_of(tmp_path, shutil.copytree(packed / "a", tmp_path / "a"))
    whole = training(local)
    lost = Path(sorted(read_by(make_plan(local, open_training(local)), range(1), range(4)))[0]).name
    (tmp_path / "a" / lost).unlink()
    expected_bad = Quarantine()
    expected = training(local, quarantine=expected_bad)
    assert expected != whole
    remote = config_of(tmp_path, f"{served.url}/a")
    if damage == "wrong":
        served.fail(f"/a/{lost}", itertools.repeat("wrong"))
    else:
        del served.files[f"/a/{lost}"]
    alone = Quarantine()
    assert training(remote, quarantine=alone) == expected
    assert found(alone) == found(expected_bad) != set()
    reason = {"wrong": "sha256 of the", "404": "HTTP status 404"}[damage]
    assert all("its shard could not be fetched intact" in row.reason and reason in row.reason for row in alone._found)
    # The reader tries once, and the prefetcher when a lane comes near. There is no try for every sample.
    assert served.requests[f"/a/{lost}"] <= ATTEMPTS * 5
    shared = [Quarantine() for _ in range(2)]
    halves = [training(remote, rank(n, 2), quarantine=shared[n]) for n in range(2)]
    steps = [half[2 * step : 2 * step + 2] for step in range(STEPS) for half in halves]
    assert list(itertools.chain(*steps)) == expected
    assert found(shared[0]) | found(shared[1]) == found(alone)
    by_workers = Quarantine()
    changed = replace(remote, data=replace(remote.data, workers=2))
    assert training(changed, quarantine=by_workers) == expected
    known = Quarantine()
    known._take(sorted(alone._found))
    assert training(remote, first_step=3, quarantine=known) == expected[3 * 4 :]


def damage_cached(folder: Path, file: str, position: int) -> None:
    """Damage a cached file in place, like a disk error, while other processes may have it open."""
    (path,) = folder.glob(f"*-{file}")
    with open(path, "r+b") as cached:
        cached.seek(position)
        byte = cached.read(1)[0]
        cached.seek(position)
        cached.write(bytes([byte ^ 0x40]))


def test_a_cached_shard_that_is_damaged_is_fetched_again(
    served: FaultyServer, packed: Path, tmp_path: Path, watched: list
) -> None:
    remote = config_of(tmp_path, f"{served.url}/a")
    expected = training(remote)
    sources = open_training(remote)
    (split,) = sources.splits
    first, second = np.flatnonzero(split.samples["shard"] == 2)[:2].tolist()
    file = split.shards[2].file

    def batch_of(sample: int) -> MicroBatch:
        return MicroBatch(np.zeros(1, np.int64), np.array([sample]), np.zeros(1, np.int64))

    readers = [ShardReader(sources) for _ in range(3)]
    for one in readers:
        one.read(batch_of(first))
    damage_cached(tmp_path / "cache", file, int(split.samples["offset"][second]))
    for one in readers:  # all have the damaged file open; the first one replaces it
        fetched = one.read(batch_of(second))
        assert not fetched.bad
        one.close()
    assert served.requests[f"/a/{file}"] == 2
    damage_cached(tmp_path / "cache", file, int(split.samples["offset"][second]))
    quarantine = Quarantine()
    assert training(remote, quarantine=quarantine) == expected
    assert not quarantine.news
    assert served.requests[f"/a/{file}"] == 3
    assert {count for path, count in tars(served).items() if not path.endswith(file)} == {1}


@pytest.mark.parametrize(
    ("file", "position"), [("a-train.samples.npy", 1000), ("a-train.samples.npy", 3), ("a-train.keys.npy", 500)]
)
def test_a_cached_index_that_is_damaged_is_fetched_again(
    served: FaultyServer, tmp_path: Path, file: str, position: int
) -> None:
    remote = config_of(tmp_path, f"{served.url}/a")
    expected = open_training(remote).splits[0].samples.copy()
    damage_cached(tmp_path / "cache", file, position)
    for part in range(2):  # also if another rank verifies the damaged rows
        training = open_run_data(remote, rank(part, 2)).training
        assert np.array_equal(training.splits[0].samples, expected)
        assert training.splits[0].damaged_index(range(len(training.splits[0].shards))) == []
    assert served.requests[f"/a/{file}"] == 2
    damage_cached(tmp_path / "cache", file, position)
    served.stop()
    with pytest.raises(UserError, match="could not be fetched"):
        open_training(remote)


def test_an_index_that_is_evicted_before_it_is_opened_is_fetched_again(
    served: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run in the same cache may evict it."""
    fetch, evictions = Cache.fetch, iter([True, False, True, True, False])

    def fetch_and_evict(cache: Cache, file: RemoteFile) -> Path:
        path = fetch(cache, file)
        if next(evictions):
            path.unlink()
        return path

    monkeypatch.setattr(Cache, "fetch", fetch_and_evict)
    cache = Cache(tmp_path / "cache", 10**6)
    assert len(open_dataset(f"{served.url}/a", cache).open("train")) == 120
    assert list(evictions) == []


def test_a_cache_that_is_smaller_than_a_shard_is_refused_at_the_start(served: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a-train-\d+\.tar: has 30,720 bytes, and the cache .* may hold 30,000; raise"):
        open_training(config_of(tmp_path, f"{served.url}/a", None, "data.cache_gb=0.00003"))


def test_an_index_that_is_damaged_where_it_comes_from_is_an_error(
    served: FaultyServer, packed: Path, tmp_path: Path
) -> None:
    remote = config_of(tmp_path, f"{served.url}/a")
    description = json.loads((packed / "a" / "dataset.json").read_text())
    description["splits"]["train"]["shards"][0]["index_xxh3"] = "0" * 16
    served.files["/a/dataset.json"] = json.dumps(description).encode()
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{served.url}/a: the index of 'train' is damaged"):
            open_run_data(remote, ALONE)


def test_a_node_fetches_what_its_lanes_read(
    served: FaultyServer, packed: Path, tmp_path: Path, watched: list[Watched]
) -> None:
    """Eight nodes read one epoch, each with its own cache. The plan decides which shards a node requests, and when."""
    nodes = 8
    change = [f"data.lanes={nodes}", "data.batch_samples=24", "data.shuffle_block=8", "train.steps=5"]
    fetched = read = 0
    for node in range(nodes):
        remote = config_of(tmp_path, f"{served.url}/a", None, *change, f"data.cache_dir={tmp_path / f'node{node}'}")
        plan = make_plan(remote, open_training(remote))
        assert remote.train.steps * plan.batch_samples == len(plan.splits[0])
        steps, lanes = range(remote.train.steps), lanes_of_rank(plan.lanes, node, nodes)
        read_here = read_by(plan, steps, lanes)
        ahead = {path_of(plan, *shard) for step in steps for lane in lanes for shard in plan.shards_ahead(step, lane)}
        served.requests.clear()
        training(remote, rank(node, nodes))
        assert tars(served) == dict.fromkeys(ahead, 1)
        assert read_here <= ahead
        fetched, read = fetched + len(ahead), read + len(read_here)
    shards = len(plan.splits[0].shards)
    assert shards <= read <= shards + nodes - 1  # neighbouring slices share at most the shard at their border
    assert read <= fetched <= read + 2 * nodes  # the rest are the first shards of the next epoch


def test_nodes_share_the_shards_of_an_evaluation(served: FaultyServer, tmp_path: Path) -> None:
    """Otherwise each node would fetch the whole split."""
    nodes = 4
    for node in range(nodes):
        change = f"data.cache_dir={tmp_path / f'node{node}'}"
        remote = config_of(tmp_path, f"{served.url}/a", None, "data.eval_batch_bytes=100", change)
        sources = open_evaluation(remote, "train", open_training(remote).classes)
        for _ in evaluation_rounds(remote, sources, rank(node, nodes), Quarantine(), 0):
            pass
    shards = len(sources.splits[0].shards)
    assert shards > 2 * nodes
    assert shards <= sum(tars(served).values()) <= shards + nodes - 1

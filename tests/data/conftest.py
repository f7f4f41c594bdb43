"""Fixtures of the tests of remote files: a server, a cache, and a check for processes left behind."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from bfsys.cli import call
from bfsys.config import Config, load_config
from bfsys.data.storage.remote import Cache, RemoteFile
from bfsys.data.streaming.plan import Plan
from tests.conftest import tiny_config
from tests.data.http_server import FaultyServer

CONTENT = random.Random(0).randbytes(300_000)  # more than a pipe holds
PR_SET_CHILD_SUBREAPER = 36


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def eventually(condition: Callable[[], object]) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + 900
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


@pytest.fixture
def no_orphans() -> Iterator[None]:
    """Check that no test leaves a process behind. During a test, orphans become children of this process."""
    libc = ctypes.CDLL(None)
    before = set(psutil.Process().children())
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield

    def left() -> set[psutil.Process]:
        processes = set(psutil.Process().children(recursive=True)) - before
        for process in processes:
            with suppress(ChildProcessError, psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(process.pid, os.WNOHANG)
        return processes

    eventually(lambda: not left())
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    server = FaultyServer()
    server.files["/x.tar"] = CONTENT
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return make_cache(tmp_path)


def make_cache(tmp_path: Path, limit_bytes: int = 10_000_000, **options: float) -> Cache:
    return Cache(tmp_path / "cache", limit_bytes, **{"attempts": 3, "stall_s": 20.0, "back_off_s": 0.01, **options})


def names(cache: Cache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir())


def put(folder: Path, name: str, size_bytes: int) -> RemoteFile:
    """Write a file that can be fetched."""
    content = random.Random(name).randbytes(size_bytes)
    (folder / name).write_bytes(content)
    return RemoteFile(str(folder / name), sha256(content), size_bytes)


@pytest.fixture(scope="session")
def packed(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trees of `datasets`, packed in shards of several samples."""
    root = tmp_path_factory.mktemp("packed")
    for name in ("a", "b"):
        tree = str(datasets / "trees" / name)
        call("pack", [tree, str(root), "--name", name, "--shard-bytes", "20000", "--workers", "1"])
    return root


def files_of(dataset: Path) -> list[str]:
    return sorted(file.name for file in dataset.iterdir() if file.is_file())


@pytest.fixture
def served(server: FaultyServer, packed: Path) -> FaultyServer:
    for name in ("a", "b"):
        server.files.update(
            {f"/{name}/{file}": (packed / name / file).read_bytes() for file in files_of(packed / name)}
        )
    return server


def config_of(folder: Path, a: str | Path, b: str | Path | None = None, *overrides: str, name: str = "tiny") -> Config:
    """A config that trains on `a` and `b`, with a cache in `folder`."""
    tree = tiny_config(folder, folder)
    tree["data"]["sources"] = [{"path": str(path)} for path in (a, b) if path]
    tree["data"] |= {"cache_dir": str(folder / "cache"), "batch_samples": 16, "fetch_tries": 3}
    tree["train"] |= {"steps": 8, "collective_timeout_s": 900}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_config(path, overrides)


def path_of(plan: Plan, source: int, shard: int) -> str:
    return f"/{plan.splits[source].name}/{plan.splits[source].shards[shard].file}"


def read_by(plan: Plan, steps: range, lanes: range) -> set[str]:
    """The shards that contain the samples of some steps and lanes."""
    return {
        path_of(plan, source, plan.splits[source].samples["shard"][sample])
        for step in steps
        for lane in lanes
        for batch in [plan.micro_batch(step, lane)]
        for source, sample in zip(batch.source.tolist(), batch.sample.tolist(), strict=True)
    }

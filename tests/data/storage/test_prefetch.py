"""Remote files are fetched ahead, in the order of need."""

from __future__ import annotations

from pathlib import Path

import pytest

from bfsys.data.storage.prefetch import Prefetcher
from bfsys.data.storage.remote import Cache, RemoteFile
from tests.data.conftest import CONTENT, eventually, make_cache, names, put, sha256
from tests.data.http_server import FaultyServer

pytestmark = pytest.mark.usefixtures("no_orphans")


def test_prefetch(server: FaultyServer, cache: Cache) -> None:
    files = {f"/{i}.tar": CONTENT[i:] for i in range(4)}
    server.files.update(files)
    items = [RemoteFile(server.url + path, sha256(content), len(content)) for path, content in files.items()]
    server.fail("/0.tar", ["503"] * 3)  # a prefetch gives up silently
    prefetcher = Prefetcher(cache)
    assert not prefetcher._threads
    prefetcher.want(items + items)
    eventually(lambda: not prefetcher._wanted)
    assert len(names(cache)) == 3
    assert server.requests["/0.tar"] == 3
    for file in items:
        assert sha256(cache.fetch(file).read_bytes()) == file.sha256
    assert server.requests == {"/0.tar": 4, "/1.tar": 1, "/2.tar": 1, "/3.tar": 1}
    prefetcher.close()


def test_a_prefetch_queue_is_in_order_and_bounded(tmp_path: Path, cache: Cache) -> None:
    prefetcher = Prefetcher(cache, threads=1, queue_limit=2)
    files = [put(tmp_path, str(i), 10) for i in range(5)]
    prefetcher.want(files)
    eventually(lambda: not prefetcher._wanted)
    assert [
        path.name.rpartition("-")[2] for path in sorted(cache.folder.iterdir(), key=lambda p: p.stat().st_mtime_ns)
    ] == ["0", "1"]
    prefetcher.close()
    prefetcher.want([files[4]])
    assert not prefetcher._wanted


def test_closing_a_prefetcher_ends_its_downloads(server: FaultyServer, tmp_path: Path) -> None:
    cache = make_cache(tmp_path, stall_s=1000)
    server.fail("/x.tar", ["stall"])
    prefetcher = Prefetcher(cache)
    url = f"{server.url}/x.tar"
    prefetcher.want([RemoteFile(url, sha256(CONTENT), len(CONTENT)), RemoteFile("pipe:sleep 1000; true", "0" * 64, 1)])
    assert server.half_sent.wait(900)
    prefetcher.close()
    assert not any(thread.is_alive() for thread in prefetcher._threads)
    assert names(cache) == []
    assert cache.fetch(RemoteFile(url, sha256(CONTENT), len(CONTENT))).read_bytes() == CONTENT

"""Remote files come whole or the error says why not, whatever the server, the disk or another process does."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from bfsys.data.storage import remote
from bfsys.data.storage.prefetch import Prefetcher
from bfsys.data.storage.remote import Cache, RemoteFile, WrongContentError
from bfsys.data.storage.shards import fetch_description
from bfsys.data.storage.streams import TryFailed, url_of
from bfsys.errors import EXIT_STORAGE, UserError
from tests.data.conftest import CONTENT, eventually, make_cache, names, put, sha256
from tests.data.http_server import FaultyServer

pytestmark = pytest.mark.usefixtures("no_orphans")
forked = multiprocessing.get_context("fork")  # a new process would need seconds to import torch


def test_a_file_is_fetched_once(server: FaultyServer, cache: Cache) -> None:
    url = url_of(server.url + "?signature=1", "x.tar")
    path = cache.fetch(RemoteFile(url, sha256(CONTENT), len(CONTENT)))
    assert path.read_bytes() == CONTENT
    assert names(cache) == [f"{sha256(CONTENT)[:16]}-x.tar"]
    assert cache.fetch(RemoteFile(url, sha256(CONTENT), len(CONTENT))) == path
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.fetch(RemoteFile(url, sha256(CONTENT), len(CONTENT))) == path
    assert server.requests["/x.tar"] == 1
    cache.discard(path)
    assert cache.fetch(RemoteFile(url, sha256(CONTENT), len(CONTENT))).read_bytes() == CONTENT
    assert server.requests["/x.tar"] == 2


FAULTS = {
    "503": "HTTP status 503",
    "stall": r"stalled for 1\.5 s after [\d,]+ bytes",
    "truncate": r"ended at 150,000 of 300,000 bytes \(exit status 18: curl: ",
    "unsized": r"ended at 150,000 of 300,000 bytes",
    "reset": r"ended at [\d,]+ of 300,000 bytes \(exit status 56: curl: ",
    "wrong": r"sha256 of the 300,000 bytes differs: [0-9a-f]{64}, not [0-9a-f]{64}",
}


def stall_s(fault: str) -> float:
    return 1.5 if fault == "stall" else 20.0  # so long that a busy machine does not cause a stall


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fetch_recovers_from_faults(server: FaultyServer, tmp_path: Path, fault: str) -> None:
    cache = make_cache(tmp_path, stall_s=stall_s(fault), attempts=9 if fault == "stall" else 3)
    server.fail("/x.tar", [fault, fault] if fault != "stall" else [fault])
    path = cache.fetch(RemoteFile(f"{server.url}/x.tar", sha256(CONTENT), len(CONTENT)))
    assert path.read_bytes() == CONTENT
    assert names(cache) == [path.name]
    assert server.requests["/x.tar"] >= 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fetch_gives_up_and_reports_the_reason(server: FaultyServer, tmp_path: Path, fault: str) -> None:
    server.files["/y.tar"] = CONTENT[::-2]
    other = make_cache(tmp_path).fetch(RemoteFile(f"{server.url}/y.tar", sha256(CONTENT[::-2]), len(CONTENT[::-2])))
    cache = make_cache(tmp_path, stall_s=stall_s(fault), attempts=2)
    server.fail("/x.tar", itertools.repeat(fault))
    url = f"{server.url}/x.tar?signature=secret"
    with pytest.raises(UserError, match=FAULTS[fault]) as caught:
        cache.fetch(RemoteFile(url, sha256(CONTENT), len(CONTENT)))
    assert f"{server.url}/x.tar?***: could not be fetched in 2 tries (1: " in str(caught.value)
    assert "; 2: " in str(caught.value)
    assert "secret" not in str(caught.value)
    assert names(cache) == [other.name]
    assert other.read_bytes() == CONTENT[::-2]


def test_a_file_that_is_longer_than_packed(server: FaultyServer, cache: Cache) -> None:
    with pytest.raises(UserError, match=r"sends more than the 1,000 bytes expected"):
        cache.fetch(RemoteFile(f"{server.url}/x.tar", sha256(CONTENT), 1000))
    assert names(cache) == []


def test_a_server_that_comes_back(server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, failed = make_cache(tmp_path, attempts=20), []
    pause_s = cache._pause_s
    monkeypatch.setattr(cache, "_pause_s", lambda number: failed.append(number) or pause_s(number))
    server.fail("/x.tar", ["die"])
    result: list[Path] = []
    fetching = threading.Thread(
        target=lambda: result.append(cache.fetch(RemoteFile(f"{server.url}/x.tar", sha256(CONTENT), 300_000)))
    )
    fetching.start()
    assert server.dead.wait(900)
    eventually(lambda: len(failed) >= 2)  # the first try, and one while there was no server
    server.start()
    fetching.join()
    assert result[0].read_bytes() == CONTENT
    assert names(cache) == [result[0].name]


def test_small_files(server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = make_cache(tmp_path, stall_s=1.5, attempts=12, back_off_s=0.001)
    server.fail("/x.tar", ["503", "truncate", "reset", "stall"])
    assert patient.read(f"{server.url}/x.tar") == CONTENT
    assert server.requests["/x.tar"] >= 5
    cache = make_cache(tmp_path)
    assert not cache.folder.exists()  # no folder is made for a run with only local data
    with pytest.raises(UserError, match="HTTP status 404; 2: "):
        cache.read(f"{server.url}/typo.json")
    monkeypatch.setattr(remote, "SMALL_FILE_BYTES", 1000)
    with pytest.raises(UserError, match="holds more than 1,000 bytes"):
        cache.read(f"{server.url}/x.tar")


def test_failed_tries_are_printed_while_a_reader_waits(
    server: FaultyServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(tmp_path, attempts=4)
    server.fail("/x.tar", ["503", "wrong", "truncate"])
    url = f"{server.url}/x.tar?signature=secret"
    cache.fetch(RemoteFile(url, sha256(CONTENT), len(CONTENT)))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3
    for number, (line, reason) in enumerate(zip(lines, ["HTTP status 503", "sha256 of", "ended at"], strict=True), 1):
        assert line.startswith(f"{server.url}/x.tar?***: try {number} of 4 failed ({reason}")
        assert re.search(r"\); the next one comes in \d+\.\d s$", line)
    server.fail("/x.tar", itertools.repeat("503"))
    with pytest.raises(UserError, match="could not be fetched in 4 tries"):
        cache.read(url)
    assert len(capfd.readouterr().err.splitlines()) == 3  # the error contains the reason of the last one
    with pytest.raises(UserError, match="could not be fetched in 3 tries"):
        cache.read(f"{server.url}/y.tar")
    assert [line.partition(" failed")[0][-6:] for line in capfd.readouterr().err.splitlines()] == ["1 of 3", "2 of 3"]


@pytest.mark.parametrize(("asked_s", "granted_s"), [(0.0, 0.0), (7.0, 7.0), (10**8, 20.0)])
def test_a_pause_that_a_server_asks_for_is_limited(tmp_path: Path, asked_s: float, granted_s: float) -> None:
    cache, pauses_s = make_cache(tmp_path, stall_s=20.0), []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses_s.append(timeout)
            return False

    def fail() -> None:
        raise TryFailed("HTTP status 429", asked_s)

    with pytest.raises(UserError, match="could not be fetched in 3 tries"):
        cache._try_often("http://host/x.tar", fail, Stop())
    assert pauses_s == [pytest.approx(granted_s, abs=3)] * 2


def test_processes_that_fail_together_do_not_come_back_together(tmp_path: Path) -> None:
    """Otherwise all nodes of a run would retry at the same time, and overload a server that was down for a moment."""
    cache = make_cache(tmp_path, back_off_s=1.0, attempts=9, stall_s=10.0)
    with forked.Pool(8) as pool:
        pauses = pool.map(cache._pause_s, [3] * 64, chunksize=8)
    assert len(set(pauses)) == 64
    assert 3 <= min(pauses) < 3.5
    assert 4.5 < max(pauses) <= 5
    assert cache.patience_s >= 9 * 10 + sum(max(pauses) / 4 * 2**n for n in range(8))


def test_a_reader_does_not_wait_for_the_pauses_of_a_prefetch(
    server: FaultyServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(tmp_path, back_off_s=1000)
    server.fail("/x.tar", ["503"])
    prefetcher = Prefetcher(cache)
    file = RemoteFile(f"{server.url}/x.tar", sha256(CONTENT), len(CONTENT))
    prefetcher.want([file])
    eventually(lambda: server.requests["/x.tar"] == 1)
    assert cache.fetch(file).read_bytes() == CONTENT
    prefetcher.close()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "the answer is empty"),
        (b"\n<!DOCTYPE html>\n<title>Sign in</title>", r"the answer is a web page, .* '\\n<!DOCTYPE html>"),
        (b"<?xml version='1.0'?><Error/>", "the answer is a web page"),
    ],
)
def test_an_answer_that_is_not_the_file_is_shown(
    server: FaultyServer, tmp_path: Path, answer: bytes, said: str
) -> None:
    server.files["/d/dataset.json"] = answer
    with pytest.raises(WrongContentError, match=f"in 3 tries .1: {said}"):
        make_cache(tmp_path, attempts=9).read(f"{server.url}/d/dataset.json")


@pytest.mark.parametrize("encoding", ["gzip", "aws-chunked", "UTF-8"])  # the last two name no compression
def test_a_server_that_compresses_or_says_so(
    server: FaultyServer, cache: Cache, encoding: str, capfd: pytest.CaptureFixture[str]
) -> None:
    server.encoding = encoding
    assert cache.read(f"{server.url}/x.tar") == CONTENT
    assert cache.fetch(RemoteFile(f"{server.url}/x.tar", sha256(CONTENT), len(CONTENT))).read_bytes() == CONTENT
    assert capfd.readouterr().err == ""  # no try has failed


@pytest.mark.parametrize("answer", [b'{"error": "rate limited"}', b'{"form', b"\x1f\x8b\x08\0", b"[]"])
def test_an_answer_that_is_not_a_description_is_fetched_again(
    server: FaultyServer, tmp_path: Path, answer: bytes, packed: Path
) -> None:
    good = (packed / "a" / "dataset.json").read_bytes()
    server.files["/d/dataset.json"] = answer
    cache = make_cache(tmp_path, attempts=9)
    with pytest.raises(WrongContentError, match=r"in 3 tries .1: the answer is not a dataset\.json: ") as error:
        fetch_description(f"{server.url}/d", cache)
    assert "pack the dataset again" not in str(error.value)
    server.files["/d/dataset.json"] = good
    server.fail("/d/dataset.json", ["wrong", "unsized"])
    assert fetch_description(f"{server.url}/d", cache) == json.loads(good)


def test_each_file_is_fetched_once_for_all_processes(server: FaultyServer, cache: Cache) -> None:
    files = {f"/{i}.tar": CONTENT[i:] for i in range(3)}
    server.files.update(files)

    def work(first: int) -> None:
        for i in range(3):
            path, content = list(files.items())[(first + i) % 3]
            got = cache.fetch(RemoteFile(server.url + path, sha256(content), len(content)))
            assert got.read_bytes() == content

    processes = [forked.Process(target=work, args=(i,)) for i in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert server.requests == dict.fromkeys(files, 1)
    assert len(names(cache)) == 3


def test_a_killed_download_is_taken_over(
    server: FaultyServer, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # a killed process leaves curl's error file
    server.fail("/x.tar", ["stall"])
    file = RemoteFile(f"{server.url}/x.tar", sha256(CONTENT), len(CONTENT))
    process = forked.Process(target=cache.fetch, args=(file,))
    process.start()
    assert server.half_sent.wait(900)
    result: list[Path] = []
    waiting = threading.Thread(target=lambda: result.append(cache.fetch(file)))
    waiting.start()
    left = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    waiting.join()
    assert result[0].read_bytes() == CONTENT
    assert names(cache) == [result[0].name]
    assert server.requests["/x.tar"] == 2
    for orphan in left:  # it would end without help, but late
        with suppress(psutil.Error):
            orphan.kill()


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, limit_bytes=1000)
    a, b, c, d = (put(tmp_path, name, 300) for name in "abcd")
    paths = [cache.fetch(file) for file in (a, b, c)]
    assert cache.fetch(a) == paths[0]
    new = cache.fetch(d)
    assert names(cache) == sorted(path.name for path in (paths[0], paths[2], new))
    opened = cache.open(c)
    cache.fetch(put(tmp_path, "e", 1000))
    assert len(names(cache)) == 1
    assert sha256(opened.read()) == c.sha256
    opened.close()


def test_another_process_continues_to_read_an_evicted_file(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, limit_bytes=100_000)
    a = put(tmp_path, "a", 60_000)
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; f = open(sys.argv[1], 'rb'); print(); input(); print(len(f.read()))",
         cache.fetch(a)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as reader:  # fmt: skip
        assert reader.stdout.readline() == "\n"
        cache.fetch(put(tmp_path, "b", 60_000))
        assert len(names(cache)) == 1
        assert reader.communicate("\n")[0] == "60000\n"


def test_open_fetches_an_evicted_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path)
    a = put(tmp_path, "a", 100)
    fetch, evicted = cache.fetch, []

    def evicted_at_once(*args: object, **options: object) -> Path:
        path = fetch(*args, **options)
        if not evicted:
            evicted.append(path.unlink())
        return path

    monkeypatch.setattr(cache, "fetch", evicted_at_once)
    with cache.open(a) as file:
        assert sha256(file.read()) == a.sha256


def test_the_limit_holds_at_every_moment(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, limit_bytes=500_000, attempts=1)
    files = [put(tmp_path, f"{i}.tar", 20_000 * i) for i in range(1, 12)]
    seen: list[int] = []
    errors: list[Exception] = []

    def work(seed: int) -> None:
        for file in random.Random(seed).sample(files, len(files)):
            try:
                with cache.open(file) as opened:
                    assert sha256(opened.read()) == file.sha256
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.append(cache.size_bytes())
        time.sleep(0.001)
    assert not errors
    assert max(seen) <= 500_000
    assert 0 < sum(path.stat().st_size for path in cache.folder.iterdir()) <= 500_000


def test_a_file_larger_than_the_cache(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, limit_bytes=1000)
    kept = cache.fetch(put(tmp_path, "kept", 400))
    large = put(tmp_path, "large.tar", 1001)
    with pytest.raises(UserError, match=r"large\.tar: has 1,001 bytes, .* may hold 1,000; raise data\.cache_gb"):
        cache.fetch(large)
    assert names(cache) == [kept.name]


def test_partial_files_of_killed_processes_are_evicted_first(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, limit_bytes=1000)
    kept = cache.fetch(put(tmp_path, "kept", 400))
    (cache.folder / ("0" * 16 + "-x.tar.part")).write_bytes(bytes(500))
    (cache.folder / "something-else").write_bytes(bytes(5000))
    fetched = cache.fetch(put(tmp_path, "new", 500))
    assert names(cache) == sorted([kept.name, fetched.name, "something-else"])


def test_a_copy_of_another_size_is_fetched_again(tmp_path: Path, cache: Cache) -> None:
    file = put(tmp_path, "a", 100)
    os.truncate(cache.fetch(file), 50)
    assert sha256(cache.fetch(file).read_bytes()) == file.sha256


@pytest.mark.parametrize("times", [1, 2])
def test_a_full_disk(tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    older, old = (cache.fetch(put(tmp_path, name, 300)) for name in ("older", "old"))
    fsync, failures = os.fsync, iter([OSError(errno.ENOSPC, "No space left on device")] * times)

    def full(descriptor: int) -> None:
        for failure in failures:
            raise failure
        fsync(descriptor)

    monkeypatch.setattr(remote.os, "fsync", full)
    new = put(tmp_path, "new", 200)
    if times == 1:
        assert sha256(cache.fetch(new).read_bytes()) == new.sha256
    else:
        with pytest.raises(
            UserError,
            match=r"the disk is full: 200 bytes of \S+new cannot be stored, [\d,]+ bytes are.* Free space or inodes",
        ) as error:
            cache.fetch(new)
        assert error.value.exit_code == EXIT_STORAGE
    assert (older.exists(), old.exists()) == (False, True)


def test_a_cache_that_cannot_be_written(tmp_path: Path, cache: Cache) -> None:
    file = put(tmp_path, "a", 100)
    with pytest.raises(UserError, match=r"the cache cannot be used \(.*point data\.cache_dir"):
        Cache(Path("/dev/null/cache"), 1000).fetch(file)
    assert cache.fetch(file).exists()  # fetched again
    cache.discard(cache.fetch(file))
    cache.folder.rmdir()
    cache.folder.write_bytes(b"")
    with pytest.raises(UserError, match=r"the cache cannot be used \(.*point data\.cache_dir"):
        cache.fetch(file)


def test_a_cache_that_is_removed_during_a_download(tmp_path: Path, cache: Cache, monkeypatch) -> None:
    """A user frees disk space, or the system cleans /tmp."""
    file, really_stream = put(tmp_path, "a", 100), remote.stream

    def stream_once(*arguments):
        monkeypatch.setattr(remote, "stream", really_stream)
        yield from really_stream(*arguments)
        shutil.rmtree(cache.folder)

    monkeypatch.setattr(remote, "stream", stream_once)
    assert cache.fetch(file).read_bytes() == (tmp_path / "a").read_bytes()
    assert names(cache) == [cache.path_of(file).name]

"""One bad file never ends packing: the process that dies of it is replaced, and the file is named."""

import errno
import faulthandler
import io
import multiprocessing
import os
import signal

import numpy as np
import pytest
from PIL import Image

from bfsys.data.media.encodings import Fitting, parse_encoding, reencode
from bfsys.data.packing import shard_jobs, workers
from bfsys.errors import UserError
from tests.commands.packing_helpers import contents, make_files, pack, png_bytes, problems_of

PNG = ("--split", "train", "--encoding", "png", "--shard-bytes", "1K")


def odd_codec(data, encoding, fitting):
    """A codec that crashes on some files."""
    faulthandler.disable()  # pytest's handler
    if data == b"abort":
        os.abort()
    if data == b"kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if data == b"memory":
        raise MemoryError
    if data == b"exit":
        os._exit(3)
    return reencode(data, encoding, fitting)


@pytest.fixture
def src(tmp_path, monkeypatch):
    """Ten pictures, and `odd_codec` in this process and in the workers, which are forked so that they inherit it."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(shard_jobs, "reencode", odd_codec)
    monkeypatch.setattr(workers, "CONTEXT", multiprocessing.get_context("fork"))
    return make_files(tmp_path / "src", {f"{'ab'[i % 2]}/{i}.png": png_bytes(8, 8, i) for i in range(10)})


@pytest.mark.parametrize("count", ["1", "3"])
def test_files_that_abort_the_codec_are_bad_files(src, tmp_path, count):
    make_files(src, {"a/x.png": b"abort", "b/y.png": b"abort", "b/z.png": b"not a picture"})
    message = problems_of(src, tmp_path, *PNG, "--workers", count)
    for name in ("a/x.png", "b/y.png"):
        assert f"{src}/{name}: ends the process that decodes it (signal SIGABRT)" in message
    assert "z.png: cannot be converted to png" in message
    assert "3 bad files" in message
    dataset = pack(src, tmp_path, *PNG, "--workers", count, "--skip-bad")
    assert len(contents(dataset)) == 10
    assert len((dataset / "skipped.txt").read_text().splitlines()) == 3


def test_a_process_that_cannot_start_its_thread_says_so(src, tmp_path, monkeypatch):
    def refuse():
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(workers, "_exit_with_parent", refuse)
    message = problems_of(src, tmp_path, *PNG, "--workers", "2")
    assert "a thread of a process that writes shards cannot be started; raise the limit of processes" in message


def test_a_single_shard_is_decoded_in_a_process_of_its_own(src, tmp_path):
    make_files(src, {"a/x.png": b"abort"})
    dataset = pack(src, tmp_path, "--split", "train", "--encoding", "png", "--skip-bad")
    assert len(list(dataset.glob("*.tar"))) == 1
    assert len(contents(dataset)) == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"kill",
            "the process that packed this file ended with code 137: SIGKILL killed it (the kernel",
        ),
        (b"exit", "the process that packed this file ended with code 3; run the same command again with fewer"),
        (b"memory", "not enough memory to pack this file; run the same command again with fewer --workers"),
    ],
)
def test_a_lack_of_memory_ends_packing_and_names_the_file(src, tmp_path, content, message):
    make_files(src, {"a/x.png": content})
    assert f"{src}/a/x.png: {message}" in problems_of(src, tmp_path, *PNG, "--workers", "2", "--skip-bad")
    (src / "a" / "x.png").unlink()
    assert len(contents(pack(src, tmp_path, *PNG))) == 10


def test_packing_ends_if_every_file_crashes_the_codec(src, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "MOST_CODEC_FAULTS", 2)
    make_files(src, {f"a/x{i}.png": b"abort" for i in range(3)})
    message = problems_of(src, tmp_path, *PNG, "--skip-bad")
    assert "3 files ended the processes that decoded them" in message


def test_a_process_that_does_not_start_is_an_error(src, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_exit_with_parent", lambda: os._exit(7))
    assert "ended with code 7, before its first file" in problems_of(src, tmp_path, *PNG)


def test_files_as_stored_that_do_not_fit_into_memory_are_named(tmp_path, monkeypatch):
    src = make_files(tmp_path / "src", {"a/small": b"1", "a/large": b"22"})
    really_open = shard_jobs.open_regular

    def open_small(path):
        if path.endswith("large"):
            raise MemoryError
        return really_open(path)

    monkeypatch.setattr(shard_jobs, "open_regular", open_small)
    assert f"{src}/a/large: not enough memory" in problems_of(src, tmp_path, "--split", "train")


def test_errors_of_writing_come_from_the_processes(src, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "disk")

    monkeypatch.setattr(shard_jobs, "write_shard", full)
    assert "disk: cannot be written (No space left on device)" in problems_of(src, tmp_path, *PNG)


def test_no_process_outlives_packing(src, tmp_path):
    make_files(src, {"a/x.png": b"memory"})
    with pytest.raises(UserError):
        pack(src, tmp_path, *PNG, "--workers", "3")
    assert not multiprocessing.active_children()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("number", "code", "remedy"),
    [
        (errno.EAGAIN, 1, "raise the limit of processes and threads (ulimit -u"),
        (errno.EMFILE, 2, "raise the limit of open files (ulimit -n"),
        (errno.EROFS, 2, "/dev/shm must exist, be writable"),
    ],
)
def test_processes_that_cannot_be_started_are_not_taken_for_a_disk_that_cannot_be_written(
    number, code, remedy, src, tmp_path, monkeypatch
):
    def fail():
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fork", fail)
    with pytest.raises(UserError) as error:
        pack(src, tmp_path, *PNG, "--workers", "3")
    start = f"a process that writes shards (--workers 3) cannot be started: {os.strerror(number)}; {remedy}"
    assert str(error.value).startswith(start)
    assert error.value.exit_code == code


def test_lines_of_libraries_that_name_no_file_are_not_printed(tmp_path, capfd):
    """libtiff prints a line for each row of a damaged fax."""
    pixels = np.random.default_rng(0).integers(0, 2, (64, 64), dtype=np.uint8)
    Image.fromarray(255 * pixels).convert("1").save(file := io.BytesIO(), "TIFF", compression="group4")
    damaged = file.getvalue()[:200] + b"\xff" * 60 + file.getvalue()[260:]
    pack(make_files(tmp_path / "src", {"a/x.tif": damaged, "b/y.tif": damaged}), tmp_path, *PNG)
    assert capfd.readouterr().err == ""
    reencode(damaged, parse_encoding("png"), Fitting())
    assert "Bad code word" in capfd.readouterr().err  # shows that the check above can fail

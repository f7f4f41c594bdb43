from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bfsys import files
from bfsys.files import (
    begins_with,
    describe,
    exists,
    is_dir,
    is_file,
    open_input,
    read_regular,
    replace_by_copy,
    replace_file,
    replacing,
    try_lock,
)
from tests.conftest import REPOSITORY

DURABLE = pytest.mark.parametrize("durable", [True, False])


def test_what_cannot_be_known_is_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    found = {name: (exists(path), is_file(path), is_dir(path)) for name in (".", "file", "file/x", "none", "a\0b")
             if (path := tmp_path / name)}  # fmt: skip
    missing = (False, False, False)
    assert found == {
        ".": (True, False, True), "file": (True, True, False), "file/x": missing, "none": missing, "a\0b": missing,
    }  # fmt: skip

    def unreachable(path: object, **_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(os, "stat", unreachable)
    for asked in (exists, is_file, is_dir):
        with pytest.raises(OSError, match="Input/output error"):
            asked(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device"])
def test_files_that_are_not_regular_are_named_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "link" if "link" in kind else tmp_path / "pipe" if kind == "pipe" else Path("/dev/zero")
    (tmp_path / "link").symlink_to("pipe")
    with pytest.raises(OSError, match="is not a regular file, but a pipe or a device") as caught:
        read_regular(path)
    assert caught.value.filename == str(path)


def test_a_pipe_is_read_to_its_end_and_is_empty_without_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open_input(tmp_path / "pipe") as file:
        assert file.read() == b""
    (ours, theirs) = os.pipe()
    with open_input(f"/dev/fd/{ours}") as file:
        os.write(theirs, b"in two ")
        assert file.read(7) == b"in two "
        os.write(theirs, b"parts")
        os.close(theirs)
        assert file.read() == b"parts"
    os.close(ours)


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link") == b"content"


@DURABLE
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), replacing(path, durable=durable) as file:
        file.write("not bytes")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


@DURABLE
def test_the_file_is_replaced_at_the_end(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path, durable=durable) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    replace_file(path, "text ü", durable=durable)
    assert path.read_bytes() == "text ü".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_killed_writer_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "import os, signal, sys, pathlib\n"
        "from bfsys.files import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'new')\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert run(code, path).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_full_disk_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "import resource, sys, pathlib\n"
        "from bfsys.files import replace_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "replace_file(pathlib.Path(sys.argv[1]), 'new', durable=False)\n"
    )
    assert "File too large" in run(code, path).stderr
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "file"
    with pytest.raises(FileNotFoundError) as error:
        replace_file(path, "new")
    assert error.value.filename == str(path)


def test_an_error_of_a_lock_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with open(tmp_path / ".lock", "ab") as file, pytest.raises(OSError, match="cannot be locked: Input") as error:
        try_lock(file)
    assert (error.value.errno, error.value.filename) == (errno.EIO, file.name)


@DURABLE
def test_durable_writes_are_flushed_in_the_right_order(
    tmp_path: Path, durable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content is synced before the rename, and the name before the call returns."""
    done: list[str] = []
    fsync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "content")

    def renamed(source: Path, target: Path) -> None:
        rename(source, target)
        done.append("name")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    replace_file(tmp_path / "file", "text", durable=durable)
    assert done == (["content", "name", "folder"] if durable else ["name"])


def test_a_file_is_described_by_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert describe(tmp_path / "file") == {"bytes": 7, "sha256": hashlib.sha256(b"content").hexdigest()}


def run(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, path], cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.parametrize("chunk_bytes", [1, 3, 100])
def test_a_file_begins_with_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk_bytes)
    whole, other = tmp_path / "whole", tmp_path / "other"
    whole.write_bytes(b"0123456789")
    for content, expected in (
        (b"", True),
        (b"012", True),
        (b"0123456789", True),
        (b"01x", False),
        (b"0123456789a", False),
    ):
        other.write_bytes(content)
        assert begins_with(whole, other) == expected
    replace_by_copy(other, whole)
    assert other.read_bytes() == b"0123456789"


def test_an_error_without_a_name_gets_that_of_the_file(tmp_path: Path) -> None:
    """Errors of writing to an open file, such as that the disk is full, have no name."""
    path = tmp_path / "some file"
    for opened in (files.writing, files.replacing):
        with pytest.raises(OSError, match="No space") as error, opened(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert error.value.filename == str(path)

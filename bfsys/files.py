"""Files that are replaced as a whole, and the identity of a file.

A name refers either to the old content or to the new content at every moment, also if the writer is killed. With
`durable`, content and name are on the disk when the call returns, so they survive a power failure.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import hashlib
import io
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

CHUNK_BYTES = 1 << 20
# `flock` fails with one of these on a file system without locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
LONGEST_NAME_BYTES = 200  # used in a temporary name, which also has a process number; file systems allow 255


def exists(path: Path) -> bool:
    """Whether there is something at a path. Raises OSError if that cannot be known, for example because a file server
    does not answer: a run must not start from step 0 then. Since Python 3.14, `Path.exists` returns False."""
    return _mode(path) is not None


def is_file(path: Path) -> bool:
    return stat.S_ISREG(_mode(path) or 0)


def is_dir(path: Path) -> bool:
    return stat.S_ISDIR(_mode(path) or 0)


def _mode(path: Path) -> int | None:
    """The kind and permissions of the file at a path; None if there is none."""
    try:
        return os.stat(path).st_mode
    except ValueError:  # the path holds a NUL
        return None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP):
            return None
        raise


def try_lock(file: BinaryIO) -> bool:
    """Lock an open file against other processes, until it is closed or this process ends. False if another process
    holds the lock. On a file system without locks, nothing is locked. Raises OSError with the name of the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise OSError(error.errno, f"cannot be locked: {error.strerror}", file.name) from None
    return True


def _hidden(name: str) -> str:
    """How the temporary names of a file begin."""
    return f".{os.fsdecode(os.fsencode(name)[:LONGEST_NAME_BYTES])}"


def remove_unfinished(folder: Path, names: Iterable[str]) -> None:
    """Remove the temporary files of processes that were killed while they replaced files of these names in a folder.
    The caller must ensure that no other process is replacing them."""
    beginnings = set(map(_hidden, names))
    for path in folder.glob(".*.tmp"):
        beginning, _, process = path.name.removesuffix(".tmp").rpartition(".")
        if process.isdecimal() and beginning in beginnings:
            path.unlink()


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for writing. An OSError in the block names it: errors of an open file, such as that the disk is
    full, have no name."""
    try:
        with open(path, "wb") as file:
            yield file
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A new file that atomically replaces `path` when the block ends. After an exception, `path` is unchanged.

    Until then its name is `.NAME.PID.tmp`; a long NAME is truncated. A killed process leaves this file behind.
    """
    temporary = path.with_name(f"{_hidden(path.name)}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # users know this name
        raise
    if durable:
        sync_folder(path.parent)


def replace_file(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace `path` atomically with a file of this content; text is encoded in UTF-8."""
    with replacing(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def decoded(content: bytes | bytearray) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark. Raises UnicodeDecodeError."""
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_utf_16 else "utf-8-sig")
    if "\0" in text:  # UTF-16 and UTF-32 of ASCII characters are valid UTF-8
        at = content.index(0)
        raise UnicodeDecodeError("utf-8", content, at, at + 1, "a NUL, as in UTF-16 without a byte order mark")
    return text


def replace_by_copy(path: Path, source: Path) -> None:
    """Replace `path` atomically with a copy of `source`, of any size."""
    with open_regular(source) as original, replacing(path) as file:
        shutil.copyfileobj(original, file, CHUNK_BYTES)


def sync_folder(path: Path) -> None:
    """Flush a folder to disk, so that new, renamed and removed names survive a crash."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_input(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file that the user named for reading, which may also be a pipe. A pipe to which no process writes is
    empty; it would wait for a writer without end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    os.set_blocking(file.fileno(), True)
    return file


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file of a dataset or a run for reading. Raises OSError if it is not a regular file: a pipe would wait for
    its writer, and a device may have no end."""
    file = open_input(path)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "is not a regular file, but a pipe or a device", os.fspath(path))
    return file


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """The content of a file that `open_regular` opens."""
    with open_regular(path) as file:
        return file.read()


def is_named(file: IO, path: Path) -> bool:
    """Whether `path` is a name of an open file. It is not if the name was deleted, or belongs to another file now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def begins_with(path: Path, other: Path) -> bool:
    """Whether the content of `path` begins with that of `other`; files of any size."""
    with open_regular(path) as file, open_regular(other) as beginning:
        return all(file.read(len(part)) == part for part in iter(lambda: beginning.read(CHUNK_BYTES), b""))


def read_up_to(file: BinaryIO, most_bytes: int) -> bytearray:
    """The rest of a file; of one that holds more than `most_bytes`, or has no end, a little more than that."""
    content = bytearray()
    while len(content) <= most_bytes and (part := file.read(CHUNK_BYTES)) != b"":
        if part is None:  # an open file that does not block has nothing yet
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        content += part
    return content


def describe(path: Path) -> dict:
    """{"bytes": size of a file, "sha256": its hash in hexadecimal}"""
    with open_regular(path) as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

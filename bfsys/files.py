"""Files that are replaced as a whole, and the identity of a file.

A name refers either to the old content or to the new content at every moment, also if the writer is killed. With
`durable`, content and name are on the disk when the call returns, so they survive a power failure.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

LONGEST_NAME_BYTES = 200  # used in a temporary name, which also has a process number; file systems allow 255


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A new file that atomically replaces `path` when the block ends. After an exception, `path` is unchanged.

    Until then its name is `.NAME.PID.tmp`; a long NAME is truncated. A killed process leaves this file behind.
    """
    name = os.fsdecode(os.fsencode(path.name)[:LONGEST_NAME_BYTES])
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
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
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)  # users know this name
        raise
    if durable:
        sync_folder(path.parent)


def replace_file(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace `path` atomically with a file of this content; text is encoded in UTF-8."""
    with replacing(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(path: Path) -> None:
    """Flush a folder to disk, so that new, renamed and removed names survive a crash."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe(path: Path) -> dict:
    """{"bytes": size of a file, "sha256": its hash in hexadecimal}"""
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

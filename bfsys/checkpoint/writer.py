"""The process that writes a rank's share of a checkpoint, while training continues.

saving.py starts it for each save, as a separate program. It reads its task as JSON from standard input. It writes to
standard output, as JSON, what it wrote or why it failed. The training process passes the tensors in anonymous shared
memory. The program imports neither torch nor bfsys, and runs 0.1 s after its start.

The files are safetensors (8 bytes of header length, JSON header, data). They are written and hashed in one pass without
a copy. Rejected alternatives: the library's `save_file`, which first copies all tensors into Python bytes and needs a
second pass for the hash; a thread, which would compete with the training loop for Python's lock; and a forked child,
because threads and pinned memory of a training process are not safe to fork.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import signal
import sys
from collections.abc import Iterator

PR_SET_PDEATHSIG = 1  # linux/prctl.h
CHUNK_BYTES = 8 << 20
NICE = 10  # training has priority


def main() -> None:
    task = read_task()
    answer: dict[str, object]
    try:
        answer = {"files": write_all(task)}
    except OSError as error:
        answer = {"errno": error.errno, "problem": f"{error.filename or task['folder']}: {error.strerror}"}
    json.dump(answer, sys.stdout)


def read_task() -> dict:
    """Read the task from standard input. Also make this process end with its parent, and lower its priority."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # otherwise a writer would survive its killed rank
    os.nice(NICE)
    task = json.load(sys.stdin)
    if os.getppid() != task["parent"]:
        sys.exit()
    return task


def write_all(task: dict) -> dict[str, dict]:
    """Write the files into task["folder"]. Returns size and sha256 of each."""
    written, done = {}, 0

    def reporting(parts: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        """Report progress to training through the shared memory after the tensors."""
        nonlocal done
        for part in parts:
            yield part
            done += len(part)
            if task["memory"] is not None:
                os.pwrite(task["memory"], done.to_bytes(8, "little"), task["memory_bytes"])

    if task["tensors"]:
        memory = memoryview(mmap.mmap(task["memory"], task["memory_bytes"], access=mmap.ACCESS_READ))
        for name, entries in task["tensors"].items():
            written[name] = write(os.path.join(task["folder"], name), reporting(safetensors(memory, entries)))
    for name, (source, size_bytes) in task["copies"].items():
        written[name] = write(os.path.join(task["folder"], name), reporting(beginning(source, size_bytes)))
    return written


def write(path: str, parts: Iterator[bytes | memoryview]) -> dict:
    digest, size_bytes = hashlib.sha256(), 0
    with open(path, "wb") as f:
        for part in parts:
            f.write(part)
            digest.update(part)
            size_bytes += len(part)
        f.flush()
        os.fsync(f.fileno())
    return {"bytes": size_bytes, "sha256": digest.hexdigest()}


def safetensors(memory: memoryview, entries: dict[str, tuple[list[int], int, int]]) -> Iterator[bytes | memoryview]:
    """The bytes of a file of float32 tensors; `entries` are (shape, first byte, end) in `memory`, without gaps."""
    start = min(first for _, first, _ in entries.values())
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [first - start, end - start]}
        for name, (shape, first, end) in entries.items()
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    end = max(end for _, _, end in entries.values())
    for first in range(start, end, CHUNK_BYTES):
        yield memory[first : min(first + CHUNK_BYTES, end)]


def beginning(path: str, size_bytes: int) -> Iterator[bytes]:
    """The first `size_bytes` of a file to which other processes may append."""
    with open(path, "rb") as f:
        while size_bytes and (part := f.read(min(CHUNK_BYTES, size_bytes))):
            yield part
            size_bytes -= len(part)


if __name__ == "__main__":
    main()

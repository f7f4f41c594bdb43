"""One shard: a WebDataset tar, written and read together with the index of what lies where in it.

Writing and reading give the same `TarIndex`, so packing, checking and rebuilding an index are one
thing: join the `TarIndex` of all shards. The tar is laid out here rather than by
`webdataset.ShardWriter`, which writes under the final name, stamps the time of day and does not say
where a payload came to lie. Headers still come from `tarfile`, and any tar reader reads the result.
"""

import hashlib
import mmap
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash

from bfsys.errors import UserError

SAMPLE = np.dtype(
    [
        ("shard", "<u4"),
        ("label", "<u4"),
        ("offset", "<u8"),  # of the payload's first byte in the tar
        ("length", "<u8"),  # of the payload, in bytes
        ("checksum", "<u8"),  # xxh3_64 of the payload
        ("key_end", "<u8"),  # key i is keys[key_end[i - 1] : key_end[i]]
    ]
)
BLOCK_BYTES = 512  # tar's unit: headers are one block, payloads are filled up to whole blocks
RECORD_BYTES = 20 * BLOCK_BYTES  # tar files are filled up to whole records, after two empty blocks
CLASS_NUMBER = re.compile(rb"\s*[0-9]{1,9}\s*")
NOT_PAYLOAD = ("cls", "json")


@dataclass(frozen=True)
class Shard:
    file: str
    samples: int
    bytes: int  # of the tar
    sha256: str  # of the tar
    index_xxh3: str = ""  # of the shard's rows in the dataset's index, once it is part of one


class Member(NamedTuple):
    """What becomes the two tar entries KEY.extension and KEY.cls."""

    key: str
    extension: str
    payload: bytes
    label: int


class TarIndex(NamedTuple):
    """What one shard holds. Shard numbers are 0 and key ends count from 0 until shards are joined."""

    shard: Shard
    samples: np.ndarray  # SAMPLE [samples]
    keys: bytes

    def key_list(self) -> list[str]:
        ends = self.samples["key_end"].tolist()
        return [self.keys[a:b].decode("utf-8", "backslashreplace") for a, b in zip([0, *ends], ends, strict=False)]


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that comes to stand under its name only when it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


def size_in_tar_bytes(payload_bytes: int) -> int:
    """What a sample takes up in a shard: two headers, the payload and the class number in blocks."""
    return 3 * BLOCK_BYTES + payload_bytes + -payload_bytes % BLOCK_BYTES


def write_shard(path: Path, members: Iterable[Member]) -> TarIndex:
    """Write one tar under a temporary name, rename it when whole, and say what lies where in it."""
    sha256 = hashlib.sha256()
    rows: list[tuple] = []
    keys = bytearray()
    with atomic_file(path) as file:

        def write(data: bytes) -> None:
            file.write(data)
            sha256.update(data)

        for member in members:
            write(_header(f"{member.key}.{member.extension}", len(member.payload)))
            keys += member.key.encode()
            checksum = xxhash.xxh3_64_intdigest(member.payload)
            rows.append((0, member.label, file.tell(), len(member.payload), checksum, len(keys)))
            write(member.payload + bytes(-len(member.payload) % BLOCK_BYTES))
            number = str(member.label).encode()
            write(_header(f"{member.key}.cls", len(number)))
            write(number.ljust(BLOCK_BYTES, b"\0"))
        write(bytes(2 * BLOCK_BYTES))
        write(bytes(-file.tell() % RECORD_BYTES))
        size_bytes = file.tell()
    shard = Shard(path.name, len(rows), size_bytes, sha256.hexdigest())
    return TarIndex(shard, np.array(rows, SAMPLE), bytes(keys))


def _header(name: str, size_bytes: int) -> bytes:
    info = tarfile.TarInfo(name)  # mtime, uid and gid are 0, owner names empty, the mode 0644
    info.size = size_bytes
    return info.tobuf(tarfile.PAX_FORMAT)  # plain ustar unless the name is long or not ASCII


def read_shard(path: Path) -> TarIndex:
    """Read a WebDataset tar, whoever wrote it, and index it. UserError where it is damaged or not one."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            sha256 = hashlib.sha256(content).hexdigest()
            return _index_samples(path, content, sha256)
    except (OSError, ValueError, tarfile.TarError) as error:  # ValueError: an empty file cannot be mapped
        raise UserError(f"{path}: cannot be read as a tar ({error}); fetch or pack this shard again") from error


def _index_samples(path: Path, content: mmap.mmap, sha256: str) -> TarIndex:
    payloads, labels = _members(path, content)
    problems = [f"{path}: sample {key!r} has no payload beside its .cls" for key in labels if key not in payloads]
    rows: list[tuple] = []
    keys = bytearray()
    for key, infos in payloads.items():
        extensions = ", ".join(sorted(info.name.removeprefix(key) for info in infos))
        label = labels.get(key, b"")
        if len(infos) > 1:
            problems.append(f"{path}: sample {key!r} has {len(infos)} payloads ({extensions}); one is allowed")
        elif not CLASS_NUMBER.fullmatch(label):
            got = f"{key}.cls holds {label[:40]!r}" if key in labels else f"there is no {key}.cls"
            problems.append(f"{path}: sample {key!r} has no class: {got}; it must hold a number such as 7")
        else:
            keys += key.encode("utf-8", "surrogateescape")
            start, length = infos[0].offset_data, infos[0].size
            checksum = xxhash.xxh3_64_intdigest(content[start : start + length])
            rows.append((0, int(label), start, length, checksum, len(keys)))
    if not payloads:
        problems.append(f"{path}: holds no samples; a sample is KEY.<ext> and KEY.cls")
    if problems:
        raise UserError(*problems)
    shard = Shard(path.name, len(rows), len(content), sha256)
    return TarIndex(shard, np.array(rows, SAMPLE), bytes(keys))


def _members(path: Path, content: mmap.mmap) -> tuple[dict[str, list[tarfile.TarInfo]], dict[str, bytes]]:
    """The payloads and the class numbers of a tar, by key.

    `tarfile` takes a broken header in mid-file for the end of the archive, without a word. So what
    follows the last member must be the end mark: zeros, at least one block of them.
    """
    payloads: dict[str, list[tarfile.TarInfo]] = {}
    labels: dict[str, bytes] = {}
    end = 0
    with tarfile.open(path, mode="r:") as tar:
        for info in tar:
            end = info.offset_data
            if info.isreg():
                end += info.size + -info.size % BLOCK_BYTES
            folder, slash, base = info.name.rpartition("/")
            stem, dot, extension = base.partition(".")  # WebDataset: a key ends at the name's first dot
            if not info.isreg() or not stem or not dot:
                continue
            key = folder + slash + stem
            if extension.lower() == "cls":
                labels[key] = content[info.offset_data : info.offset_data + info.size]
            elif extension.lower() not in NOT_PAYLOAD:
                payloads.setdefault(key, []).append(info)
    if not content[end : end + BLOCK_BYTES] or content[end:].strip(b"\0"):
        raise UserError(
            f"{path}: the tar is cut off or its header at byte {end} is broken; "
            f"what follows cannot be read. Fetch or pack this shard again"
        )
    return payloads, labels


def join_shards(shards: Iterable[TarIndex]) -> tuple[np.ndarray, bytes]:
    """The samples and keys of several shards as those of one dataset."""
    samples, keys = [], bytearray()
    for number, index in enumerate(shards):
        rows = index.samples.copy()
        rows["shard"] = number
        rows["key_end"] += len(keys)
        samples.append(rows)
        keys += index.keys
    return np.concatenate(samples), bytes(keys)

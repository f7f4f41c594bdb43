"""One shard: a WebDataset tar, written and read together with an index of its members.

Writing and reading give the same `TarIndex`, so packing, checking and rebuilding an index all join the `TarIndex` of
all shards. The tar is written here and not by `webdataset.ShardWriter`, which writes under the final name, stores the
time of day and does not return the offset of a payload. Headers still come from `tarfile`, and any tar reader reads the
result.
"""

import codecs
import hashlib
import mmap
import re
import shlex
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from bfsys.errors import DENIED_ERRNOS, UserError
from bfsys.files import is_file, open_regular, replacing

SAMPLE = np.dtype(
    [
        ("shard", "<u4"),
        ("label", "<u4"),
        ("offset", "<u8"),  # offset of the payload's first byte in the tar
        ("length", "<u8"),  # length of the payload, in bytes
        ("checksum", "<u8"),  # xxh3_64 of the payload
        ("key_end", "<u8"),  # key i is keys[key_end[i - 1] : key_end[i]]
    ]
)
BLOCK_BYTES = 512  # tar's unit: a header is one block, payloads are padded to whole blocks
RECORD_BYTES = 20 * BLOCK_BYTES  # a tar ends with two empty blocks and is padded to whole records
CLASS_NUMBER = re.compile(rb"\s*(?:0|[1-9][0-9]{0,8})\s*")
NOT_PAYLOAD = ("cls", "json")
# tarfile's private functions that read names and numbers.
_nts, _nti = tarfile.nts, tarfile.nti  # type: ignore[attr-defined]  # not in typeshed
# Members that are not files: folders, GNU tar's folders for backups, and the label of an archive.
NOT_FILES = (tarfile.DIRTYPE, b"D", b"V")
MULTIVOLUME = b"M"
GNU_MAGIC = b"ustar  \0"
CONTROL_CHARACTER = re.compile(r"[\0-\x1f\x7f]")  # not allowed in keys, which are listed one per line
UNREADABLE = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    MULTIVOLUME: "the rest of a file that begins on another volume",
}
# By first bytes: the format, the command that decompresses a file, and the suffixes that the command accepts.
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip", (".gz", ".tgz")),
    b"BZh": ("bzip2", "bunzip2", (".bz2", ".tbz2", ".tbz")),
    b"\xfd7zXZ\0": ("xz", "unxz", (".xz", ".txz")),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd", (".zst", ".tzst")),
    b"PK\x03\x04": ("zip", "unzip", ("",)),
}


@dataclass(frozen=True)
class Shard:
    file: str
    samples: int
    bytes: int  # size of the tar
    sha256: str  # hash of the tar
    index_xxh3: str = ""  # hash of the shard's rows in the dataset's index; empty before the index is written


class Member(NamedTuple):
    """A sample, stored as the two tar entries KEY.extension and KEY.cls."""

    key: str
    extension: str
    payload: bytes
    label: int


class TarIndex(NamedTuple):
    """The index of one shard. Until shards are joined, shard numbers are 0 and key ends start from 0."""

    shard: Shard
    samples: np.ndarray  # SAMPLE [samples]
    keys: bytes

    def key_list(self) -> list[str]:
        ends = self.samples["key_end"].tolist()
        return [self.keys[a:b].decode("utf-8", "backslashreplace") for a, b in zip([0, *ends], ends, strict=False)]


def size_in_tar_bytes(payload_bytes: int) -> int:
    """The size of a sample in a shard: two headers, the payload and the class number in blocks."""
    return 3 * BLOCK_BYTES + payload_bytes + -payload_bytes % BLOCK_BYTES


def write_shard(path: Path, members: Iterable[Member]) -> TarIndex:
    """Write one tar under a temporary name, rename it when it is complete, and return its index."""
    sha256 = hashlib.sha256()
    rows: list[tuple] = []
    keys = bytearray()
    with replacing(path) as file:

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
    """Read and index a WebDataset tar of any origin. Raises UserError if it is damaged or not such a tar."""
    try:
        with open_regular(path) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # before mmap, in which an I/O error is a SIGBUS
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _index_samples(path, content, sha256)
    except OSError as error:
        remedy = "" if error.errno in DENIED_ERRNOS else "; fetch or pack this shard again"
        raise UserError(f"{path}: cannot be read ({error.strerror}){remedy}") from error
    # ValueError: an empty file cannot be mapped. Malicious headers make tarfile raise the other errors.
    except (ValueError, OverflowError, RecursionError, MemoryError, tarfile.TarError) as error:
        remedy = how_to_decompress(path) or f"cannot be read as a tar ({error}); fetch or pack this shard again"
        raise UserError(f"{path}: {remedy}") from error


def how_to_decompress(path: Path) -> str:
    """A message on how to decompress a compressed archive, recognised by its first bytes; empty for other files.

    Raises OSError if the file cannot be read.
    """
    if not is_file(path):  # opening a pipe would wait for its writer
        return ""
    with open(path, "rb") as file:
        head = file.read(max(map(len, COMPRESSED)))
    for magic, (kind, command, suffixes) in COMPRESSED.items():
        if head.startswith(magic):
            name, rename = str(path), ""
            if not path.name.lower().endswith(suffixes):
                name = f"{path}{suffixes[0]}"
                rename = f"mv {shlex.quote(str(path))} {shlex.quote(name)} && "
            then = " and pack the files with bfsys pack" if kind == "zip" else ""
            return f"is compressed ({kind}), shards must not be: {rename}{command} {shlex.quote(name)}{then}"
    return ""


def _index_samples(path: Path, content: mmap.mmap, sha256: str) -> TarIndex:
    payloads, labels = _members(path, content)
    problems = [f"{path}: sample {key!r} has no payload besides its .cls" for key in labels if key not in payloads]
    rows: list[tuple] = []
    keys = bytearray()
    for key, infos in payloads.items():
        label = labels.get(key, b"").removeprefix(codecs.BOM_UTF8)
        if len(infos) > 1:
            extensions = ", ".join(f".{extension}" for extension in sorted(infos))
            problems.append(f"{path}: sample {key!r} has {len(infos)} payloads ({extensions}); one is allowed")
        elif not CLASS_NUMBER.fullmatch(label):
            got = f"{key}.cls holds {label[:40]!r}" if key in labels else f"there is no {key}.cls"
            problems.append(
                f"{path}: sample {key!r} has no class: {got}; it must hold a number from 0 to 999999999, such as 7"
            )
        else:
            keys += key.encode("utf-8", "surrogateescape")
            (info,) = infos.values()
            start, length = info.offset_data, info.size
            checksum = xxhash.xxh3_64_intdigest(content[start : start + length])
            rows.append((0, int(label), start, length, checksum, len(keys)))
    if not payloads:
        problems.append(f"{path}: holds no samples; a sample is KEY.<ext> and KEY.cls")
    if problems:
        raise UserError(*problems)
    shard = Shard(path.name, len(rows), len(content), sha256)
    return TarIndex(shard, np.array(rows, SAMPLE), bytes(keys))


def _members(path: Path, content: mmap.mmap) -> tuple[dict[str, dict[str, tarfile.TarInfo]], dict[str, bytes]]:
    """The payloads of a tar by key and extension, and its class numbers by key.

    A file whose bytes are not contiguous in the tar is refused. So is a duplicate name, of which tar uses the last
    member and other readers the first. `tarfile` silently treats a damaged header as the end of the archive. So the
    last member must be followed by the end mark, which is at least one block of zeros.
    """
    payloads: dict[str, dict[str, tarfile.TarInfo]] = {}
    labels: dict[str, bytes] = {}
    seen: set[tuple[str, str]] = set()
    problems: list[str] = []
    end = 0
    with tarfile.open(path, mode="r:") as tar:
        for info in tar:
            end = tar.offset  # offset of the next header
            if info.type in NOT_FILES:
                continue
            header = content[info.offset_data - BLOCK_BYTES : info.offset_data]
            key, extension = _key_and_extension(_normal_name(info, header))
            member = (key, extension.lower())
            wrong = _why_unreadable(info, header, len(content) - info.offset_data)
            if not wrong and key and member in seen:
                wrong = f"occurs twice for sample {key!r}; keep one of them"
            seen.add(member)
            if wrong:
                problems.append(f"{path}: member {info.name!r} {wrong}")
                if not info.offset_data <= end <= len(content):
                    break  # later members cannot be found
            elif member[1] == "cls":
                labels[key] = content[info.offset_data : info.offset_data + info.size]
            elif key and member[1] not in NOT_PAYLOAD:
                payloads.setdefault(key, {})[extension] = info
    if not problems and (not content[end : end + BLOCK_BYTES] or content[end:].strip(b"\0")):
        problems = [
            f"{path}: what follows byte {end} cannot be read: the tar is cut off, its header at byte {end} is broken, "
            f"or it is several tars joined by cat (tar -A joins them). Fetch or pack this shard again"
        ]
    if problems:
        raise UserError(*problems)
    return payloads, labels


def _normal_name(info: tarfile.TarInfo, header: bytes) -> str:
    """A member's name as tar extracts it: without leading slashes, empty parts and dots."""
    name = info.name
    if header.startswith(GNU_MAGIC, 257):  # this field holds times, which tarfile would prepend to the name
        name = name.removeprefix(_nts(header[345:500], "utf-8", "surrogateescape") + "/")
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _key_and_extension(name: str) -> tuple[str, str]:
    """Split a name as WebDataset does: the key ends at the first dot of the last part. Both are empty without a dot."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension) if stem and dot else ("", "")


def _why_unreadable(info: tarfile.TarInfo, header: bytes, bytes_left: int) -> str:
    """The reason why the `info.size` bytes at `info.offset_data` are not a file's content; empty if they are.
    `bytes_left` is the number of bytes of the tar from there."""
    kind = UNREADABLE.get(info.type, "" if info.isreg() else f"of the unknown type {info.type!r}")
    if info.issparse() or any(name.startswith(("GNU.sparse.", "SCHILY.realsize")) for name in info.pax_headers):
        kind = "a sparse file, whose holes are not stored"
    elif "GNU.volume.offset" in info.pax_headers:
        kind = UNREADABLE[MULTIVOLUME]
    if kind:
        return f"is {kind}; extract the tar and pack plain files (tar --dereference --hard-dereference, no --sparse)"
    if ".." in info.name.split("/"):
        return "has '..' in its name, which tar does not extract; pack the tar again, from inside the folder"
    if CONTROL_CHARACTER.search(info.name):
        return "has a line break or another control character in its name; rename the file and pack it again"
    size_bytes = _nti(header[124:136])
    if size_bytes != info.size:
        return f"has {size_bytes:,} bytes by its header and {info.size:,} by its pax header; pack the tar again"
    if not 0 <= size_bytes <= bytes_left:
        return (
            f"has {size_bytes:,} bytes by its header, and {bytes_left:,} follow: the tar is cut off, or "
            f"continues on another volume. Fetch or pack this shard again"
        )
    return ""


def join_shards(shards: Iterable[TarIndex]) -> tuple[np.ndarray, bytes]:
    """The samples and keys of several shards, joined into one index."""
    samples, keys = [], bytearray()
    for number, index in enumerate(shards):
        rows = index.samples.copy()
        rows["shard"] = number
        rows["key_end"] += len(keys)
        samples.append(rows)
        keys += index.keys
    return np.concatenate(samples), bytes(keys)

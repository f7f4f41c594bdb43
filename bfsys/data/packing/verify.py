"""Comparing every byte of a packed dataset on this machine with its dataset.json and its index."""

import errno
import mmap

import numpy as np
import xxhash

from bfsys.data.storage.description import DESCRIPTION
from bfsys.data.storage.shards import PACKED_BY, Split
from bfsys.data.storage.tars import TarIndex, read_shard
from bfsys.errors import UserError, counted
from bfsys.files import describe, exists, is_file


def verify_index(split: Split) -> list[str]:
    """Compare the index files with their sha256, and the classes that dataset.json names with those of the samples."""
    files = split.dataset.description["splits"][split.split]["index"].values()
    problems = []
    for entry in files:
        if describe(split.path / entry["name"])["sha256"] != entry["sha256"]:
            problems.append(f"{split.path / entry['name']}: differs from the sha256 in {DESCRIPTION}")
    return problems + _wrong_classes(split)


def _wrong_classes(split: Split) -> list[str]:
    """Problems of classes whose number of samples, or whose name in the keys of `bfsys pack`, differs."""
    description, labels = split.dataset.description, split.samples["label"]
    stated = description["splits"][split.split]["class_counts"]
    keys_hold_names = description.get("made_by", {}).get("tool") == PACKED_BY
    counts = np.bincount(labels[labels < len(split.classes)], minlength=len(split.classes))
    problems = []
    for label, name in enumerate(split.classes):
        where = f"{split.path / DESCRIPTION}: class {name!r}"
        if counts[label] != stated[name]:
            problems.append(
                f"{where}: dataset.json states {counted(stated[name], 'sample')} of {split.split}, and the index holds "
                f"{counts[label]:,}"
            )
        if keys_hold_names and counts[label]:
            key = split.key(int(np.argmax(labels == label)))
            if not key.startswith(f"{name.replace('.', '_')}/"):
                problems.append(f"{where}: its samples have keys of another class, such as {key!r}")
    return problems


def verify_shard(split: Split, number: int) -> list[str]:
    """Compare one tar with its size, its sha256 and the index: key, class, offset and bytes of each sample."""
    shard = split.shards[number]
    path = split.path / shard.file
    first, end = split.shard_starts[number : number + 2].tolist()
    if not exists(path):
        return [f"{path}: the shard is missing; it holds {counted(shard.samples, 'sample')}"]
    if not is_file(path):  # opening a pipe would wait for its writer
        return [f"{path}: the shard is not a regular file"]
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        return [f"{path}: the shard is empty, {DESCRIPTION} says {shard.bytes:,} bytes"]
    problems = []
    try:
        sha256 = describe(path)["sha256"]  # before mmap, in which an I/O error is a SIGBUS
    except OSError as error:
        if error.errno != errno.EIO:  # for example no permission, which is not damage
            raise
        return [f"{path}: cannot be read: {error.strerror}"]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if size_bytes != shard.bytes:
            problems.append(f"{path}: has {size_bytes:,} bytes, {DESCRIPTION} says {shard.bytes:,}")
        if sha256 != shard.sha256:
            problems.append(f"{path}: differs from the sha256 in {DESCRIPTION}")
        rows = split.samples[first:end]
        ends = rows["offset"] + rows["length"]
        lost = np.flatnonzero(ends > size_bytes)
        if len(lost):  # in one line: a truncated shard would otherwise give thousands
            problems.append(
                f"{path}: {len(lost):,} of {shard.samples:,} samples lie past its end, "
                f"the first of them is {split.key(first + int(lost[0]))!r}"
            )
        for i in np.flatnonzero(ends <= size_bytes).tolist():
            payload = content[int(rows[i]["offset"]) : int(ends[i])]
            if xxhash.xxh3_64_intdigest(payload) != rows[i]["checksum"]:
                key = split.key(first + i)
                problems.append(f"{path}: sample {key!r}: its bytes differ from the checksum in the index")
    try:
        found = read_shard(path)
    except UserError as error:
        return problems + list(error.problems)
    return problems + _differences(split, number, found)


def _differences(split: Split, number: int, found: TarIndex) -> list[str]:
    """Compare the samples of one shard in the index with those in the tar."""
    path = split.path / split.shards[number].file
    first, end = split.shard_starts[number : number + 2].tolist()
    if len(found.samples) != end - first:
        return [f"{path}: holds {counted(len(found.samples), 'sample')}, the index says {end - first:,}"]
    problems = []
    for i, (key, row) in enumerate(zip(found.key_list(), found.samples, strict=True), start=first):
        indexed = split.samples[i]
        in_tar = (key, number, *(int(row[field]) for field in ("label", "offset", "length")))
        in_index = (split.key(i), *(int(indexed[field]) for field in ("shard", "label", "offset", "length")))
        if in_tar != in_index:
            problems.append(
                f"{path}: sample {i}: key, shard, class, offset, length are {in_tar} in the tar "
                f"and {in_index} in the index"
            )
        label = int(indexed["label"])
        if label >= len(split.classes):
            problems.append(f"{path}: sample {key!r}: class {label} of {len(split.classes)} classes")
    return problems

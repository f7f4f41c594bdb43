"""A packed dataset: a folder of WebDataset tars, an index per split, and dataset.json with the checksums of both.

    NAME-SPLIT-000000.tar …      the files (see tars.py)
    NAME-SPLIT.samples.npy       one SAMPLE row per sample, by shard and position; memory-mapped
    NAME-SPLIT.keys.npy          all keys as UTF-8, one after the other
    dataset.json                 classes, counts, sizes and hashes; written last, so a folder with it is complete, and a
                                 folder without it is not a dataset
    .pack                        what packing needs when it is run again (see data/packing/staging.py)

The folder may be at a URL (see remote.py). The index is then fetched at the start, and a shard when it is needed. The
cost of opening a split does not depend on its number of samples; `damaged_index` documents what is verified, and by
which rank.

Rejected alternative: scanning the tars at every start, as streaming readers do. The order of training is computed from
lengths and labels alone, and a flipped byte must be detected.
"""

import hashlib
import itertools
import json
import os
import tokenize
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from bfsys.data.storage.description import (
    DESCRIPTION,
    FORMAT,
    parse_description,
    parse_object,
    read_description,
    version_of,
)
from bfsys.data.storage.remote import Cache, RemoteFile
from bfsys.data.storage.streams import WrongContent, url_of
from bfsys.data.storage.tars import SAMPLE, Shard, TarIndex, join_shards
from bfsys.errors import MISSING_ERRNOS, UserError, code_of
from bfsys.files import describe, open_regular, replace_file, replacing
from bfsys.locations import hide, is_remote

# Not for datasets of `bfsys pack`: rebuilding takes the names of classes from keys, in which some characters differ.
REBUILD = f"if its tars were made elsewhere, rename {DESCRIPTION} and run bfsys inspect --rebuild"
PACKED_BY = "tools/pack.py"
QUANTILES_PERCENT = (0, 1, 10, 25, 50, 75, 90, 99, 100)


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a packed dataset, open for reading."""

    dataset: "Dataset"
    split: str
    shards: tuple[Shard, ...]
    samples: np.ndarray  # SAMPLE [samples], memory-mapped
    keys: np.ndarray  # uint8 [bytes of all keys], memory-mapped
    bytes: int  # total size of all files
    length_quantiles: dict[str, int]  # lengths in bytes by quantile: min, 1%, …, 50%, …, max
    fingerprint: str  # differs if anything in the split differs

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def path(self) -> Path:
        return self.dataset.folder

    @property
    def name(self) -> str:
        return self.dataset.name

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.classes

    def key(self, i: int) -> str:
        start = self.samples["key_end"][i - 1] if i > 0 else 0
        return self.keys[start : self.samples["key_end"][i]].tobytes().decode("utf-8", "backslashreplace")

    @cached_property
    def shard_starts(self) -> np.ndarray:
        """int64 [shards + 1]: the number of each shard's first sample, then the number of samples."""
        return np.cumsum([0, *(shard.samples for shard in self.shards)], dtype=np.int64)

    def open_shard(self, number: int) -> int:
        """An open descriptor of a tar. A remote tar is fetched if it is not cached. Raises OSError or UserError."""
        if self.dataset.cache is None:
            # O_NONBLOCK: if the file is a pipe, opening it fails instead of waiting for a writer.
            return os.open(self.path / self.shards[number].file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with self.dataset.cache.open(self.remote_shard(number)) as file:
            return os.dup(file.fileno())

    def drop_shard(self, number: int, descriptor: int) -> bool:
        """Remove the cached copy of a remote tar that `descriptor` reads, so that it is fetched again. Returns False
        for a local tar."""
        cache = self.dataset.cache
        if cache is None:
            return False
        cache.discard(cache.path_of(self.remote_shard(number)), os.fstat(descriptor))
        return True

    def remote_shard(self, number: int) -> RemoteFile:
        """A shard of a remote dataset."""
        shard = self.shards[number]
        return self.dataset.remote_file(shard.file, shard.sha256, shard.bytes)

    def damaged_index(self, shards: Iterable[int]) -> list[str]:
        """Problems of the index: shards whose rows do not match dataset.json.

        A damaged row would cause a wrong label or a checksum mismatch. The ranks of a run divide the shards among them
        at its start, so the check of a large index takes little time.
        """
        starts = self.shard_starts.tolist()
        bad = [
            self.shards[n].file
            for n in shards
            if index_digest(self.samples, self.keys, starts[n], starts[n + 1]) != self.shards[n].index_xxh3
        ]
        if not bad:
            return []
        return [
            f"{self.dataset.shown}: the index of {self.split!r} is damaged or belongs to other shards: its rows do "
            f"not match {DESCRIPTION} for {len(bad):,} of {len(self.shards):,} shards, first for {bad[0]}; copy or "
            f"pack the dataset again; {REBUILD}"
        ]


def index_digest(samples: np.ndarray, keys: np.ndarray, first: int, end: int) -> str:
    """xxh3 of rows first … end of an index, and of their keys."""
    digest = xxhash.xxh3_64(np.ascontiguousarray(samples[first:end]).data)
    if first < end:
        keys_start = int(samples["key_end"][first - 1]) if first else 0
        digest.update(np.ascontiguousarray(keys[keys_start : int(samples["key_end"][end - 1])]).data)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Dataset:
    """A packed dataset: its location, and the content of its dataset.json."""

    location: str  # folder or URL, as the user gave it
    description: dict
    cache: Cache | None = None  # of a remote dataset
    version: tuple[int, ...] = ()  # of the dataset.json of a local one, before it was read: see `version_of`

    @property
    def folder(self) -> Path:
        assert self.cache is None, "a remote dataset has no folder of its own"
        return Path(self.location)

    @property
    def shown(self) -> str:
        """The location for messages, without possible secrets."""
        return hide(self.location)

    @property
    def is_reachable(self) -> bool:
        """Whether the dataset.json can be read now. Raises UserError if that of a remote dataset has other content."""
        if self.cache is None:
            return os.path.exists(self.folder / DESCRIPTION)
        try:
            description = fetch_description(self.location, self.cache)
        except UserError:
            return False
        if description != self.description:
            raise self.packed_again()
        return True

    def packed_again(self) -> UserError:
        """The error for a dataset that was replaced by another one since it was opened."""
        return UserError(
            f"{self.shown}: was packed again while the run trains on it. The checkpoints belong to the earlier data: "
            "restore those and resume, or start a new run (name=…)"
        )

    @property
    def name(self) -> str:
        return self.description["name"]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.description["classes"])

    @property
    def splits(self) -> list[str]:
        return sorted(self.description["splits"])

    def file(self, name: str, sha256: str, size_bytes: int) -> Path:
        """The local path of a file of the dataset; a remote file is fetched."""
        if self.cache is None:
            return self.folder / name
        return self.cache.fetch(self.remote_file(name, sha256, size_bytes))

    def remote_file(self, name: str, sha256: str, size_bytes: int) -> RemoteFile:
        """A file of a remote dataset; the arguments are those of an `index` entry in dataset.json."""
        return RemoteFile(url_of(self.location, name), sha256, size_bytes)

    def open(self, split: str) -> Split:
        """Open one split. It is checked that its files match each other; hashes are not: see `Split.damaged_index`.

        Cached copies of a remote index are an exception. They are verified (at 13 GB/s), and fetched again if they are
        damaged. Other machines have other copies, so the ranks cannot divide this check among them.
        """
        if self.cache is not None:
            self._drop_damaged_index(split, self.cache)
        return self._open(split)

    def was_replaced(self) -> bool:
        """Whether the folder of a local dataset now holds another dataset; False if it cannot be read."""
        if self.cache is not None:
            return False
        with suppress(OSError, UserError):
            if version_of(self.folder) != self.version:  # reading it takes a second if there are 100,000 shards
                return read_description(self.folder) != self.description
        return False

    def _drop_damaged_index(self, split: str, cache: Cache) -> None:
        seen: dict[Path, os.stat_result] = {}
        with suppress(KeyError, TypeError):  # `_open` reports the problem
            for entry in self.description["splits"][split]["index"].values():
                path = cache.path_of(self.remote_file(**entry))
                with suppress(FileNotFoundError, NotADirectoryError):
                    seen[path] = path.stat()
        if not seen:
            return  # fetched files are verified by their sha256
        try:
            opened = self._open(split)
            damaged = bool(opened.damaged_index(range(len(opened.shards))))
        except UserError:
            damaged = True
        for path, status in seen.items() if damaged else ():
            cache.discard(path, status)

    def _open(self, split: str) -> Split:
        described = f"{self.shown}: {DESCRIPTION}"
        if split not in self.description["splits"]:
            raise UserError(f"{self.shown}: there is no split {split!r}; there are: {', '.join(self.splits)}")
        part = self.description["splits"][split]
        identity = json.dumps([split, part, self.classes], sort_keys=True)
        try:
            shards = tuple(Shard(**shard) for shard in part["shards"])
            entries = part["index"]
            if self.cache is not None and shards:
                largest = max(shards, key=lambda shard: shard.bytes)
                self.cache.check_room(self.remote_file(largest.file, largest.sha256, largest.bytes))
            samples = self._map(entries["samples"], SAMPLE, part["samples"])
            keys = self._map(entries["keys"], np.dtype("u1"), int(samples["key_end"][-1]))
            opened = Split(
                dataset=self,
                split=split,
                shards=shards,
                samples=samples,
                keys=keys,
                bytes=part["bytes"],
                length_quantiles=part["length_quantiles"],
                fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(f"{described} is damaged ({error!r}); pack the dataset again") from error
        if opened.shard_starts[-1] != len(samples):
            raise UserError(f"{described} is damaged (the shards' samples do not add up to {len(samples)})")
        return opened

    def _map(self, entry: dict, dtype: np.dtype, length: int) -> np.ndarray:
        """An array of the index. If another process evicts a fetched file before it is opened, it is fetched again."""
        while True:
            path = self.file(**entry)
            try:
                return _map_array(path, dtype, length)
            except UserError as error:
                if self.cache is None or not isinstance(error.__cause__, FileNotFoundError):
                    raise


def open_dataset(location: str | Path, cache: Cache | None = None, description: dict | None = None) -> Dataset:
    """The dataset in a folder or at a URL. Files at a URL are fetched into `cache`. `description` is the result of an
    earlier `fetch_description`, if there is one."""
    location = str(location)
    if not is_remote(location):
        version = version_of(Path(location))
        return Dataset(location, read_description(Path(location)), version=version)
    if cache is None:
        raise UserError(f"{hide(location)}: a folder on this machine is expected here, not a URL")
    return Dataset(location, description or fetch_description(location, cache), cache)


def fetch_description(location: str, cache: Cache) -> dict:
    """The content of the dataset.json at a URL. An answer that is something else is fetched again."""

    def check(content: bytes) -> None:
        try:
            parse_object(content)
        except ValueError as error:
            raise WrongContent(f"the answer is not a {DESCRIPTION}: {error}") from None

    return parse_description(cache.read(url_of(location, DESCRIPTION), check), hide(location))


def open_split(path: str | Path, split: str) -> Split:
    """One split of the dataset in a folder."""
    return open_dataset(path).open(split)


def _map_array(file: Path, dtype: np.dtype, length: int) -> np.ndarray:
    try:
        open_regular(file).close()
        array = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:  # a damaged header
        is_damaged = not isinstance(error, OSError) or error.errno in MISSING_ERRNOS
        raise UserError(
            f"{file}: the index cannot be read ({getattr(error, 'strerror', None) or error})"
            + (f"; copy or pack the dataset again; {REBUILD}" if is_damaged else ""),
            exit_code=code_of(error),
        ) from error
    if array.dtype != dtype or array.shape != (length,):
        raise UserError(
            f"{file}: the index holds {array.shape} of {array.dtype}, {DESCRIPTION} names ({length},) of "
            f"{dtype}: they are not of one dataset; copy or pack it again; {REBUILD}"
        )
    return array


def write_split(path: Path, name: str, split: str, classes: Sequence[str], shards: Sequence[TarIndex]) -> dict:
    """Write a split's index from that of its shards, and return its part of dataset.json."""
    samples, keys = join_shards(shards)
    files = {}
    arrays = (samples, np.frombuffer(keys, np.uint8))
    for role, array in zip(("samples", "keys"), arrays, strict=True):
        file_name = f"{name}-{split}.{role}.npy"
        with replacing(path / file_name) as file:
            np.save(file, array)
        about = describe(path / file_name)
        files[role] = {"name": file_name, "sha256": about["sha256"], "size_bytes": about["bytes"]}
    ends = np.cumsum([0, *(len(index.samples) for index in shards)]).tolist()
    counts = np.bincount(samples["label"], minlength=len(classes))
    return {
        "samples": len(samples),
        "bytes": int(samples["length"].sum()),
        "length_quantiles": length_quantiles(samples["length"]),
        "class_counts": dict(zip(classes, counts.tolist(), strict=True)),
        "index": files,
        "shards": [
            asdict(replace(index.shard, index_xxh3=index_digest(*arrays, first, end)))
            for index, (first, end) in zip(shards, itertools.pairwise(ends), strict=True)
        ],
    }


def length_quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Quantiles of lengths in bytes, without interpolation, by the percentage of samples that are not longer."""
    values = np.quantile(lengths, [percent / 100 for percent in QUANTILES_PERCENT], method="inverted_cdf")
    names = ["min", *(f"{percent}%" for percent in QUANTILES_PERCENT[1:-1]), "max"]
    return {name: int(value) for name, value in zip(names, values, strict=True)}


def write_description(
    path: Path,
    name: str,
    classes: Sequence[str],
    encoding: str,
    made_by: dict,
    splits: dict[str, dict],
    notes: Sequence[str] = (),
) -> None:
    """Write dataset.json, which marks the folder as complete. `splits` are the results of `write_split`. `notes` are
    peculiarities of the source files that training would not reveal."""
    description = {
        "format": FORMAT,
        "name": name,
        "encoding": encoding,
        "made_by": made_by,
        "classes": list(classes),
        "splits": splits,
        **({"notes": list(notes)} if notes else {}),
    }
    text = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
    replace_file(path / DESCRIPTION, text)

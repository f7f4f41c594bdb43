"""A packed dataset: a folder of WebDataset tars, an index per split, and dataset.json that vouches for both.

    NAME-SPLIT-000000.tar …      the files (see tars.py)
    NAME-SPLIT.samples.npy       one SAMPLE row per sample, by shard and position; memory-mapped
    NAME-SPLIT.keys.npy          all keys as UTF-8, one behind the other
    dataset.json                 classes, counts, sizes and hashes; written last, so that a folder with
                                 it is whole and a folder without it is not a dataset

Alternative refused: finding samples by scanning the tars at every start, as streaming readers do. The
order of training is computed from lengths and labels alone, and a flipped byte must not go unnoticed.
"""

import hashlib
import json
import mmap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from bfsys.data.tars import SAMPLE, Shard, TarIndex, atomic_file, join_shards, read_shard
from bfsys.errors import UserError

FORMAT = 1
DESCRIPTION = "dataset.json"
QUANTILES_PERCENT = (0, 1, 10, 25, 50, 75, 90, 99, 100)


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a packed dataset, open for reading."""

    path: Path  # the dataset's folder
    name: str  # the dataset's name
    split: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    samples: np.ndarray  # SAMPLE [samples], memory-mapped
    keys: np.ndarray  # uint8 [bytes of all keys], memory-mapped
    fingerprint: str  # changes whenever anything of the split changes

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, i: int) -> str:
        start = self.samples["key_end"][i - 1] if i > 0 else 0
        return self.keys[start : self.samples["key_end"][i]].tobytes().decode("utf-8", "backslashreplace")

    @property
    def shard_starts(self) -> np.ndarray:
        """int64 [shards + 1], the number of each shard's first sample, and the number of samples."""
        return np.cumsum([0, *(shard.samples for shard in self.shards)], dtype=np.int64)

    def __reduce__(self) -> tuple:
        """Pickled as its place: another process maps the index instead of receiving a copy of it."""
        return open_split, (self.path, self.split)


def split_names(path: str | Path) -> list[str]:
    """The splits of a packed dataset."""
    return sorted(read_description(Path(path))["splits"])


def open_split(path: str | Path, split: str) -> Split:
    """Open one split. Checks that the parts fit together, and hashes nothing: see `verify_split`."""
    path = Path(path)
    description = read_description(path)
    if split not in description["splits"]:
        raise UserError(f"{path}: there is no split {split!r}; there are: {', '.join(split_names(path))}")
    try:
        part, name = description["splits"][split], description["name"]
        classes = tuple(description["classes"])
        shards = tuple(Shard(**shard) for shard in part["shards"])
        samples = _map_array(path / part["index"]["samples"]["file"], SAMPLE, part["samples"])
        keys_bytes = int(samples["key_end"][-1])
        keys = _map_array(path / part["index"]["keys"]["file"], np.dtype("u1"), keys_bytes)
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path / DESCRIPTION}: is damaged ({error!r}); pack the dataset again") from error
    if sum(shard.samples for shard in shards) != len(samples):
        raise UserError(f"{path / DESCRIPTION}: is damaged (the shards' samples do not add up to {len(samples)})")
    identity = json.dumps([split, part, classes], sort_keys=True)
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return Split(path, name, split, classes, shards, samples, keys, fingerprint)


def read_description(path: Path) -> dict:
    """dataset.json of the folder at `path`."""
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder; a packed dataset is made by tools/pack.py")
    file = path / DESCRIPTION
    if not file.exists():
        raise UserError(
            f"{path}: holds no {DESCRIPTION}. If packing was not finished, run the same command "
            f"again; for tars made elsewhere, run: python tools/inspect_shards.py {path} --rebuild"
        )
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        number = description["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error!r}); pack the dataset again") from error
    if number != FORMAT:
        raise UserError(f"{file}: has format {number!r}; this version reads format {FORMAT}: pack the dataset again")
    if not isinstance(description.get("splits"), dict):
        raise UserError(f"{file}: is damaged (it lists no splits); pack the dataset again")
    return description


def _map_array(file: Path, dtype: np.dtype, length: int) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{file}: the index cannot be read ({error}); pack the dataset again, "
            f"or delete {DESCRIPTION} and run tools/inspect_shards.py --rebuild"
        ) from error
    if array.dtype != dtype or array.shape != (length,):
        raise UserError(
            f"{file}: the index holds {array.shape} of {array.dtype}, {DESCRIPTION} speaks of ({length},) of "
            f"{dtype}: they are not of one dataset; pack it again, "
            f"or delete {DESCRIPTION} and run tools/inspect_shards.py --rebuild"
        )
    return array


def index_files(name: str, split: str) -> tuple[str, str]:
    return f"{name}-{split}.samples.npy", f"{name}-{split}.keys.npy"


def write_split(path: Path, name: str, split: str, classes: Sequence[str], shards: Sequence[TarIndex]) -> dict:
    """Write a split's index from that of its shards, and return its part of dataset.json."""
    samples, keys = join_shards(shards)
    files = {}
    arrays = (samples, np.frombuffer(keys, np.uint8))
    for role, file_name, array in zip(("samples", "keys"), index_files(name, split), arrays, strict=True):
        with atomic_file(path / file_name) as file:
            np.save(file, array)
        with open(path / file_name, "rb") as file:
            files[role] = {"file": file_name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    counts = np.bincount(samples["label"], minlength=len(classes))
    return {
        "samples": len(samples),
        "bytes": int(samples["length"].sum()),
        "length_quantiles": length_quantiles(samples["length"]),
        "class_counts": dict(zip(classes, counts.tolist(), strict=True)),
        "index": files,
        "shards": [asdict(index.shard) for index in shards],
    }


def length_quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Lengths in bytes that some sample has, by per cent of the samples that are no longer."""
    values = np.quantile(lengths, [percent / 100 for percent in QUANTILES_PERCENT], method="inverted_cdf")
    names = ["min", *(f"{percent}%" for percent in QUANTILES_PERCENT[1:-1]), "max"]
    return {name: int(value) for name, value in zip(names, values, strict=True)}


def write_description(
    path: Path, name: str, classes: Sequence[str], encoding: str, made_by: dict, splits: dict[str, dict]
) -> None:
    """Write dataset.json, and with it declare the folder whole. `splits` are the results of `write_split`."""
    description = {
        "format": FORMAT,
        "name": name,
        "encoding": encoding,
        "made_by": made_by,
        "classes": list(classes),
        "splits": splits,
    }
    text = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
    with atomic_file(path / DESCRIPTION) as file:
        file.write(text.encode())


def summarise(description: dict) -> str:
    """What a dataset holds, for people to read."""
    classes = description["classes"]
    some = ", ".join(classes[:5]) + (", …" if len(classes) > 5 else "")
    lines = [f"{description['name']}: {len(classes)} classes ({some}), encoding {description['encoding']}"]
    for split, part in description["splits"].items():
        counts = [count for count in part["class_counts"].values() if count]
        quantiles = ", ".join(f"{name} {value:,}" for name, value in part["length_quantiles"].items())
        lines += [
            f"  {split}: {part['samples']:,} samples of {len(counts)} classes "
            f"({min(counts):,} to {max(counts):,} each), {part['bytes']:,} bytes "
            f"in {len(part['shards']):,} shards",
            f"    bytes per sample: {quantiles}",
        ]
    return "\n".join(lines)


def verify_split(split: Split) -> list[str]:
    """Read everything, and name whatever is not as dataset.json and the index say."""
    problems = verify_index(split)
    for number in range(len(split.shards)):
        problems += verify_shard(split, number)
    return problems


def verify_index(split: Split) -> list[str]:
    """Compare the index files with their sha256."""
    files = read_description(split.path)["splits"][split.split]["index"].values()
    problems = []
    for entry in files:
        with open(split.path / entry["file"], "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                problems.append(f"{split.path / entry['file']}: differs from the sha256 in {DESCRIPTION}")
    return problems


def verify_shard(split: Split, number: int) -> list[str]:
    """Compare one tar with its size, its sha256 and the index: key, class, place and bytes of each sample."""
    shard = split.shards[number]
    path = split.path / shard.file
    first, end = split.shard_starts[number : number + 2].tolist()
    if not path.exists():
        return [f"{path}: the shard is missing, and with it {shard.samples:,} samples"]
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        return [f"{path}: the shard is empty, {DESCRIPTION} says {shard.bytes:,} bytes"]
    problems = []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if size_bytes != shard.bytes:
            problems.append(f"{path}: has {size_bytes:,} bytes, {DESCRIPTION} says {shard.bytes:,}")
        if hashlib.sha256(content).hexdigest() != shard.sha256:
            problems.append(f"{path}: differs from the sha256 in {DESCRIPTION}")
        rows = split.samples[first:end]
        ends = rows["offset"] + rows["length"]
        lost = np.flatnonzero(ends > size_bytes)
        if len(lost):  # one line: a shard cut in its middle would otherwise fill thousands
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
    """What the index says of the samples of one shard, and what the tar says."""
    path = split.path / split.shards[number].file
    first, end = split.shard_starts[number : number + 2].tolist()
    if len(found.samples) != end - first:
        return [f"{path}: holds {len(found.samples):,} samples, the index says {end - first:,}"]
    problems = []
    key_start = 0
    for i, row in enumerate(found.samples, start=first):
        key = found.keys[key_start : row["key_end"]].decode("utf-8", "backslashreplace")
        key_start = row["key_end"]
        indexed = split.samples[i]
        in_tar = (key, number, *(int(row[field]) for field in ("label", "offset", "length")))
        in_index = (split.key(i), *(int(indexed[field]) for field in ("shard", "label", "offset", "length")))
        if in_tar != in_index:
            problems.append(
                f"{path}: sample {i}: key, shard, class, offset, length are {in_tar} in the tar "
                f"and {in_index} in the index"
            )
        if in_index[2] >= len(split.classes):
            problems.append(f"{path}: sample {key!r}: class {in_index[2]} of {len(split.classes)} classes")
    return problems

"""Indexing WebDataset tars that were made elsewhere."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bfsys.data.media.encodings import AS_STORED
from bfsys.data.packing.splits import SPLIT_FOLDERS, split_of_name
from bfsys.data.storage.classes import Spelling, stored_name, too_alike
from bfsys.data.storage.description import DESCRIPTION
from bfsys.data.storage.shards import write_description, write_split
from bfsys.data.storage.tars import TarIndex, how_to_decompress, read_shard
from bfsys.errors import UserError, collecting, is_printable, some
from bfsys.files import exists, is_dir

REBUILT = "tools/inspect_shards.py --rebuild"  # in dataset.json
# Foreign tars may have LEAST_CLASS_LIMIT classes, or CLASSES_PER_SAMPLE per sample, whichever is more.
LEAST_CLASS_LIMIT, CLASSES_PER_SAMPLE = 10_000, 10
COMPRESSED_TAR = re.compile(r"(.+)\.(?:tar\.\w+|t[gx]z|tbz2?|tzst)", re.IGNORECASE)


def rebuild(folder: Path, split: str | None) -> None:
    """Index the tars in a folder. Encoding and class names are derived from the tars as far as possible."""
    if not is_dir(folder):
        raise UserError(f"{folder}: there is no such folder")
    if exists(folder / DESCRIPTION):
        raise UserError(f"{folder}: has a {DESCRIPTION} already; to make a new index, delete that file first")
    shards_of: dict[str, list[TarIndex]] = {}
    problems: list[str] = []
    for split_name, paths in tars_by_split(folder, split).items():
        for path in paths:
            with collecting(problems):
                shards_of.setdefault(split_name, []).append(read_shard(path))
    for shards in shards_of.values():
        problems += keys_in_two_shards(shards)
    all_shards = [index for shards in shards_of.values() for index in shards]
    problems = problems or absurd_class_numbers(folder, all_shards)
    if problems:
        raise UserError(*problems)
    classes, notes = class_names(all_shards)
    name = folder.resolve().name
    parts = {
        split_name: write_split(folder, name, split_name, classes, shards)
        for split_name, shards in sorted(shards_of.items())
    }
    made_by = {"tool": REBUILT}
    write_description(folder, name, classes, AS_STORED, made_by, parts, notes)


def keys_in_two_shards(shards: Sequence[TarIndex]) -> list[str]:
    first_in: dict[str, TarIndex] = {}
    problems = []
    for index in shards:
        for key in index.key_list():
            if first_in.setdefault(key, index) is not index:
                problems.append(
                    f"sample {key!r} is in {first_in[key].shard.file} and in {index.shard.file}; remove one of them"
                )
    return problems


def absurd_class_numbers(folder: Path, shards: Sequence[TarIndex]) -> list[str]:
    """Problems of class numbers that are implausibly large for so few samples. All numbers up to the largest are
    classes."""
    limit = max(LEAST_CLASS_LIMIT, CLASSES_PER_SAMPLE * sum(len(index.samples) for index in shards))
    problems = []
    for index in shards:
        labels = index.samples["label"]
        if labels.max() >= limit:
            largest = labels.argmax()
            problems.append(
                f"{folder / index.shard.file}: member {index.key_list()[largest]}.cls holds {labels[largest]}, the "
                f"largest of {np.count_nonzero(labels >= limit):,} class numbers of {limit:,} and more: that is taken "
                "for a mistake in a dataset of this size. Number the classes 0, 1, 2, … without gaps"
            )
    return problems


def tars_by_split(folder: Path, split: str | None) -> dict[str, list[Path]]:
    """The tars of each split, by the split in their names; all tars if `split` is given."""
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    tars = [path for path in files if path.suffix.lower() == ".tar"]
    decompressed = {path.stem.lower() for path in tars}
    compressed = []
    for path in files:
        named = COMPRESSED_TAR.fullmatch(path.name)
        is_missing = named[1].lower() not in decompressed if named else not tars
        if is_missing and (remedy := how_to_decompress(path)):
            compressed.append(f"{path}: {remedy}")
    if compressed:
        raise UserError(*compressed)
    if not tars:
        raise UserError(f"{folder}: holds no .tar files")
    if split:
        return {split: tars}
    by_split: dict[str, list[Path]] = {}
    unclear = []
    for path in tars:
        found = re.fullmatch(r"(?:.*-)?([^-]+)-\d+", path.stem)
        name = split_of_name(found[1]) if found else None
        if name:
            by_split.setdefault(name, []).append(path)
        else:
            unclear.append(path.name)
    if unclear:
        raise UserError(
            f"{folder}: no split in the name of {', '.join(unclear[:3])}{' …' if len(unclear) > 3 else ''}; "
            f"expected NAME-SPLIT-NUMBER.tar with SPLIT one of {', '.join(SPLIT_FOLDERS)}, or give --split"
        )
    return by_split


def class_names(shards: Sequence[TarIndex]) -> tuple[list[str], list[str]]:
    """The first folders in the keys, if they match the class numbers one to one; otherwise the numbers. The second list
    holds a note if there are as many folders as numbers, so that the tars may number the classes differently."""
    labels = [label for index in shards for label in index.samples["label"].tolist()]
    folders = [key.partition("/")[::2] for index in shards for key in index.key_list()]
    pairs = {(label, folder) for label, (folder, rest) in zip(labels, folders, strict=True) if rest}
    count = max(labels) + 1
    if all(rest for _, rest in folders) and len({folder for _, folder in pairs}) == len(pairs) == count:
        names = [folder for _, folder in sorted(pairs)]
        problems = [
            f"class {name!r}: has characters that cannot be printed" for name in names if not is_printable(name)
        ]
        problems += too_alike({name: Spelling([f"class number {label}"]) for label, name in enumerate(names)})
        if problems:
            raise UserError(*problems)
        return [stored_name(name) for name in names], []
    notes = []
    if all(rest for _, rest in folders) and len({folder for _, folder in pairs}) == len(set(labels)) < len(pairs):
        twice = next(folder for folder, times in Counter(folder for _, folder in sorted(pairs)).items() if times > 1)
        numbers = [str(label) for label, folder in sorted(pairs) if folder == twice]
        notes = [
            f"the samples in folder {twice} have the class numbers {some(numbers)}: the folders do not match the class "
            "numbers. If the folders are the classes, the tars number them differently, and must be made again"
        ]
    return [f"{label:0{len(str(count - 1))}}" for label in range(count)], notes

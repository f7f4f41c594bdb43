"""Reference files, whose bytes replace those of a file to measure their evidence.

They come from the evaluation split of the run, with the run's byte transforms applied. They have other classes and, if
possible, the same format, so bytes that all files of a format share have no evidence. If no such file can be read, the
bytes of the file itself are used in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from bfsys.config import Config
from bfsys.data.streaming.byte_transforms import ByteTransform, apply
from bfsys.data.streaming.datasets import Sources, open_evaluation
from bfsys.data.streaming.plan import MicroBatch
from bfsys.data.streaming.reader import ShardReader
from bfsys.errors import UserError
from bfsys.explain.ranges import Structure
from bfsys.explain.structure import structure
from bfsys.locations import is_remote

SHUFFLED = "the bytes of the file itself in another order"
READ = 64  # files of the split from which the references are chosen


@dataclass(frozen=True)
class LabelledFile:
    """A file of a packed split, as it is stored and as the model reads it."""

    stored: np.ndarray  # uint8 [bytes]
    data: np.ndarray  # uint8 [bytes], after the byte transforms
    label: int  # position in the run's classes
    source: int  # position in Sources.splits
    structure: Structure  # of `stored`, up to the length of `data`


def open_split(config: Config, split: str, classes: Sequence[str]) -> Sources:
    """The split of each source, without byte transforms. Raises UserError."""
    plain = replace(config, data=replace(config.data, byte_transforms=()))
    return open_evaluation(plain, split, classes)


def read_files(
    sources: Sources, transforms: Sequence[ByteTransform], count: int, seed: int
) -> tuple[list[LabelledFile], int]:
    """`count` files of a split, drawn with the seed, or all of them; and the number that could not be read."""
    sizes = [len(split) for split in sources.splits]
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(sum(sizes), min(count, sum(sizes)), replace=False))
    source = np.searchsorted(np.cumsum(sizes), chosen, side="right")
    sample = chosen - (np.cumsum(sizes) - sizes)[source]
    reader = ShardReader(sources, replace_bad=False)
    try:
        raw = reader.read(MicroBatch(source, sample, np.zeros(len(chosen), np.int64)))
    finally:
        reader.close()
    files = []
    contents = [raw.data[first:end] for first, end in pairwise(raw.offsets)]
    for stored, label, place in zip(contents, raw.labels.tolist(), raw.sources.tolist(), strict=True):
        data = apply(transforms, stored, np.random.default_rng(0))
        files.append(LabelledFile(stored, data, label, place, structure(stored, len(data))))
    return files, len(raw.bad)


def candidates(
    config: Config, classes: Sequence[str], transforms: Sequence[ByteTransform], seed: int
) -> list[LabelledFile]:
    """Files of the evaluation split; none if they are not on this machine, or cannot be read as the model reads
    files."""
    if len(transforms) != len(config.data.byte_transforms):  # a transform's key is missing
        return []
    # Remote sources are not opened: explaining a file with a foreign run must not execute its `pipe:` command.
    if any(is_remote(source.eval_path or source.path) for source in config.data.sources):
        return []
    try:
        sources = open_split(config, config.data.eval_split, classes)
        if not sources.splits:
            return []
        return read_files(sources, transforms, READ, seed)[0]
    except (UserError, OSError):
        return []


def choose(
    files: Sequence[LabelledFile], data: np.ndarray, format: str, index: int, count: int, seed: int
) -> tuple[list[np.ndarray], str]:
    """`count` references uint8 [n] for a file uint8 [n] of a format and class, and a description of them."""
    rng = np.random.default_rng([seed, 1])
    others = [one for one in files if one.label != index and len(one.data)]
    alike = [one for one in others if one.structure.format == format]
    pool, kind = (alike, f"{format} files") if alike else (others, "files")
    if not pool:
        return [rng.permutation(data) for _ in range(count)], SHUFFLED
    chosen = [pool[i] for i in rng.permutation(len(pool))[:count]]
    return [np.resize(one.data, len(data)) for one in chosen], f"{len(chosen)} validation {kind} of other classes"

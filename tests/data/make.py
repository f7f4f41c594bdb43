"""Data for tests: class-folder trees, and splits that exist in memory only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bfsys.data.storage.shards import SAMPLE, Dataset, Split
from bfsys.data.storage.tars import Shard


def write_tree(root: Path, classes: Sequence[str], files: int, longest: int, rng: np.random.Generator) -> None:
    """Write `files` files per class of 1 to `longest` bytes, drawn around the mean of the class."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(files):
            values = rng.normal(40 + 60 * c, 10, rng.integers(1, longest + 1)).clip(0, 255)
            (root / name / f"{i:03}.bin").write_bytes(values.astype(np.uint8).tobytes())


def split_in_memory(shard_sizes: Sequence[int], lengths: np.ndarray | None = None, name: str = "memory") -> Split:
    """A split with an index and without tars, which is enough for a plan."""
    samples = np.zeros(sum(shard_sizes), SAMPLE)
    samples["shard"] = np.repeat(np.arange(len(shard_sizes)), shard_sizes)
    samples["length"] = 100 if lengths is None else lengths
    return Split(
        dataset=Dataset("nowhere", {"name": name, "classes": ["x"], "splits": {}}),
        split="train",
        shards=tuple(Shard(f"{i}.tar", n, 0, "") for i, n in enumerate(shard_sizes)),
        samples=samples,
        keys=np.zeros(0, np.uint8),
        bytes=int(samples["length"].sum()),
        length_quantiles={"max": int(samples["length"].max(initial=0))},
        fingerprint=f"{name}{list(shard_sizes)}",
    )

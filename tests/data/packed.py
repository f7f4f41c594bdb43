"""Small packed datasets for tests, and the batches that the loader makes of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from unittest import mock

import numpy as np
from hypothesis import strategies as st

from bfsys.batch import ByteBatch
from bfsys.config import Config, Data, Source, Train
from bfsys.data.storage.shards import write_description, write_split
from bfsys.data.storage.tars import Member, write_shard
from bfsys.data.streaming.datasets import make_plan, open_training
from bfsys.data.streaming.loader import training_batches
from bfsys.dist import Ranks

Shards = Sequence[Sequence[tuple[int, bytes]]]  # (class, content) of every sample

# Shards of one sample, empty shards, fewer shards than lanes, many tiny shards, one large shard
shard_sizes = st.one_of(
    st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    st.integers(1, 20).map(lambda n: [1] * n),
    st.integers(1, 60).map(lambda n: [n]),
)
rules = st.one_of(st.sampled_from(["weights", "proportional", "sqrt"]), st.floats(0.3, 20))


def pack(folder: Path, name: str, splits: dict[str, Shards], classes: Sequence[str] = ("x", "y")) -> Path:
    """Write a dataset into a new folder, without waiting for the disk."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    with mock.patch("os.fsync"):
        parts = {}
        for split, shards in splits.items():
            written = [
                write_shard(
                    path / f"{name}-{split}-{number:06}.tar",
                    [Member(f"{number}-{i}", "bin", content, label) for i, (label, content) in enumerate(shard)],
                )
                for number, shard in enumerate(shards)
            ]
            parts[split] = write_split(path, name, split, classes, written)
        write_description(path, name, classes, "bin", {}, parts)
    return path


def random_shards(sizes: Sequence[int], rng: np.random.Generator, longest: int = 40) -> Shards:
    return [[(int(rng.integers(2)), rng.bytes(int(rng.integers(1, longest + 1)))) for _ in range(n)] for n in sizes]


@dataclass(frozen=True)
class Case:
    """Datasets and a run on them, before they are written."""

    sources: tuple[Shards, ...]
    data: Data  # without paths
    train: Train

    @contextmanager
    def packed(self) -> Iterator[Config]:
        with tempfile.TemporaryDirectory() as folder:
            paths = [pack(Path(folder), f"s{i}", {"train": shards}) for i, shards in enumerate(self.sources)]
            sources = [replace(s, path=str(path)) for s, path in zip(self.data.sources, paths, strict=True)]
            yield Config(data=replace(self.data, sources=tuple(sources)), train=self.train, name="run")

    def samples(self, source: int) -> list[tuple[int, bytes]]:
        return [sample for shard in self.sources[source] for sample in shard]


@st.composite
def cases(draw, max_lanes: int = 6) -> Case:
    sizes = draw(st.lists(shard_sizes, min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    lanes = draw(st.integers(1, max_lanes))
    data = Data(
        sources=tuple(Source("", weight=draw(st.floats(0.01, 10))) for _ in sizes),
        mixture=draw(rules),
        batch_samples=lanes * len(sizes) + draw(st.integers(0, 15)),
        lanes=lanes,
        shuffle_block=draw(st.integers(1, 12)),
    )
    train = Train(steps=30, seed=draw(st.integers(0, 3)))
    return Case(tuple(random_shards(s, rng) for s in sizes), data, train)


def rank(number: int, of: int) -> Ranks:
    return Ranks(number, of, number, of)


def read_steps(config: Config, first: int = 0, stop: int | None = None, world_size: int = 1) -> list[list[ByteBatch]]:
    """Open a run, and read steps first … stop on every rank. Returns the micro-batches of each step, by lane."""
    steps = (config.train.steps if stop is None else stop) - first
    per_rank = config.data.lanes // world_size
    ranks = []
    for number in range(world_size):
        batches = open_batches(config, first, number, world_size)
        ranks.append(list(islice(batches, steps * per_rank)))
        batches.close()
    return [[b for r in ranks for b in r[step * per_rank : (step + 1) * per_rank]] for step in range(steps)]


def open_batches(config: Config, first: int = 0, number: int = 0, world_size: int = 1) -> Iterator[ByteBatch]:
    """Yield a rank's micro-batches from step `first` on, after opening everything again."""
    sources = open_training(config)
    return training_batches(config, sources, make_plan(config, sources), rank(number, world_size), first_step=first)


def content(batch: ByteBatch) -> list[tuple[int, int, int, bytes]]:
    """(source, sample, class, bytes) of every file."""
    files = np.split(batch.data.numpy(), batch.offsets[1:-1].numpy())
    return [
        (*numbers, file.tobytes())
        for *numbers, file in zip(
            batch.sources.tolist(), batch.samples.tolist(), batch.labels.tolist(), files, strict=True
        )
    ]


def contents(steps: list[list[ByteBatch]]) -> list[list[list[tuple]]]:
    return [[content(batch) for batch in step] for step in steps]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def resource_names() -> set[str]:
    """The names of objects in shared memory."""
    return set(os.listdir("/dev/shm"))

"""Reading micro-batches: the right bytes and classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bfsys.data import reader as reader_module
from bfsys.data.plan import MicroBatch
from bfsys.data.reader import ShardReader
from bfsys.data.shards import open_split


def micro_batch(samples: list[int]) -> MicroBatch:
    return MicroBatch(np.zeros(len(samples), np.int64), np.array(samples), np.zeros(len(samples), np.int64))


@pytest.fixture
def reader(datasets: Path) -> ShardReader:
    return ShardReader([open_split(datasets / "a", "train")], [np.array([7, 8, 9])], ["a"])


def test_bytes_are_those_of_the_files(datasets: Path, reader: ShardReader) -> None:
    split = reader.splits[0]
    batch = reader.read(micro_batch(list(range(len(split)))))
    for i in range(len(split)):
        folder, name = split.key(i).split("/")
        expected = (datasets / "trees" / "a" / "train" / folder / f"{name}.bin").read_bytes()
        assert batch.data[batch.offsets[i] : batch.offsets[i + 1]].tobytes() == expected
        assert batch.labels[i] == 7 + int(folder[1])


def test_few_files_stay_open(datasets: Path, reader: ShardReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "OPEN_SHARDS", 2)
    split = reader.splits[0]
    assert len(split.shards) > 2
    one_by_one = [reader.read(micro_batch([i])).data.tolist() for i in range(len(split))]
    assert len(reader._files) == 2
    assert one_by_one == [reader.read(micro_batch([i])).data.tolist() for i in range(len(split))]

"""Reading micro-batches: the right bytes and classes."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bfsys.data.media.content import NONE
from bfsys.data.storage.shards import Split, open_split
from bfsys.data.streaming import reader as reader_module
from bfsys.data.streaming import shard_files
from bfsys.data.streaming.datasets import OpenSource, Sources
from bfsys.data.streaming.plan import MicroBatch
from bfsys.data.streaming.reader import ShardReader
from bfsys.errors import UserError


def micro_batch(samples: list[int]) -> MicroBatch:
    return MicroBatch(np.zeros(len(samples), np.int64), np.array(samples), np.zeros(len(samples), np.int64))


@pytest.fixture
def sources(datasets: Path) -> Sources:
    return sources_in(datasets / "a")


def sources_in(dataset: Path) -> Sources:
    split = open_split(dataset, "train")
    return Sources(tuple("0123456789"), (OpenSource(0, "a", "a", split, np.array([7, 8, 9])),))


@pytest.fixture
def reader(sources: Sources) -> ShardReader:
    return ShardReader(sources)


def test_bytes_are_those_of_the_files(datasets: Path, reader: ShardReader) -> None:
    split = reader.splits[0]
    batch = reader.read(micro_batch(list(range(len(split)))))
    for i in range(len(split)):
        folder, name = split.key(i).split("/")
        expected = (datasets / "trees" / "a" / "train" / folder / f"{name}.bin").read_bytes()
        assert batch.data[batch.offsets[i] : batch.offsets[i + 1]].tobytes() == expected
        assert batch.labels[i] == 7 + int(folder[1])


@pytest.mark.parametrize("limit", ["of the reader", "of the process"])
def test_few_files_stay_open(limit: str, reader: ShardReader, monkeypatch: pytest.MonkeyPatch) -> None:
    if limit == "of the reader":
        monkeypatch.setattr(shard_files, "OPEN_SHARDS", 2)
    else:
        monkeypatch.setattr(shard_files, "open_files_limit", lambda: 8)  # a third of the shards
    split = reader.splits[0]
    assert len(split.shards) > 2
    one_by_one = [reader.read(micro_batch([i])).data.tolist() for i in range(len(split))]
    assert len(reader._files.descriptors) == 2
    assert one_by_one == [reader.read(micro_batch([i])).data.tolist() for i in range(len(split))]


def test_a_read_is_continued(reader: ShardReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call reads 2 GiB at most, and a signal may end it earlier."""
    want, really_read = reader.read(micro_batch([0, 1])).data.tolist(), os.preadv

    def read_little(descriptor: int, buffers: list, offset: int) -> int:
        return really_read(descriptor, [memoryview(buffers[0])[:3]], offset)

    monkeypatch.setattr(os, "preadv", read_little)
    batch = reader.read(micro_batch([0, 1]))
    assert (batch.data.tolist(), batch.bad) == (want, ())


def test_too_many_open_files_are_reported_without_retries(reader: ShardReader, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_shard(self, number: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Split, "open_shard", open_shard)
    monkeypatch.setattr(shard_files, "RETRY_AFTER_S", (600.0,))
    with pytest.raises(UserError, match=r"too many open files: .*raise the limit \(ulimit -n"):
        reader.read(micro_batch([0]))


@pytest.mark.parametrize(
    ("number", "code", "text"),
    [
        (errno.ESTALE, 1, "start again when the server or this machine has recovered"),
        (errno.ETIMEDOUT, 1, "start again when the server or this machine has recovered"),
        (errno.EACCES, 2, "fix this, and start again"),
        (errno.ENOMEM, 1, "start again when the server or this machine has recovered"),
    ],
)
def test_an_outage_makes_no_sample_bad(
    number: int, code: int, text: str, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any place: the shard cannot be opened, or an open one cannot be read."""

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shard_files, "RETRY_AFTER_S", (0.0, 0.0))
    reader = ShardReader(sources)
    shards = len(sources.splits[0].shards)
    reader._files._failing = {(0, shard) for shard in range(shards)}  # because of bad sectors, for example
    with monkeypatch.context() as patch:
        patch.setattr(Split, "open_shard", fail)
        with pytest.raises(UserError, match=text):
            reader.read(micro_batch([0]))
    for owner, name in ((Split, "open_shard"), (os, "preadv")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(UserError, match=rf"a-train-\d+\.tar cannot be read: .*; {text}") as error:
                ShardReader(sources).read(micro_batch([0]))
        assert error.value.exit_code == code


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT])
def test_a_shard_is_bad_if_its_dataset_can_be_reached(
    number: int, datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken sector and a server that times out give the same error; so do a deleted shard and a lost mount."""
    dataset = shutil.copytree(datasets / "a", tmp_path / "a")
    reader = ShardReader(sources_in(dataset))
    really_open, failing = Split.open_shard, {reader.splits[0].samples["shard"][0]}

    def open_shard(split: Split, shard: int) -> int:
        if shard in failing:
            raise OSError(number, os.strerror(number))
        return really_open(split, shard)

    monkeypatch.setattr(Split, "open_shard", open_shard)
    monkeypatch.setattr(shard_files, "RETRY_AFTER_S", (0.0,))
    assert [row.sample for row in reader.read(micro_batch([0])).bad][:1] == [0]
    shutil.rmtree(dataset)
    failing = set(range(len(reader.splits[0].shards)))
    reader.close()
    with pytest.raises(
        UserError, match=r"cannot be read: .*; start again when the server or this machine has recovered"
    ) as error:
        reader.read(micro_batch(list(range(1, len(reader.splits[0])))))
    assert error.value.exit_code == 1


def test_running_out_of_memory_makes_no_file_bad(reader: ShardReader) -> None:
    """Another process may use the memory. The file is intact, on another machine or a minute later."""

    class Hungry:
        mixes = False

        def __call__(self, *_: object) -> None:
            raise MemoryError

    reader.sources, reader.is_plain = (replace(reader.sources[0], augmentation=Hungry()),), False  # type: ignore[arg-type]
    with pytest.raises(MemoryError):
        reader.read(micro_batch([0]))


def test_a_file_that_shows_nothing_is_decoded_once(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bytes] = []

    def content_of(data: bytes) -> np.ndarray:
        tried.append(data)
        return NONE if data == tried[0] else np.zeros_like(NONE)

    monkeypatch.setattr(reader_module, "content_of", content_of)
    monkeypatch.setattr(reader_module, "kind_of", lambda content: "a PNG")
    reader = ShardReader(sources, with_content=True)
    for _ in range(2):
        content = reader.read(micro_batch([0, 1])).content
        assert content is not None
        assert np.isnan(content[0]).all()
        assert not content[1].any()
    assert len(tried) == 3
    # Jitter may make a sound too long for a table, but not in the next draw. Another process must find the same.
    reader = ShardReader(sources, with_content=True)
    reader.sources = (replace(reader.sources[0], jitter=lambda content, rng: content),)  # type: ignore[arg-type]
    for _ in range(2):
        reader.read(micro_batch([0, 1]))
    assert len(tried) == 7
    assert ShardReader(sources).read(micro_batch([0, 1])).content is None

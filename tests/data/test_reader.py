"""Reading micro-batches: the right bytes, the right classes, and damage named."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from bfsys.config import load_config
from bfsys.data import reader as reader_module
from bfsys.data.loader import evaluation_rounds, make_plan, open_sources, training_batches, union_of_classes
from bfsys.data.plan import MicroBatch, evaluation_batches
from bfsys.data.reader import ShardReader
from bfsys.data.shards import open_split
from bfsys.dist import Ranks
from bfsys.errors import UserError
from bfsys.train import open_data


def rank(number: int, of: int) -> Ranks:
    return Ranks(number, of, number, of)


def micro_batch(samples: list[int]) -> MicroBatch:
    return MicroBatch(np.zeros(len(samples), np.int64), np.array(samples), np.zeros(len(samples), np.int64))


@pytest.fixture
def reader(datasets: Path) -> ShardReader:
    return ShardReader([open_split(datasets / "a", "train")], [np.array([7, 8, 9])])


def test_bytes_are_those_of_the_files(datasets: Path, reader: ShardReader) -> None:
    split = reader.splits[0]
    batch = reader.read(micro_batch(list(range(len(split)))))
    for i in range(len(split)):
        folder, name = split.key(i).split("/")
        expected = (datasets / "trees" / "a" / "train" / folder / f"{name}.bin").read_bytes()
        assert batch.data[batch.offsets[i] : batch.offsets[i + 1]].numpy().tobytes() == expected
        assert batch.labels[i] == 7 + int(folder[1])


def test_few_files_stay_open(datasets: Path, reader: ShardReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "OPEN_SHARDS", 2)
    split = reader.splits[0]
    assert len(split.shards) > 2
    one_by_one = [reader.read(micro_batch([i])).data.tolist() for i in range(len(split))]
    assert len(reader._files) == 2
    assert one_by_one == [reader.read(micro_batch([i])).data.tolist() for i in range(len(split))]


def test_a_reader_pickles_without_its_files(reader: ShardReader) -> None:
    expected = reader.read(micro_batch([3, 1])).data
    assert pickle.loads(pickle.dumps(reader)).read(micro_batch([3, 1])).data.equal(expected)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_named(datasets: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(datasets / "a", tmp_path / "a")
    split = open_split(tmp_path / "a", "train")
    record = split.samples[5]
    tar = tmp_path / "a" / split.shards[record["shard"]].file
    content = bytearray(tar.read_bytes())
    if damage == "flip":
        content[record["offset"]] ^= 1
        tar.write_bytes(content)
    elif damage == "cut":
        tar.write_bytes(content[: record["offset"]])
    else:
        tar.unlink()
    with pytest.raises(UserError) as error:
        ShardReader([split], [np.arange(3)]).read(micro_batch([5]))
    assert str(tar) in str(error.value)
    assert damage == "remove" or split.key(5) in str(error.value)


def test_global_batches_do_not_depend_on_ranks_or_workers(config_file: Path) -> None:
    config = load_config(config_file)
    classes = union_of_classes(config)
    sources = open_sources(config, "train", classes)

    def steps(world_size: int, workers: int, first_step: int) -> list[list[tuple]]:
        changed = load_config(config_file, [f"data.workers={workers}", "train.steps=6"])
        plan = make_plan(changed, sources)
        per_rank = [
            list(training_batches(changed, sources, plan, rank(r, world_size), first_step=first_step))
            for r in range(world_size)
        ]
        lanes = changed.data.lanes // world_size
        return [
            [
                (b.sources.tolist(), b.samples.tolist(), b.data.tolist())
                for batches in per_rank
                for b in batches[lanes * step : lanes * (step + 1)]
            ]
            for step in range(6 - first_step)
        ]

    alone = steps(1, 0, 0)
    assert steps(2, 0, 0) == alone
    assert steps(4, 0, 0) == alone
    assert steps(2, 2, 0) == alone
    assert steps(1, 0, 4) == alone[4:]


def test_evaluation_gives_each_file_once_in_equal_rounds(config_file: Path) -> None:
    config = load_config(config_file)
    sources = open_sources(config, "val", union_of_classes(config))
    total = len(evaluation_batches(sources.splits, config.data.eval_batch_bytes))
    assert total % 3, "the last round should be incomplete for this test to say something"
    per_rank = [list(evaluation_rounds(config, sources, rank(r, 3))) for r in range(3)]
    assert len({len(rounds) for rounds in per_rank}) == 1
    seen = [
        (s, i)
        for rounds in per_rank
        for batch, counts in rounds
        if counts
        for s, i in zip(batch.sources.tolist(), batch.samples.tolist(), strict=True)
    ]
    assert sorted(seen) == [(s, i) for s, split in enumerate(sources.splits) for i in range(len(split))]


def test_classes_of_equal_name_are_one(config_file: Path, datasets: Path) -> None:
    config = load_config(config_file)
    assert union_of_classes(config) == ("a0", "a1", "a2", "b0", "b1")
    sources = open_sources(config, "train", ("b1", "a2", "a1", "a0", "b0"))
    assert [m.tolist() for m in sources.label_maps] == [[3, 2, 1], [4, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["model.max_tokens=2"], r"a: \d+ of 120 files are longer than the 8 bytes.*set model.max_tokens to"),
        (["data.train_split=test"], "test"),
        (["data.sources.0.path=/nowhere"], "/nowhere"),
    ],
)
def test_unfit_data_is_refused(config_file: Path, change: list[str], message: str) -> None:
    config = load_config(config_file, change)
    with pytest.raises(UserError, match=message):
        open_data(config, rank(0, 1))


def test_a_byte_budget_that_cannot_be_kept_names_the_lanes(config_file: Path) -> None:
    config = load_config(config_file, ["data.micro_batch_bytes=60"])
    with pytest.raises(UserError, match=r"over the budget of 60; \d+ or more lanes would fit"):
        make_plan(config, open_sources(config, "train", union_of_classes(config)))


def test_a_source_without_the_evaluation_split_is_left_out(config_file: Path) -> None:
    config = load_config(config_file, ["data.eval_split=nothing"])
    assert open_data(config, rank(0, 1))[2] is None

"""Each baseline uses only its own features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from bfsys.baselines import FIRST_BYTES, Table
from bfsys.batch import ByteBatch, Sample
from bfsys.cli import call
from bfsys.config import Config, Data, Source, load_config
from bfsys.data.streaming.datasets import open_evaluation, open_training
from bfsys.errors import UserError
from tests.commands.packing_helpers import make_files, png_bytes
from tests.data.packed import pack
from tools.bench import baselines


def table(lengths: list[int], values: list[int], labels: list[int]) -> Table:
    counts = np.zeros((len(values), 256))
    counts[np.arange(len(values)), values] = 1.0
    first = np.tile(np.array(values)[:, None], (1, FIRST_BYTES))
    return Table(np.array(lengths), counts, first, np.array(labels))


def test_sizes_tell_classes_apart_only_if_they_differ() -> None:
    train = table([10, 12, 1000, 1100, 90, 100], [0] * 6, [0, 0, 1, 1, 2, 2])
    assert baselines.nearest_size(train, table([11, 950, 80], [0] * 3, [0, 1, 2])) == 1.0
    assert baselines.nearest_size(train, table([11, 950, 80], [0] * 3, [1, 2, 0])) == 0.0
    alike = table([50] * 4, [0] * 4, [0, 1, 0, 1])
    assert baselines.nearest_size(alike, table([50] * 2, [0] * 2, [0, 1])) == 0.5


def test_byte_counts_see_values_and_no_sizes() -> None:
    train = table([5] * 8, [1, 2] * 4, [0, 1] * 4)
    assert baselines.byte_counts(train, table([7, 7], [1, 2], [0, 1])) == 1.0
    alike = table([5, 900] * 4, [1] * 8, [0, 1] * 4)
    assert baselines.byte_counts(alike, table([5, 900], [1, 1], [0, 1])) == 0.5


def test_first_bytes_see_places() -> None:
    """Files have a mark at byte 5 or at byte 7 among random bytes. Some are shorter than the table."""
    rng = np.random.default_rng(0)

    def files(count: int) -> Table:
        batch = ByteBatch.from_samples([
            Sample(str(i), np.insert(rng.integers(0, 250, 30 + 60 * (i % 3)), 5 + 2 * (i % 2), 255).astype(np.uint8),
                   label=i % 2)
            for i in range(count)
        ])  # fmt: skip
        return Table.of(iter([batch]))

    train, val = files(200), files(60)
    assert baselines.first_bytes(train, val) > 0.9
    assert baselines.byte_counts(train, val) < 0.7


def test_files_of_which_transforms_leave_nothing_have_the_smallest_size() -> None:
    train = table([0, 1, 0, 900, 1000], [0] * 5, [0, 0, 0, 1, 1])
    assert baselines.nearest_size(train, table([0, 2, 950], [0] * 3, [0, 0, 1])) == 1.0


def sorted_by_class(folder: Path, files: int) -> Config:
    """A config on a tar that holds first all files of one class, then a third as many of the other."""
    shard = [(label, bytes([label + 1]) * 20) for label in (0,) * files + (1,) * (files // 3)]
    path = pack(folder, "sorted", {"train": [shard], "val": [[(0, b"0"), (1, b"1"), (0, b"2"), (1, b"3")]]})
    data = Data(sources=(Source(str(path)),), batch_samples=8, lanes=1, shuffle_block=16)
    return Config(data=data, name="run")


def test_the_largest_class_is_that_of_all_training_files(tmp_path: Path) -> None:
    training = open_training(sorted_by_class(tmp_path, 3))
    assert baselines.largest_class(training, table([1] * 4, [0] * 4, [1, 0, 0, 0])) == 0.75


def test_a_limit_on_training_files_leaves_each_class_its_share(tmp_path: Path) -> None:
    config = sorted_by_class(tmp_path, 600)
    training = open_training(config)
    train, val = baselines.tables_of(config, training, open_evaluation(config, "val", training.classes), 160)
    assert (len(train.labels), len(val.labels)) == (160, 4)
    assert 0.15 < train.labels.mean() < 0.35


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """A config on pictures of two colours and one size."""
    rng = np.random.default_rng(0)
    names = {
        f"{split}/{name}/{i}.png": png_bytes(8, 8, value + int(rng.integers(40)))
        for split, count in (("train", 24), ("val", 6))
        for name, value in (("dark", 20), ("light", 160))
        for i in range(count)
    }
    src = make_files(tmp_path / "colours", names)
    call("pack", [str(src), str(tmp_path / "packed"), "--name", "colours", "--workers", "1"])
    config = {
        "data": {"sources": [{"path": str(tmp_path / "packed" / "colours")}], "batch_samples": 8, "lanes": 2},
        "model": {"size": "custom", "dim": 16, "layers": 1, "heads": 2, "merge_after": [], "max_tokens": 64},
        "optim": {"warmup_steps": 2},
        "train": {"steps": 60, "precision": "fp32"},
    }
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "colours.yaml"


def test_the_table_of_a_run(colours: Path, capsys: pytest.CaptureFixture) -> None:
    baselines.main([str(colours), "--decoded", "--side", "16"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 classes, learned from 48 files, judged by 12"
    percent = {line[2:16].strip(): float(line[16:].split()[0]) for line in lines[1:]}
    assert percent["largest class"] == 50.0
    assert percent["decoded"] >= 90.0


def test_a_limit_on_training_files_leaves_all_evaluation_files(colours: Path) -> None:
    config = load_config(colours)
    training = open_training(config)
    validation = open_evaluation(config, "val", training.classes)
    tables = baselines.tables_of(config, training, validation, 16)
    assert [len(each.labels) for each in tables] == [16, 12]
    assert set(tables[0].labels) == {0, 1}


def test_files_that_the_decoded_baseline_cannot_read_are_reported(config_file: Path) -> None:
    with pytest.raises(UserError, match="give one source at a time"):
        baselines.main([str(config_file), "--decoded"])
    with pytest.raises(UserError, match="neither pictures nor sounds"):
        baselines.decoder(b"anything", 32)

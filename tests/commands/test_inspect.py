"""The output and exit codes of inspect_shards, and the index that it makes for tars made elsewhere."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset

from bfsys.cli import call
from bfsys.commands.inspect import verify
from bfsys.data.storage.description import read_description
from bfsys.data.storage.shards import open_dataset, open_split
from bfsys.errors import UserError
from tests.conftest import REPOSITORY, closed_output


@pytest.fixture(name="dataset")
def _dataset(tmp_path) -> Path:
    for i in range(40):
        path = tmp_path / "src" / ("cat" if i % 2 else "dog") / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([i]) * (100 + i))
    call("pack", [str(tmp_path / "src"), str(tmp_path), "--name", "pets", "--workers", "1", "--shard-bytes", "20K"])
    return tmp_path / "pets"


def make_tar(path: Path, labels: dict[str, int]) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for key, label in labels.items():
            writer.write({"__key__": key, "bin": key.encode(), "cls": label})


def test_inspect_shows_classes_splits_and_shards(dataset, capsys):
    capsys.readouterr()
    assert call("inspect", [str(dataset)]) == 0
    printed = capsys.readouterr().out
    assert "pets: 2 classes (cat, dog), encoding as_stored" in printed
    assert "  val: " in printed
    assert "pets-train-000000.tar: " in printed


def test_it_lists_samples_of_one_split(dataset, capsys):
    capsys.readouterr()
    assert call("inspect", [str(dataset), "--split", "train", "--list", "3"]) == 0
    printed = capsys.readouterr().out
    assert "val" not in printed
    listed = [line.split("\t") for line in printed.splitlines() if "\t" in line]
    split = open_split(dataset, "train")
    assert [line[0] for line in listed] == [split.key(i) for i in range(3)]
    row = split.samples[0]
    assert listed[0][2:] == [str(row["length"]), "pets-train-000000.tar", str(row["offset"])]
    call("inspect", [str(dataset), "--list", "999"])


def test_progress_is_shown_on_a_terminal_alone(dataset, capsys, monkeypatch):
    """FORCE_COLOR, which many CI systems set, makes no terminal of a log."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    capsys.readouterr()
    assert call("inspect", [str(dataset), "--verify"]) == 0
    assert capsys.readouterr().err == ""


def test_verify_exits_0_if_whole_and_1_if_damaged(dataset, capsys):
    assert call("inspect", [str(dataset), "--verify"]) == 0
    assert "intact: all 40 samples match their checksums" in capsys.readouterr().out
    split = open_split(dataset, "train")
    for number in (0, 1):
        tar = dataset / split.shards[number].file
        data = bytearray(tar.read_bytes())
        data[split.samples["offset"][split.shard_starts[number]]] ^= 1
        tar.write_bytes(data)
    assert call("inspect", [str(dataset), "--verify"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 * 2  # for each shard: its checksum, and the bytes of the sample
    assert all(line.startswith("damage: ") for line in errors)
    assert sum(repr(split.key(0)) in line for line in errors) >= 1
    assert call("inspect", [str(dataset), "--verify", "--split", "val"]) == 0


def test_damage_is_found_if_the_reader_of_the_output_has_ended(dataset):
    (tar, *_) = dataset.glob("*.tar")
    tar.write_bytes(tar.read_bytes()[:-1])
    with closed_output():
        assert call("inspect", [str(dataset), "--verify"]) == 1


@pytest.mark.parametrize("classes", [["dog", "cat"], ["cow", "dog"]])
def test_verify_finds_classes_that_were_renamed(dataset, classes, capsys):
    file = dataset / "dataset.json"
    description = json.loads(file.read_text())
    for part in description["splits"].values():
        part["class_counts"] = dict(zip(classes, part["class_counts"].values(), strict=True))
    file.write_text(json.dumps({**description, "classes": classes}))
    assert call("inspect", [str(dataset), "--verify"]) == 1
    assert f"class {classes[0]!r}: its samples have keys of another class, such as 'cat/" in capsys.readouterr().err


def test_verify_counts_the_samples_of_each_class(dataset, capsys):
    file = dataset / "dataset.json"
    description = json.loads(file.read_text())
    description["splits"]["train"]["class_counts"]["cat"] += 1
    file.write_text(json.dumps(description))
    assert call("inspect", [str(dataset), "--verify"]) == 1
    assert "class 'cat': dataset.json states 19 samples of train, and the index holds 18" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("Cat", "cat"), ("cat", "cat "), ("caf\u00e9", "cafe\u0301")])
def test_rebuild_refuses_classes_that_are_alike(tmp_path, names):
    make_tar(tmp_path / "x-train-000000.tar", {f"{name}/{label}": label for label, name in enumerate(names)})
    with pytest.raises(UserError, match="two classes differ only in"):
        call("inspect", [str(tmp_path), "--rebuild"])


def test_exit_code_2_without_a_dataset(tmp_path):
    command = [sys.executable, REPOSITORY / "tools" / "inspect_shards.py", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path}: holds no dataset.json")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("url", ["https://example.org/pets", "s3://bucket/pets", "pipe:cat"])
def test_a_url_is_refused_with_the_remedy(url):
    with pytest.raises(UserError, match=f"^{url}: inspect takes a folder on this machine; copy the dataset into one"):
        call("inspect", [url])


def test_rebuild_makes_the_same_index(dataset):
    before = {split: open_split(dataset, split) for split in open_dataset(dataset).splits}
    for path in [*dataset.glob("*.npy"), dataset / "dataset.json"]:
        path.unlink()
    assert call("inspect", [str(dataset), "--rebuild", "--verify"]) == 0
    for name, old in before.items():
        new = open_split(dataset, name)
        assert np.array_equal(new.samples, old.samples)
        assert np.array_equal(new.keys, old.keys)
        assert (new.classes, new.shards) == (old.classes, old.shards)


def test_rebuild_of_tars_made_elsewhere(tmp_path):
    make_tar(tmp_path / "imagenet-train-000000.tar", {"00": 0, "01": 11})
    make_tar(tmp_path / "imagenet-train-000001.tar", {"02": 3})
    make_tar(tmp_path / "validation-0.tar", {"00": 2})
    assert call("inspect", [str(tmp_path), "--rebuild"]) == 0
    assert open_dataset(tmp_path).splits == ["train", "val"]
    train = open_split(tmp_path, "train")
    assert train.samples["label"].tolist() == [0, 11, 3]
    assert train.classes == tuple(f"{i:02d}" for i in range(12))
    assert verify(train) == []
    assert read_description(tmp_path)["made_by"] == {"tool": "tools/inspect_shards.py --rebuild"}


def test_rebuild_with_the_split_given(tmp_path):
    make_tar(tmp_path / "shard-0.tar", {"a/1": 1, "b/1": 0})
    with pytest.raises(UserError, match=r"no split in the name of shard-0\.tar; .* or give --split"):
        call("inspect", [str(tmp_path), "--rebuild"])
    assert call("inspect", [str(tmp_path), "--rebuild", "--split", "test"]) == 0
    assert open_split(tmp_path, "test").classes == ("b", "a")


def test_class_names_that_do_not_match_the_numbers_are_not_used(tmp_path):
    make_tar(tmp_path / "x-train-0.tar", {"a/1": 1, "a/2": 0})
    call("inspect", [str(tmp_path), "--rebuild"])
    assert open_split(tmp_path, "train").classes == ("0", "1")


def test_splits_that_number_the_classes_differently_are_noted(tmp_path, capsys):
    make_tar(tmp_path / "x-train-0.tar", {"cat/1": 0, "dog/1": 1})
    make_tar(tmp_path / "x-val-0.tar", {"cat/2": 1, "dog/2": 0})
    assert call("inspect", [str(tmp_path), "--rebuild"]) == 0
    assert open_split(tmp_path, "train").classes == ("0", "1")
    assert "note: the samples in folder cat have the class numbers 0, 1: the folders do not" in capsys.readouterr().out


def test_rebuild_finds_splits_in_any_capitals_and_by_synonyms(tmp_path):
    names = ("x-Train-0.tar", "x-TRAINING-1.TAR", "Dev-0.tar", "x-y-test-000007.tar")
    for number, name in enumerate(names):
        make_tar(tmp_path / name, {f"{number}": 0})
    make_tar(tmp_path / "._x-train-0.tar", {"left by an operating system": 0})
    assert call("inspect", [str(tmp_path), "--rebuild"]) == 0
    shards = {
        split: [shard.file for shard in open_split(tmp_path, split).shards] for split in open_dataset(tmp_path).splits
    }
    assert shards == {"train": sorted(names[:2]), "val": [names[2]], "test": [names[3]]}


def test_names_that_begin_with_a_dot_and_a_slash_give_class_names(tmp_path):
    make_tar(tmp_path / "x-train-0.tar", {"./cat/1": 1, "./dog/1": 0})
    assert call("inspect", [str(tmp_path), "--rebuild", "--verify"]) == 0
    assert open_split(tmp_path, "train").classes == ("dog", "cat")


def test_one_sample_under_two_spellings_in_two_shards(tmp_path):
    make_tar(tmp_path / "x-train-0.tar", {"./cat/1": 0})
    make_tar(tmp_path / "x-train-1.tar", {"cat/1": 0})
    with pytest.raises(UserError, match=r"sample 'cat/1' is in x-train-0\.tar and in x-train-1\.tar"):
        call("inspect", [str(tmp_path), "--rebuild"])


def test_class_numbers_that_are_absurd_are_refused_by_name(tmp_path):
    make_tar(tmp_path / "x-train-0.tar", {"0": 9_999, "1": 123_456_789, "2": 50_000})
    make_tar(tmp_path / "x-train-1.tar", {"3": 10_000})
    with pytest.raises(UserError) as error:
        call("inspect", [str(tmp_path), "--rebuild"])
    first, second = error.value.problems
    assert f"{tmp_path / 'x-train-0.tar'}: member 1.cls holds 123456789, the largest of 2 class numbers" in first
    assert "member 3.cls holds 10000, the largest of 1 class numbers of 10,000 and more" in second
    make_tar(tmp_path / "x-train-0.tar", {"0": 9_999})
    make_tar(tmp_path / "x-train-1.tar", {"3": 9_998})
    assert call("inspect", [str(tmp_path), "--rebuild"]) == 0


def test_tars_that_are_compressed_are_not_passed_over(tmp_path):
    make_tar(tmp_path / "x-train-0.tar", {"0": 0})
    for name in ("x-train-0.tar.gz", "x-train-1.tar.gz", "x-train-2.tgz"):
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / "x-train-0.tar").read_bytes()))
    with pytest.raises(UserError) as error:  # the first one has its decompressed copy in the same folder
        call("inspect", [str(tmp_path), "--rebuild"])
    assert [problem.rpartition(": ")[2] for problem in error.value.problems] == [
        f"gunzip {tmp_path / name}" for name in ("x-train-1.tar.gz", "x-train-2.tgz")
    ]


def test_an_archive_of_another_name_beside_no_tar_is_named(tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"PK\x03\x04" + bytes(99))
    with pytest.raises(UserError, match=r"photos\.zip: is compressed \(zip\)"):
        call("inspect", [str(tmp_path), "--rebuild"])


def test_rebuild_where_nothing_can_be_written(dataset):
    index = next(dataset.glob("*.keys.npy"))
    for path in dataset.glob("*.npy"):
        path.unlink()
    (dataset / "dataset.json").unlink()
    index.mkdir()
    (index / "file").touch()
    with pytest.raises(UserError, match=r"Is a directory|Directory not empty"):  # not exit code 1, which means damage
        call("inspect", [str(dataset), "--rebuild"])


def test_rebuild_rejects_folders_that_cannot_be_indexed(dataset, tmp_path):
    with pytest.raises(UserError, match=r"has a dataset\.json already; .* delete that file first"):
        call("inspect", [str(dataset), "--rebuild"])
    with pytest.raises(UserError, match=r"holds no \.tar files"):
        call("inspect", [str(tmp_path / "src"), "--rebuild"])
    with pytest.raises(UserError, match="there is no such folder"):
        call("inspect", [str(tmp_path / "none"), "--rebuild"])
    (tmp_path / "src" / "x-train-0.tar").write_bytes(b"x" * 600)
    (tmp_path / "src" / "x-train-1.tar").write_bytes(b"")
    with pytest.raises(UserError) as error:
        call("inspect", [str(tmp_path / "src"), "--rebuild"])
    assert len(error.value.problems) == 2

"""Splits come from folders, lists and archives, or from the division of each class."""

import os
from pathlib import Path

import pytest

from bfsys.data.storage.shards import open_dataset, open_split
from tests.commands.packing_helpers import contents, make_files, make_tree, pack, png_bytes


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_split_folders_share_one_class_list(tmp_path):
    files = {"train/cat/a": b"1", "validation/dog/a": b"2", "test/cat/b": b"3"}
    for layout in ("tree", "imagefolder"):
        dataset = pack(make_files(tmp_path / "src", files), tmp_path, "--from", layout, name=layout)
        assert open_dataset(dataset).splits == ["test", "train", "val"]
        assert contents(dataset)["dog/a"] == ("val", "dog", b"2")
        assert open_split(dataset, "test").classes == ("cat", "dog")


def test_subdir(tmp_path):
    files = {
        "train/image/cat/a": b"1",
        "train/audio/cat/a": b"x",
        "val/image/cat/b": b"2",
        "val/audio/cat/b": b"x",
    }
    dataset = pack(make_files(tmp_path / "src", files), tmp_path, "--subdir", "image")
    assert contents(dataset) == {"cat/a": ("train", "cat", b"1"), "cat/b": ("val", "cat", b"2")}


def test_old_files_keep_their_split_when_files_are_added(tmp_path):
    src = make_tree(tmp_path / "src", 60)
    before = contents(pack(src, tmp_path / "one", "--val-share", "0.3"))
    make_files(src, {f"dog/new-{i}.png": b"new" for i in range(40)} | {"dog/000.png": b"like 000.jpg"})
    after = contents(pack(src, tmp_path / "two", "--val-share", "0.3"))
    kept = {key.removesuffix("-jpg"): split for key, (split, _, _) in after.items()}
    assert {key: split for key, (split, _, _) in before.items()}.items() <= kept.items()
    assert 0.1 < sum(split == "val" for split, _, _ in before.values()) / 60 < 0.5
    assert kept["dog/000-png"] == kept["dog/000"]  # files of the same name stay in one split


def test_numbered_files_are_divided_by_share(tmp_path):
    """Their numbers are no extensions, which would make all of them files of one key."""
    names = [f"{name}{i}" for i in range(30) for name in ("app.log.", "x.2026-11-", "frame.000")]
    found = contents(pack(make_files(tmp_path / "src", {f"cat/{name}": b"1" for name in names}), tmp_path))
    assert 2 < sum(split == "val" for split, _, _ in found.values()) < 20
    assert "cat/app_log_7" in found


def test_names_that_give_equal_keys_are_told_apart(tmp_path):
    names = [b"a.b.txt", b"a_b.txt", b"b.jpg", b"b.JPG", b"c.gif", b"c.png", b"c-gif.bmp", b"one/\x93.x", b"one/\x94.x"]
    src = make_files(tmp_path / "src", {f"cat/{os.fsdecode(name)}": name for name in names})
    keys = contents(pack(src, tmp_path / "one"))
    assert sorted(data for _, _, data in keys.values()) == sorted(names)
    assert contents(pack(src.rename(tmp_path / "moved"), tmp_path / "two")) == keys


def test_files_of_unprintable_names_are_divided_by_share(tmp_path):
    src = make_files(tmp_path / "src", {f"cat/{os.fsdecode(bytes([128 + i]))}": b"1" for i in range(100)})
    found = contents(pack(src, tmp_path))
    assert 2 < sum(split == "val" for split, _, _ in found.values()) < 25


def test_classes_with_two_files_are_in_train_and_in_val(tmp_path):
    files = {f"{word}/{i}": word.encode() for word in ("bee", "cow", "dog", "elk") for i in range(2)} | {"fox/0": b"1"}
    found = contents(pack(make_files(tmp_path / "src", files), tmp_path))
    assert sorted((name, split) for split, name, _ in found.values()) == [
        *((word, split) for word in ("bee", "cow", "dog", "elk") for split in ("train", "val")),
        ("fox", "train"),
    ]


@pytest.mark.parametrize("names", ["Train Test DEV", "TRAINING testing Eval", "trn tst val_set"])
def test_split_folders_in_any_capitals_and_by_their_synonyms(tmp_path, names):
    names = names.split()
    src = make_files(tmp_path / "src", {f"{name}/{word}/a": word.encode() for name in names for word in ("cat", "dog")})
    dataset = pack(src, tmp_path)
    assert open_dataset(dataset).splits == ["test", "train", "val"]
    assert open_split(dataset, "train").classes == ("cat", "dog")
    assert open_dataset(pack(src, tmp_path, "--splits", names[2], name="val")).splits == ["val"]


def test_the_split_column_in_any_capitals_and_by_its_synonyms(tmp_path):
    make_files(tmp_path, {"a": b"1", "b": b"2", "list.tsv": b"a\tcat\tTraining\nb\tcat\tDev"})
    assert open_dataset(pack(tmp_path / "list.tsv", tmp_path / "out", "--from", "filelist")).splits == ["train", "val"]


MARKED = {
    "UTF-8": "\ufeffa\tcat\r\nb\tcat\r\n".encode(),
    "UTF-8, two lists joined": "\ufeffa\tcat\n\ufeffb\tcat\n".encode(),
    "ends of lines of Excel on a Mac": b"a\tcat\rb\tcat\r",
    "UTF-16": "a\tcat\r\nb\tcat\r\n".encode("utf-16"),
    "UTF-16, big endian": "\ufeffa\tcat\nb\tcat".encode("utf-16-be"),
}


@pytest.mark.parametrize("case", MARKED)
def test_byte_order_marks_are_taken_off_lists(tmp_path, case):
    make_files(tmp_path, {"a": b"1", "b": b"2", "list.tsv": MARKED[case]})
    dataset = pack(tmp_path / "list.tsv", tmp_path / "out", "--from", "filelist", "--split", "test")
    assert set(contents(dataset)) == {"cat/a", "cat/b"}


def test_byte_order_marks_are_taken_off_the_lists_of_speech_commands(tmp_path):
    files = {"yes/a.wav": b"1", "yes/b.wav": b"2", "yes/c.wav": b"3"}
    lists = {"validation_list.txt": "\ufeffyes/a.wav\r\n".encode(), "testing_list.txt": b""}
    found = contents(pack(make_files(tmp_path / "sc", files | lists), tmp_path, "--from", "speech_commands"))
    assert {key: split for key, (split, _, _) in found.items()} == {"yes/a": "val", "yes/b": "train", "yes/c": "train"}


def test_filelist(tmp_path):
    make_files(tmp_path / "lists", {"cat/a.jpg": b"1", "s1/x.jpg": b"2", "s2/x.jpg": b"3", ".odd": b"4"})
    lines = [
        "cat/a.jpg\tcat\ttrain",
        "s1/x.jpg\tcat\ttrain",
        "",
        "s2/x.jpg\tdog\tvalid\r",
        "../lists/.odd\tdog\ttest",
    ]
    (tmp_path / "lists" / "list.tsv").write_text("\n".join(lines))
    found = contents(pack(tmp_path / "lists" / "list.tsv", tmp_path / "out", "--from", "filelist"))
    assert found == {
        "cat/a": ("train", "cat", b"1"),
        "cat/s1/x": ("train", "cat", b"2"),
        "dog/s2/x": ("val", "dog", b"3"),
        "dog/lists/_odd": ("test", "dog", b"4"),
    }


def test_the_division_does_not_depend_on_the_encoding(tmp_path):
    """Runs with augmentation train on stored files, and are evaluated on an encoded dataset of the same folder."""
    classes = [f"c{i}" for i in range(20)]
    files = {f"{name}/{i}{name}.png": png_bytes(2, 2, 7) for name in classes for i in range(3)}
    src = make_files(tmp_path / "src", files | {f"{name}/memo-{name}.wav": b"sound" for name in classes})
    stored = contents(pack(src, tmp_path))
    encoded = contents(pack(src, tmp_path, "--encoding", "tiff", "--skip-bad", name="encoded"))
    assert len(encoded) == len(files)
    assert {key: split for key, (split, _, _) in encoded.items()}.items() <= {
        key: split for key, (split, _, _) in stored.items()
    }.items()


def test_a_list_from_a_pipe_counts_from_the_current_folder(tmp_path, monkeypatch):
    make_files(tmp_path, {"cat/a.jpg": b"1"})
    monkeypatch.chdir(tmp_path)
    for is_pipe in (True, False):  # as of <(…), and of < FILE
        if is_pipe:
            reader, writer = os.pipe()
            os.write(writer, b"cat/a.jpg\tcat\ttrain\n")
            os.close(writer)
        else:
            (tmp_path / "list.tsv").write_text("cat/a.jpg\tcat\ttrain\n")
            reader = os.open(tmp_path / "list.tsv", os.O_RDONLY)
        found = contents(pack(Path(f"/dev/fd/{reader}"), tmp_path, "--from", "filelist", name=f"pipe-{is_pipe}"))
        os.close(reader)
        assert found == {"cat/a": ("train", "cat", b"1")}


def test_filelist_without_splits_is_divided(tmp_path):
    make_tree(tmp_path / "src", 40)
    lines = [f"src/{'cat' if i % 2 else 'dog'}/{i:03d}.jpg\tc{i % 3}" for i in range(40)]
    (tmp_path / "list.tsv").write_text("\n".join(lines))
    dataset = pack(tmp_path / "list.tsv", tmp_path / "out", "--from", "filelist", "--val-share", "0.25")
    assert open_dataset(dataset).splits == ["train", "val"]
    assert open_split(dataset, "val").classes == ("c0", "c1", "c2")


def test_speech_commands(tmp_path):
    words = {f"{word}/{who}_nohash_0.wav": word.encode() for word in ("yes", "no") for who in "abc"}
    lists = {
        "validation_list.txt": b"yes/b_nohash_0.wav\n",
        "testing_list.txt": b"no/c_nohash_0.wav\nyes/c_nohash_0.wav\n",
    }
    noise = {"_background_noise_/pink.wav": b"noise", "README.md": b"read me"}
    found = contents(pack(make_files(tmp_path / "sc", words | lists | noise), tmp_path, "--from", "speech_commands"))
    assert len(found) == 6
    assert {key for key, (split, _, _) in found.items() if split == "val"} == {"yes/b_nohash_0"}
    assert {key for key, (split, _, _) in found.items() if split == "test"} == {
        "no/c_nohash_0",
        "yes/c_nohash_0",
    }

"""All problems are reported at once, before anything is written."""

import errno
import json
import os
import re
from functools import partial
from pathlib import Path

import pytest

from bfsys.data.packing import folders, listing, shard_jobs
from tests.commands.packing_helpers import contents, make_files, make_tree, pack, problems_of, run_pack


def test_all_bad_files_at_once(tmp_path):
    src = make_files(tmp_path / "src", {"cat/a": b"1", "cat/empty": b"", "cat/big": b"x" * 50, "dog/b": b"1"})
    (src / "dog" / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(src / "dog" / "pipe")
    (src / "dog" / "loop").symlink_to(src / "dog" / "loop")
    (src / "bird").mkdir()
    (src / "fish").symlink_to(tmp_path / "unmounted")
    result = run_pack(src, tmp_path / "out", "--split", "train", "--max-file-bytes", "20", "--encoding", "pngg")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    for message in (
        f"error: {src}/cat/empty: is empty\n",
        f"error: {src}/cat/big: has 50 bytes, allowed are 20 (--max-file-bytes)\n",
        f"error: {src}/dog/gone: cannot be read (No such file or directory)\n",
        f"error: {src}/dog/pipe: is not a regular file\n",
        f"error: {src}/dog/loop: cannot be read (Too many levels of symbolic links)\n",
        f"error: {src}/fish: is a link whose target is missing; restore the target, or remove the link\n",
        f"error: {src}/bird: the class folder has no files; add files, or remove the folder\n",
        "error: --encoding: encoding 'pngg': there is no 'pngg' (did you mean 'png'?)",
        "error: 5 bad files: repair or remove them, or leave them out with --skip-bad\n",
    ):
        assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_skip_bad_leaves_them_out_and_lists_them(tmp_path):
    src = make_files(tmp_path / "src", {"cat/a": b"1", "cat/empty": b"", "dog/b": b"1"})
    dataset = pack(src, tmp_path, "--split", "train", "--skip-bad")
    assert set(contents(dataset)) == {"cat/a", "dog/b"}
    assert (dataset / "skipped.txt").read_text() == f"{src}/cat/empty\tis empty\n"


@pytest.mark.parametrize("place", ["stat", "read"])
def test_an_outage_leaves_no_file_out(place, tmp_path, monkeypatch):
    """--skip-bad is for bad files."""
    src, really_stat, really_open = make_tree(tmp_path / "src"), os.stat, shard_jobs.open_regular

    def fail(act, wanted, path, *arguments, **options):
        if str(path).endswith("cat/001.jpg") and place == wanted:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return act(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", partial(fail, really_stat, "stat"))
    monkeypatch.setattr(shard_jobs, "open_regular", partial(fail, really_open, "read"))
    message = problems_of(src, tmp_path / "out", "--skip-bad", "--workers", "1")
    assert "cat/001.jpg: cannot be read (Stale file handle); fix this and run the same command again" in message
    assert not list((tmp_path / "out").glob("*/dataset.json"))


def test_a_file_that_can_be_read_later_is_packed_then(tmp_path, monkeypatch):
    src, really_open = make_tree(tmp_path / "src"), shard_jobs.open_regular

    def open_file(path):
        if path.endswith("cat/001.jpg"):
            raise OSError(errno.EIO, "Input/output error", path)
        return really_open(path)

    arguments = (src, tmp_path, "--split", "train", "--skip-bad", "--workers", "1")
    with monkeypatch.context() as patch:
        patch.setattr(shard_jobs, "open_regular", open_file)
        dataset = pack(*arguments)
        assert "cat/001" not in contents(dataset)
    assert f"{src}/cat/001.jpg\tcannot be read (Input/output error)" in (dataset / "skipped.txt").read_text()


def test_too_many_shards_are_refused_before_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_jobs, "MOST_SHARDS", 2)
    message = problems_of(make_tree(tmp_path / "src"), tmp_path / "out", "--shard-bytes", "1000")
    assert re.search(r"--shard-bytes: gives \d+ shards; allowed are 2; raise --shard-bytes", message)


def test_permissions(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _: not str(path).endswith(("001.jpg", "out")))
    (tmp_path / "out").mkdir()
    message = problems_of(make_tree(tmp_path / "src"), tmp_path / "out")
    assert "cat/001.jpg: cannot be read (no permission)" in message
    assert "out is not a folder that this user may write to" in message


def test_a_class_folder_that_cannot_be_listed_is_named_once(tmp_path, monkeypatch):
    src, really_list = make_tree(tmp_path / "src"), os.listdir

    def listed(path):
        if str(path).endswith("/cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return really_list(path)

    monkeypatch.setattr(os, "listdir", listed)
    message = problems_of(src, tmp_path / "out")
    assert message.count("/cat") == 1
    assert "cat: the folder cannot be listed (Permission denied)" in message


WRONG_INPUT = {
    "nothing there": ({}, "src: has no class folders"),
    "files without classes": (
        {"a.jpg": b"1"},
        "has no class folders; files must lie in a folder named after",
    ),
    "all bad": ({"cat/a": b"", "dog/a": b"1"}, "class 'cat': none of its files can be packed"),
    "mixed": ({"train/cat/a": b"1", "extra/b": b"1"}, "holds split folders (train) and others (extra)"),
    "two for one": ({"val/cat/a": b"1", "valid/cat/a": b"1"}, "val and valid: two folders for one split"),
    "no class in split": ({"train/cat/a": b"1", "val/b": b"1"}, "val: has no class folders"),
    "skipped by webdataset": ({"__cat__/a": b"1"}, "class '__cat__': a class must not contain"),
    "skipped without its dot": ({"__cat._/a": b"1"}, "class '__cat._': a class must not contain"),
    "class with a direction": ({"c\u202eat/a": b"1"}, "class 'c\\u202eat' has characters that cannot be printed"),
    "class with a line break": ({"c\nat/a": b"1"}, "class 'c\\nat' has characters that cannot be printed"),
    "too few to divide": ({"cat/a": b"1", "dog/b": b"1"}, "none of the 2 files went to val, because no class has two"),
    "two for one in capitals": ({"Val/cat/a": b"1", "dev/cat/a": b"1"}, "Val and dev: two folders for one split"),
    "mixed in capitals": ({"Training/cat/a": b"1", "extra/b": b"1"}, "holds split folders (Training) and others"),
    "numbered splits": (
        {"train2017/cat/a": b"1", "val2017/cat/a": b"1", "x/a": b"1"},
        "folders train2017, val2017 seem",
    ),
    "splits after numbers": ({"01_train/a": b"1", "02-Test/a": b"1"}, "class folders 01_train, 02-Test seem to be"),
    "splits in splits": ({"Train/Train/cat/a": b"1", "test/test_set/cat/a": b"1"}, "Train, test_set seem to be splits"),
    "capitals": (
        {"train/dog/a": b"1", "val/Dog/a": b"1"},
        "differ only in case or spaces: 'Dog' in {src}/val/Dog and 'dog' in {src}/train/dog; "
        "'Dog' has no files in train, 'dog' has no files in val; spell the name in one way",
    ),
    "style of an emoji": (
        {"train/\u2764/a": b"1", "val/\u2764\ufe0f/a": b"1"},
        "differ only in their Unicode form: '\u2764' (written '\\u2764') in {src}/train/\u2764 and '\u2764\ufe0f' (",
    ),
    "joiner": ({"cat/a": b"1", "ca\u200dt/a": b"1"}, "differ only in their Unicode form: 'cat' (written 'cat') in"),
    "Unicode": (
        {"train/\u00e9/a": b"1", "val/\u00e9/a": b"1", "train/e\u0301/a": b"1"},
        "differ only in their Unicode form: 'e\u0301' (written 'e\\u0301') in {src}/train/e\u0301 and '\u00e9' "
        "(written '\\xe9') in {src}/train/\u00e9, {src}/val/\u00e9; 'e\u0301' (written 'e\\u0301') has no files in val",
    ),
}


@pytest.mark.parametrize("case", WRONG_INPUT)
def test_wrong_trees(tmp_path, case):
    files, message = WRONG_INPUT[case]
    (tmp_path / "src").mkdir()
    message = message.replace("{src}", str(tmp_path / "src"))
    assert message in problems_of(make_files(tmp_path / "src", files), tmp_path / "out")
    assert not (tmp_path / "out").exists()


WRONG_OPTIONS = {
    "name": (["--name", "a/b"], "--name 'a/b': may hold letters"),
    "split": (["--split", "my-split"], "--split 'my-split': may hold letters"),
    "share": (["--val-share", "1"], "--val-share 1.0: must be 0 or more, and below 1"),
    "share of nothing": (["--val-share", "0.2", "--split", "test"], "--val-share: has no effect here"),
    "shard size": (["--shard-bytes", "10MB"], "--shard-bytes 10MB: must be a number of bytes above 0"),
    "no size": (["--max-file-bytes", "0"], "--max-file-bytes 0: must be a number of bytes above 0"),
    "workers": (["--workers", "0"], "--workers 0: must be 1 or more"),
    "size without encoding": (
        ["--image-size", "9"],
        "--image-size 9: needs an encoding for image, got as_stored",
    ),
    "seconds for pictures": (
        ["--encoding", "png", "--seconds", "1"],
        "--seconds 1.0: needs an encoding for audio",
    ),
    "endless": (["--encoding", "flac", "--seconds", "inf"], "--seconds inf: must be a number above 0"),
    "rate": (["--encoding", "flac", "--sample-rate", "5"], "--sample-rate 5: must be 1,000 to 1,000,000 Hz"),
    "rate of MP3": (["--encoding", "mp3", "--sample-rate", "96000"], "--sample-rate 96000: MP3 of 96,000 Hz cannot be"),
    "negative": (["--encoding", "png", "--image-size", "-1"], "--image-size -1: must be a number above 0"),
    "sounds as pictures": (
        ["--encoding", "flac"],
        "cat/001.jpg: is image by its extension, and encoding flac",
    ),
    "layout": (["--from", "imagefolder"], "src: has no split folders; --from imagefolder needs train, val"),
    "split twice": (
        ["--from", "imagefolder", "--split", "val"],
        "--split: has no effect with --from imagefolder",
    ),
    "subdir": (
        ["--from", "speech_commands", "--subdir", "x"],
        "--subdir: has no effect with --from speech_commands",
    ),
    "no lists": (["--from", "speech_commands"], "testing_list.txt: cannot be read (No such file"),
    "no such subdir": (["--subdir", "image"], "src/image: the folder cannot be listed (No such file"),
    "folder as list": (["--from", "filelist"], "src: the list cannot be read (Is a directory)"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options(tmp_path, case):
    options, message = WRONG_OPTIONS[case]
    assert message in problems_of(make_tree(tmp_path / "src"), tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_split_option_with_split_folders(tmp_path):
    src = make_files(tmp_path / "src", {"train/cat/a": b"1"})
    assert "src: has split folders (train); drop --split val" in problems_of(src, tmp_path, "--split", "val")
    assert "--val-share: has no effect here" in problems_of(src, tmp_path, "--val-share", "0.2")


def test_splits_that_are_wanted_and_those_that_are_there(tmp_path):
    src = make_files(
        tmp_path / "src", {f"{s}/cat/{s}{i}.jpg": b"x" * (i + 1) for s in ("train", "val") for i in range(3)}
    )
    packed = pack(src, tmp_path, "--splits", "val")
    assert {split for split, _, _ in contents(packed).values()} == {"val"}
    assert len(contents(packed)) == 3
    message = problems_of(src, tmp_path / "out", "--splits", "val,test")
    assert message == "--splits: got 'test', SRC has train, val"
    assert "has no splits to choose from" in problems_of(src / "train", tmp_path / "out", "--splits", "val")


def test_links_in_a_circle(tmp_path):
    src = make_tree(tmp_path / "src")
    (src / "cat" / "again").symlink_to(src / "cat")
    assert "again: is a link to a folder that contains it" in problems_of(src, tmp_path / "out")


def test_folders_that_are_nested_too_deeply_are_refused(tmp_path, monkeypatch):
    src = make_files(tmp_path / "src", {f"cat/{'d/' * 5}1.jpg": b"x"})
    monkeypatch.setattr(folders, "DEEPEST", 3)
    assert "more than 3 folders are nested" in problems_of(src, tmp_path / "out")


def test_a_relative_source_that_is_missing_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = f"photos: there is no such file or folder in the current folder, which is {tmp_path}"
    assert message in problems_of(Path("photos"), tmp_path / "out")


def test_source_is_missing_or_a_file(tmp_path):
    assert "none: there is no such file or folder" in problems_of(tmp_path / "none", tmp_path)
    (tmp_path / "file").write_text("")
    assert "file: is not a folder; unpack it if it is an archive; for a list of files, give" in problems_of(
        tmp_path / "file", tmp_path
    )


def test_speech_commands_with_a_list_that_does_not_fit(tmp_path):
    files = {"yes/a.wav": b"1", "validation_list.txt": b"yes/gone.wav\n", "testing_list.txt": b""}
    message = problems_of(make_files(tmp_path / "src", files), tmp_path, "--from", "speech_commands")
    assert "src: yes/gone.wav is listed, but the file is missing" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "list.tsv: the list is empty"),
        (b"\xff\xfe", "list.tsv: the list is empty"),
        (b"\xff\xfea", "list.tsv: the list cannot be read ('utf-16-le' codec can't decode byte 0x61"),
        (b"PK\3\4\xe9", "an archive must be unpacked into a folder"),
        (b"caf\xe9\tcat", "list.tsv: the list cannot be read ('utf-8' codec can't decode byte 0xe9"),
        ("a\tcat".encode("utf-16-le"), "position 1: a NUL, as in UTF-16 without a byte order mark"),
        (b"a.jpg cat", "list.tsv, line 1: got 1 column, need path<TAB>class"),
        (b"a\tb\tval\tx", "line 1: got 4 columns"),
        (b"a\tb\n\na\tb\ttrain", "line 3: got 3 columns, the lines before have 2"),
        (b"\tcat", "line 1: path or class is empty"),
        (b"a\tcat\tmine", "line 1: split 'mine' is unknown; allowed are train, training, trn, val, valid, validation"),
        (b"a\tc/d\ttrain", "line 1: class 'c/d': a class must not contain a /"),
        (b"gone\tcat\ttrain", "gone: cannot be read (No such file or directory)"),
        (b"a\0\tcat\ttrain", "position 1: a NUL"),
        (b"a\tcat\ttrain\n\n./a\tcat\ttrain", "list.tsv, line 3: ./a is listed twice, first in line 1; remove one"),
        (b"a\tcat\ttrain\na\tcat\tval", "list.tsv, line 2: a is listed for val, and in line 1 for train"),
        (b"a\tcat\tval\na\tcat\ttrain", "list.tsv, line 2: a is listed for train, and in line 1 for val"),
        (b"a\tcat\ntrain/../a\tdog", "line 2: train/../a is listed twice, first in line 1"),
        (b"a\tcat\ttrain\na\tCat\tval", "differ only in case or spaces: 'Cat' in line 2 and 'cat' in line 1"),
    ],
)
def test_wrong_lists(tmp_path, text, message):
    make_files(tmp_path, {"list.tsv": text, "a": b"1"})
    assert message in problems_of(tmp_path / "list.tsv", tmp_path / "out", "--from", "filelist")
    assert not (tmp_path / "out").exists()


def test_a_pipe_without_a_writer_is_an_empty_list(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "pipe: the list is empty" in problems_of(tmp_path / "pipe", tmp_path / "out", "--from", "filelist")


def test_a_list_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "MOST_LIST_BYTES", 3_000_000)
    message = problems_of(Path("/dev/zero"), tmp_path, "--from", "filelist")
    assert "/dev/zero: the list cannot be read (holds more than 3,000,000 bytes)" in message


def test_filelist_with_splits_and_a_split_option(tmp_path):
    make_files(tmp_path, {"list.tsv": b"a\tcat\ttrain", "a": b"1"})
    message = problems_of(tmp_path / "list.tsv", tmp_path / "out", "--from", "filelist", "--split", "val")
    assert "line 1: names a split, and so does --split val" in message


def test_files_of_other_origin_are_not_overwritten(tmp_path):
    src = make_tree(tmp_path / "src")
    (tmp_path / "file").write_text("")
    assert "file is not a folder that this user may write to" in problems_of(src, tmp_path / "file")
    assert "lies in SRC, so the next run would pack it too" in problems_of(src, src)
    make_files(tmp_path / "foreign" / "pets", {"pets-train-000000.tar": b"tar"})
    assert "holds tars that tools/pack.py did not make" in problems_of(src, tmp_path / "foreign")
    rebuilt = pack(src, tmp_path / "rebuilt")
    description = json.loads((rebuilt / "dataset.json").read_text())
    (rebuilt / "dataset.json").write_text(json.dumps({**description, "made_by": {"tool": "other"}}))
    assert "holds a dataset that tools/pack.py did not make" in problems_of(src, tmp_path / "rebuilt")
    (rebuilt / "dataset.json").write_text("{")
    assert "or remove the folder first" in problems_of(src, tmp_path / "rebuilt")


def test_another_split_does_not_replace_the_first(tmp_path):
    src = make_tree(tmp_path / "src")
    pack(src, tmp_path, "--split", "train")
    message = problems_of(src, tmp_path, "--split", "test")
    assert "holds a dataset with split train, which this command would remove" in message


def test_the_disk_is_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_jobs, "write_shard", full)
    message = problems_of(make_tree(tmp_path / "src"), tmp_path)
    assert "pets: cannot be written (No space left on device)" in message
    assert "run the same command again; finished shards are kept" in message


def test_one_line_of_another_kind_does_not_make_all_lines_wrong(tmp_path):
    lines = ["# my list", *(f"{i}\tcat" for i in range(9)), *("x;cat" for _ in range(30))]
    src = make_files(tmp_path, {f"{i}": b"1" for i in range(9)} | {"list": "\n".join(lines).encode()})
    message = problems_of(src / "list", tmp_path, "--from", "filelist")
    assert message.count("got 1 column, need path<TAB>class") == 20
    assert f"{src}/list: 11 more lines cannot be used" in message
    assert "the lines before have" not in message

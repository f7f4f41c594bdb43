"""Files go in, the same bytes come out, in the same order, however often packing was stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from bfsys.cli import call
from bfsys.data.packing import shard_jobs, staging
from bfsys.data.packing.left_out import why_left_out
from bfsys.data.storage.description import read_description
from bfsys.data.storage.shards import open_split
from bfsys.errors import UserError
from tests.commands.packing_helpers import (
    all_bytes,
    contents,
    make_files,
    make_tree,
    pack,
    png_bytes,
    problems_of,
    run_pack,
    wav_bytes,
)
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module", autouse=True)
def _no_fsync():
    """Disable fsync, which takes most of the time of packing a few files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


# Packed files are read back unchanged


file_names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=30)
byte_names = st.builds(
    lambda text, tail: os.fsdecode(text.encode() + tail), file_names, st.sampled_from([b"", b"\xff"])
)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(byte_names, st.binary(min_size=1, max_size=600), max_size=10))
def test_any_bytes_under_any_name(tmp_path_factory, files):
    files = {name: data for name, data in files.items() if name not in (".", "..")} | {"plain": b"plain"}
    visible = {name: data for name, data in files.items() if not why_left_out(name)}
    src, out = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("out")
    make_files(src / "a class", files)
    dataset = pack(src, out, "--split", "train", "--shard-bytes", "3K")
    found = contents(dataset)
    assert sorted(data for _, _, data in found.values()) == sorted(visible.values())
    tars = sorted(str(tar) for tar in dataset.glob("*.tar"))
    seen = webdataset.WebDataset(tars, shardshuffle=False)
    assert sorted(sample["__key__"] for sample in seen) == sorted(found)


def test_the_dataset(tmp_path, capsys):
    dataset = pack(make_tree(tmp_path / "src"), tmp_path / "out", "--shard-bytes", "10K")
    train, val = open_split(dataset, "train"), open_split(dataset, "val")
    assert len(train) + len(val) == 30
    assert len(val) > 0
    assert train.classes == ("cat", "dog")
    assert train.shards[0].file == "pets-train-000000.tar"
    assert len(train.shards) > 1
    for start, end in zip(train.shard_starts, train.shard_starts[1:], strict=False):
        assert {0, 1} == set(train.samples["label"][start:end].tolist())  # every shard has both classes
    assert np.ptp([shard.bytes for shard in train.shards]) <= 10240
    found = contents(dataset)
    assert found["cat/001"][1:] == ("cat", bytes([1]) * 301)
    description = read_description(dataset)
    assert description["encoding"] == "as_stored"
    assert description["made_by"]["arguments"]["shard_bytes"] == 10_000
    assert sum(description["splits"]["train"]["class_counts"].values()) == len(train)
    printed = capsys.readouterr().out
    assert f"data:\n  sources:\n    - path: {dataset}\n" in printed
    assert "bytes per sample: min " in printed


def test_extensions_and_keys(tmp_path):
    names = [
        "a.JPG",
        "b",
        "c.cls",
        "d.json",
        "e.tar.gz",
        "x/y.z/f.png",
        "same.jpg",
        "same.png",
        ".hidden",
        ".git/a",
    ]
    dataset = pack(make_files(tmp_path / "src", {f"n.01/{n}": n.encode() for n in names}), tmp_path, "--split", "test")
    samples = webdataset.WebDataset(str(dataset / "pets-test-000000.tar"), shardshuffle=False)
    found = {s["__key__"]: (set(s) - {"__key__", "__url__", "cls", "__local_path__"}).pop() for s in samples}
    assert found == {
        "n_01/a": "jpg",
        "n_01/b": "bin",
        "n_01/c": "bin",
        "n_01/d": "bin",
        "n_01/e_tar": "gz",
        "n_01/x/y_z/f": "png",
        "n_01/same-jpg": "jpg",
        "n_01/same-png": "png",
    }
    assert open_split(dataset, "test").classes == ("n.01",)


def test_links_are_followed(tmp_path):
    src = make_files(tmp_path / "src", {"cat/a": b"1", "elsewhere.d/b": b"2"})
    (src / "elsewhere.d").rename(tmp_path / "elsewhere")
    (src / "dog").symlink_to(tmp_path / "elsewhere")
    assert set(contents(pack(src, tmp_path, "--split", "train"))) == {"cat/a", "dog/b"}


# Encoding


def test_pictures_are_encoded(tmp_path):
    src = make_files(tmp_path / "src", {f"red/{i}.png": png_bytes(300 + i, 290, i) for i in range(5)})
    dataset = pack(src, tmp_path, "--split", "train", "--encoding", "tiff", "--image-size", "224")
    split = open_split(dataset, "train")
    assert set(split.samples["length"].tolist()) == {150_668}
    description = read_description(dataset)
    assert description["encoding"] == "tiff"
    assert description["made_by"]["library"].startswith("Pillow ")
    sample = next(iter(webdataset.WebDataset(str(dataset / split.shards[0].file), shardshuffle=False).decode("pil")))
    assert sample["tiff"].size == (224, 224)


def test_sounds_are_encoded(tmp_path):
    src = make_files(tmp_path / "src", {f"noise/{i}.wav": wav_bytes(0.5 + i / 4, 8000) for i in range(4)})
    options = ("--encoding", "wav:int16", "--sample-rate", "16000", "--seconds", "1")
    split = open_split(pack(src, tmp_path, "--split", "train", *options), "train")
    assert set(split.samples["length"].tolist()) == {32_044}


def test_files_that_cannot_be_decoded(tmp_path):
    good = {f"red/{i}.png": png_bytes(8, 8, i) for i in range(20)}
    bad = {
        "red/broken.png": b"no picture",
        "blue/cut.png": png_bytes(50, 50, 1)[:60],
        "blue/ok.png": good["red/0.png"],
    }
    src = make_files(tmp_path / "src", good | bad)
    options = ("--split", "train", "--encoding", "jpeg:60", "--shard-bytes", "10K")
    message = problems_of(src, tmp_path, *options)
    assert f"{src}/red/broken.png: cannot be converted to jpeg:60 (" in message
    assert f"{src}/blue/cut.png: cannot be converted to jpeg:60" in message
    assert "2 bad files: repair or remove them, or leave them out with --skip-bad" in message
    assert "0x" not in message  # the address of a Python object
    with pytest.raises(UserError, match="If packing was not finished, run the same command again"):
        open_split(tmp_path / "pets", "train")
    dataset = pack(src, tmp_path, *options, "--skip-bad")
    assert set(contents(dataset)) == {f"red/{i}" for i in range(20)} | {"blue/ok"}
    skipped = (dataset / "skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in skipped] == [f"{src}/blue/cut.png", f"{src}/red/broken.png"]
    assert "2 bad files" in problems_of(src, tmp_path, *options)


def test_no_file_can_be_decoded(tmp_path):
    src = make_files(tmp_path / "src", {"red/broken.png": b"no picture"})
    message = problems_of(src, tmp_path, "--split", "train", "--encoding", "png", "--skip-bad")
    assert message == "split train: none of its files can be packed"


# The same input gives the same bytes


def test_workers_and_repetition_do_not_matter(tmp_path):
    src = make_tree(tmp_path / "src", 60)
    one = pack(src, tmp_path / "one", "--shard-bytes", "8K", "--workers", "1")
    two = pack(src, tmp_path / "two", "--shard-bytes", "8K", "--workers", "3")
    assert all_bytes(one) == all_bytes(two)
    assert len(list(one.glob("*.tar"))) > 5
    other = pack(src, tmp_path / "three", "--shard-bytes", "8K", "--seed", "1")
    assert all_bytes(other).keys() == all_bytes(one).keys()
    assert (other / "pets-train-000000.tar").read_bytes() != (one / "pets-train-000000.tar").read_bytes()


def test_another_time_or_place_of_the_files_gives_the_same_dataset(tmp_path):
    one = pack(make_tree(tmp_path / "here"), tmp_path / "one")
    make_tree(tmp_path / "there")
    os.utime(tmp_path / "there" / "cat" / "001.jpg", (1, 1))
    two = pack(tmp_path / "there", tmp_path / "two")
    inputs = ".pack/inputs"
    assert {k: v for k, v in all_bytes(one).items() if k != inputs} == {
        k: v for k, v in all_bytes(two).items() if k != inputs
    }


def test_packed_already(tmp_path, capsys, monkeypatch):
    src = make_tree(tmp_path / "src")
    before = all_bytes(pack(src, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(staging, "start", None)  # packing must not start
        call("pack", [str(src), str(tmp_path), "--name", "pets"])
    assert "already packed" in capsys.readouterr().out
    (tmp_path / "pets" / "pets-val-000000.tar").write_bytes(b"cut")
    assert all_bytes(pack(src, tmp_path)) == before


def test_other_input_is_packed_again_and_leaves_nothing_old(tmp_path):
    src = make_tree(tmp_path / "src", 60)
    pack(src, tmp_path / "one", "--shard-bytes", "5K")
    for path in (src / "cat").glob("0[2-5]*"):
        path.unlink()
    make_files(src, {"cat/empty": b""})
    (tmp_path / "one" / "pets" / ".pets-train-000009.tar.123.tmp").write_bytes(b"left over")
    assert "is empty" in problems_of(src, tmp_path / "one", "--shard-bytes", "9K")
    open_split(tmp_path / "one" / "pets", "train")  # a refused command does not change the dataset
    one = pack(src, tmp_path / "one", "--shard-bytes", "9K", "--skip-bad")
    two = pack(src, tmp_path / "two", "--shard-bytes", "9K", "--skip-bad")
    assert all_bytes(one) == all_bytes(two)
    (src / "cat" / "empty").unlink()
    assert not (pack(src, tmp_path / "one", "--shard-bytes", "9K") / "skipped.txt").exists()


def test_a_file_changed_in_place_is_packed_again(tmp_path):
    src = make_tree(tmp_path / "src")
    pack(src, tmp_path)
    (src / "cat" / "001.jpg").write_bytes(b"x" * 301)
    assert contents(pack(src, tmp_path))["cat/001"][2] == b"x" * 301


def test_a_file_of_the_same_size_and_time_is_packed_again(tmp_path):
    """Archives may set the same time for all files."""
    src = make_tree(tmp_path / "src")
    path = src / "cat" / "001.jpg"
    os.utime(path, (0, 0))
    pack(src, tmp_path)
    changed = path.read_bytes()[::-1]
    path.write_bytes(changed)
    os.utime(path, (0, 0))
    assert contents(pack(src, tmp_path))["cat/001"][2] == changed


# Killed and stopped


SLOW = ("--shard-bytes", "6K", "--workers", "2", "--encoding", "png", "--image-size", "64")


def start_slow_pack(src: Path, out: Path) -> subprocess.Popen:
    """Start packing many shards, and return when the first one exists."""
    command = [sys.executable, REPOSITORY / "tools" / "pack.py", src, out, "--name", "pets", *SLOW]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    os.setpriority(os.PRIO_PROCESS, process.pid, 19)  # so that this process sees the first shard before the last
    while not list(out.glob("pets/.pack/*.npz")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    return process


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """(pictures that are slow to decode, their dataset)"""
    folder, picture = tmp_path_factory.mktemp("pictures"), png_bytes(700, 700, 9)
    src = make_files(folder / "src", {f"{'ab'[i % 2]}/{i}.png": picture for i in range(50)})
    return src, pack(src, folder / "whole", *SLOW)


@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C"])
def test_a_stopped_run_continues(tmp_path, pictures, how):
    src, whole = pictures
    process = start_slow_pack(src, tmp_path / "out")
    dataset = tmp_path / "out" / "pets"
    if how == "kill -9":
        process.kill()
        process.communicate(timeout=900)  # the workers have ended too, since they share its standard error
    else:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.communicate(timeout=900)[1] == "stopped on request\n"
        assert process.returncode == 130
        assert not list(dataset.rglob("*.tmp"))
    assert not (dataset / "dataset.json").exists()
    finished = {path.stem for path in dataset.glob(".pack/*.npz")}
    written = {path.name: path.stat().st_mtime_ns for path in dataset.glob(".pack/*.tar")}
    assert 0 < len(finished) < len(list(whole.glob("*.tar")))
    pack(src, tmp_path / "out", *SLOW)
    again = {Path(name).stem for name, time_ns in written.items() if (dataset / name).stat().st_mtime_ns != time_ns}
    assert not again & finished
    assert all_bytes(dataset) == all_bytes(whole)


def test_sidecars_of_other_input_are_not_used(tmp_path, monkeypatch):
    src = make_tree(tmp_path / "src")
    with monkeypatch.context() as patch:
        patch.setattr(shard_jobs, "write_split", None)
        with pytest.raises(TypeError):  # fails when all shards are written
            pack(src, tmp_path)
    assert list((tmp_path / "pets" / ".pack").glob("*.npz"))
    (src / "cat" / "001.jpg").write_bytes(b"x" * 301)
    assert contents(pack(src, tmp_path))["cat/001"][2] == b"x" * 301


def test_a_file_that_changes_during_packing_is_named(tmp_path, monkeypatch):
    src = make_tree(tmp_path / "src")

    monkeypatch.setattr(staging, "start", lambda _: (src / "cat" / "001.jpg").write_bytes(b"short"))
    assert "cat/001.jpg: changed during packing: 301 to 5 bytes" in problems_of(src, tmp_path)


def test_a_pipe_that_takes_the_place_of_a_file_during_packing_is_not_waited_for(tmp_path, monkeypatch):
    path = make_tree(tmp_path / "src") / "cat" / "001.jpg"

    def replace(_):
        path.unlink()
        os.mkfifo(path)

    monkeypatch.setattr(staging, "start", replace)
    assert "cat/001.jpg: cannot be read (is not a regular file" in problems_of(tmp_path / "src", tmp_path)


def test_a_file_that_grows_during_packing_is_read_only_to_its_former_end(tmp_path, monkeypatch):
    path = make_tree(tmp_path / "src") / "cat" / "001.jpg"
    monkeypatch.setattr(staging, "start", lambda _: os.truncate(path, 2**40))  # more than any memory
    assert f"cat/001.jpg: changed during packing: 301 to {2**40:,} bytes" in problems_of(tmp_path / "src", tmp_path)


def test_run_as_a_script_from_anywhere(tmp_path):
    result = run_pack(make_tree(tmp_path / "src"), tmp_path / "out")
    assert (result.returncode, result.stderr) == (0, "")
    assert "pets: 2 classes (cat, dog), encoding as_stored" in result.stdout


def test_a_blocked_console_does_not_stop_the_work(tmp_path):
    src = make_tree(tmp_path / "src")
    with open("/dev/full", "w") as full:
        command = [sys.executable, REPOSITORY / "tools" / "pack.py", src, tmp_path, "--name", "pets"]
        assert subprocess.run(command, stdout=full, stderr=full, timeout=900).returncode == 0
    assert len(contents(tmp_path / "pets")) == 30


def test_packing_does_not_wait_for_torch():
    code = "import sys, bfsys.data.packing.pack, bfsys.data.packing.rebuild; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=900).returncode == 0


def test_class_names_of_every_script(tmp_path):
    names = ["می\u200cخواهم", "猫\u3000犬", "a\u00a0b", "👨\u200d👩\u200d👧", "ok"]
    src = make_files(tmp_path / "src", {f"{name}/{i}": name.encode() for name in names for i in range(3)})
    dataset = pack(src, tmp_path, "--split", "train")
    found = contents(dataset)
    assert {key.partition("/")[0] for key in found} == set(names)
    assert all(data == name.encode() for _, name, data in found.values())

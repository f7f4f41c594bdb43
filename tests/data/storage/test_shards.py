"""Shards that are written are read back, by bfsys and by webdataset; damage of every kind is found and named."""

import errno
import hashlib
import json
import mmap
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from bfsys.commands.inspect import verify
from bfsys.data.packing.verify import verify_shard
from bfsys.data.storage.description import DESCRIPTION, summarise
from bfsys.data.storage.shards import (
    SAMPLE,
    Shard,
    length_quantiles,
    open_dataset,
    open_split,
    write_description,
    write_split,
)
from bfsys.data.storage.tars import Member, read_shard, size_in_tar_bytes, write_shard
from bfsys.errors import UserError

CLASSES = ("cat", "dog", "éléphant")
key_parts = st.text(
    st.characters(exclude_categories=("C", "Zl", "Zp"), exclude_characters="./"), min_size=1, max_size=60
)
members = st.lists(
    st.builds(
        Member,
        # WebDataset ignores files in a folder named __like this__
        st.tuples(key_parts.map("c{}".format), key_parts, key_parts).map("/".join),
        st.sampled_from(["jpg", "bin", "wav"]),
        st.binary(min_size=1, max_size=1500),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda member: member.key,
)


def make_dataset(path: Path, shards: int = 3, per_shard: int = 4) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    indexes = []
    for number in range(shards):
        content = [
            Member(f"{CLASSES[i % 3]}/{number}-{i}", "jpg", bytes([number, i]) * (50 + 400 * i), i % 3)
            for i in range(per_shard)
        ]
        indexes.append(write_shard(path / f"pets-train-{number:06d}.tar", content))
    part = write_split(path, "pets", "train", CLASSES, indexes)
    write_description(path, "pets", CLASSES, "as_stored", {"tool": "test"}, {"train": part})
    return path


@settings(max_examples=30, deadline=None)
@given(members)
def test_a_shard_reads_back_as_written(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("shard") / "x-train-000000.tar"
    written = write_shard(path, content)
    read = read_shard(path)
    assert (read.shard, read.keys) == (written.shard, written.keys)
    assert np.array_equal(read.samples, written.samples)
    data = path.read_bytes()
    for member, row in zip(content, written.samples, strict=True):
        assert data[row["offset"] :][: row["length"]] == member.payload
        assert row["checksum"] == xxhash.xxh3_64_intdigest(member.payload)
        assert row["label"] == member.label
    seen = [
        (sample["__key__"], sample[content[i].extension], sample["cls"])
        for i, sample in enumerate(webdataset.WebDataset(str(path), shardshuffle=False))
    ]
    assert seen == [(m.key, m.payload, str(m.label).encode()) for m in content]


def test_tars_are_plain_and_anonymous(tmp_path):
    path = tmp_path / "x-train-000000.tar"
    shard = write_shard(path, [Member("cat/a", "jpg", b"x" * 700, 1)]).shard
    with tarfile.open(path) as tar:
        infos = tar.getmembers()
    assert [info.name for info in infos] == ["cat/a.jpg", "cat/a.cls"]
    assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} == {(0, 0, 0, "", "", 0o644)}
    assert shard.bytes == path.stat().st_size == 10240
    assert size_in_tar_bytes(700) == 512 + 1024 + 512 + 512


def test_open_split(tmp_path):
    split = open_split(make_dataset(tmp_path / "pets"), "train")
    assert (len(split), split.name, split.split, split.classes) == (12, "pets", "train", CLASSES)
    assert split.samples.dtype == SAMPLE
    assert isinstance(split.samples, np.memmap)
    assert [split.key(i) for i in (0, 4, 11)] == ["cat/0-0", "cat/1-0", "cat/2-3"]
    assert split.shard_starts.tolist() == [0, 4, 8, 12]
    assert split.shard_starts.dtype == np.int64
    assert split.samples["shard"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert isinstance(split.shards[0], Shard)
    assert open_dataset(tmp_path / "pets").splits == ["train"]
    assert verify(split) == []


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    first, second = (open_split(make_dataset(tmp_path / name), "train") for name in ("a", "b"))
    third = open_split(make_dataset(tmp_path / "c", per_shard=5), "train")
    assert first.fingerprint == second.fingerprint != third.fingerprint


def test_quantiles_are_lengths_that_occur():
    quantiles = length_quantiles(np.array([5, 1, 9], np.uint64))
    assert quantiles["min"] == 1
    assert quantiles["50%"] == 5
    assert quantiles["max"] == 9
    assert list(quantiles) == ["min", "1%", "10%", "25%", "50%", "75%", "90%", "99%", "max"]


# Each entry damages a dataset, and has the error of opening it
def described(path):
    return json.loads((path / DESCRIPTION).read_text())


def change_description(path, **changes):
    (path / DESCRIPTION).write_text(json.dumps({**described(path), **changes}))


def make_pipe(path, name=DESCRIPTION):
    (path / name).unlink()
    os.mkfifo(path / name)


OPENING = {
    "description missing": (lambda p: (p / DESCRIPTION).unlink(), "holds no dataset.json"),
    "description broken": (lambda p: (p / DESCRIPTION).write_text('{"form'), "cannot be read"),
    "not an object": (lambda p: (p / DESCRIPTION).write_text("[]"), "cannot be read"),
    "format": (lambda p: change_description(p, format=9), "has format 9; this version reads format 2"),
    "no splits": (lambda p: change_description(p, splits=None), "splits: Input should be an object"),
    "part broken": (lambda p: change_description(p, splits={"train": {}}), "splits.train.samples: Field required"),
    "split": (
        lambda p: change_description(p, splits={"test": described(p)["splits"]["train"]}),
        "no split 'train'; there are: test",
    ),
    "classes missing": (lambda p: change_description(p, classes=None), "classes: Input should be a valid array"),
    "no classes": (lambda p: change_description(p, classes=[]), "classes: there are none"),
    "class twice": (lambda p: change_description(p, classes=["cat", "cat", "dog"]), "classes: 'cat' is given twice"),
    "other classes": (
        lambda p: change_description(p, classes=["cow", "pig", "hen"]),
        "splits.train.class_counts: its classes are not those of the dataset",
    ),
    "classes in another order": (
        lambda p: change_description(p, classes=described(p)["classes"][::-1]),
        "splits.train.class_counts: its classes are not those of the dataset, in the same order",
    ),
    "shard elsewhere": (
        lambda p: (p / DESCRIPTION).write_text(
            (p / DESCRIPTION).read_text().replace('"pets-train-', '"../pets-train-')
        ),
        "splits.train: names '../pets-train-000000.tar'; a file in the folder of the dataset is expected",
    ),
    "a pipe": (make_pipe, "is not a regular file, but a pipe or a device"),
    "a pipe for an index": (lambda p: make_pipe(p, "pets-train.keys.npy"), "cannot be read (is not a regular file"),
    "too long": (lambda p: os.truncate(p / DESCRIPTION, 2**40), "holds more than 67,108,864 bytes; is it the right"),
    "nested": (lambda p: (p / DESCRIPTION).write_text("[" * 100_000), "cannot be read as dataset.json"),
    "not text": (
        lambda p: (p / DESCRIPTION).write_bytes((p / DESCRIPTION).read_bytes() + b"\xff"),
        "cannot be read as dataset.json ('utf-8' codec can't decode byte 0xff in position ",
    ),
    "lengths": (
        lambda p: (p / DESCRIPTION).write_text((p / DESCRIPTION).read_text().replace('"50%"', '"49%"')),
        "splits.train.length_quantiles: has no '50%'",
    ),
    "a huge number": (
        lambda p: (p / DESCRIPTION).write_text(
            (p / DESCRIPTION).read_text().replace('"bytes": ', '"bytes": 9' + "0" * 30)
        ),
        "splits.train.bytes: Input should be less than 9223372036854775808",
    ),
    "notes": (lambda p: change_description(p, notes=5), "notes: Input should be a valid array"),
    "header of the index": (
        lambda p: (p / "pets-train.samples.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': [(        \n"),
        "the index cannot be read",
    ),
    "index missing": (lambda p: (p / "pets-train.samples.npy").unlink(), "the index cannot be read"),
    "index short": (
        lambda p: (p / "pets-train.keys.npy").write_bytes((p / "pets-train.keys.npy").read_bytes()[:-1]),
        "the index cannot be read",
    ),
    "index empty": (lambda p: (p / "pets-train.samples.npy").write_bytes(b""), "the index cannot be read"),
    "count": (
        lambda p: np.save(p / "pets-train.samples.npy", np.zeros(3, SAMPLE)),
        "holds (3,) of",
    ),
    "type": (lambda p: np.save(p / "pets-train.samples.npy", np.zeros(12)), "holds (12,) of float64"),
}


@pytest.mark.parametrize("case", OPENING)
def test_opening_a_broken_dataset_names_the_damage(tmp_path, case):
    damage, message = OPENING[case]
    damage(make_dataset(tmp_path))
    with pytest.raises(UserError) as error:
        open_split(tmp_path, "train")
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(("number", "code"), [(errno.ESTALE, 1), (errno.EACCES, 2)])
@pytest.mark.parametrize("file", [DESCRIPTION, "pets-train.samples.npy"])
def test_an_outage_at_the_start_has_the_code_of_a_crash(tmp_path, file, number, code, monkeypatch):
    """Launchers restart a crash and no bad input."""
    make_dataset(tmp_path)
    really_open = os.open

    def open_or_not(path, *arguments, **options):
        if str(path).endswith(file):
            raise OSError(number, os.strerror(number), str(path))
        return really_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_or_not)
    with pytest.raises(UserError, match=f"{file}.* cannot be read .{os.strerror(number)}") as error:
        open_split(tmp_path, "train")
    assert error.value.exit_code == code
    assert "again" not in str(error.value)  # the dataset is intact


def test_a_summary_shows_what_others_wrote_on_one_line(tmp_path):
    description = described(make_dataset(tmp_path))
    description["classes"][0] = "c\x1b[31mat"
    description["splits"]["train"]["class_counts"] = {}
    shown = summarise(description)
    assert r"3 classes (c\x1b[31mat, dog, éléphant)" in shown
    assert "train: 12 samples of 0 classes, " in shown


def test_opening_a_missing_folder_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"there is no such folder; .* bfsys pack"):
        open_split(tmp_path / "none", "train")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^none: .* in the current folder, which is {tmp_path}; "):
        open_split("none", "train")
    with pytest.raises(UserError, match=rf"not a packed .* bfsys pack {tmp_path} OUT .* bfsys inspect .* --rebuild"):
        open_split(tmp_path, "train")


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x55
    path.write_bytes(data)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_flipped_byte_is_found(tmp_path_factory, data):
    path = make_dataset(tmp_path_factory.mktemp("pets"), shards=2, per_shard=3)
    split = open_split(path, "train")
    tar = path / split.shards[1].file
    position = data.draw(st.integers(0, tar.stat().st_size - 1))
    flip(tar, position)
    problems = verify(split)
    assert f"{tar}: differs from the sha256" in problems[0]
    hit = [
        split.key(i)
        for i, row in enumerate(split.samples)
        if row["shard"] == 1 and row["offset"] <= position < row["offset"] + row["length"]
    ]
    named = [problem for problem in problems if "its bytes differ" in problem]
    assert len(named) == len(hit)
    assert all(repr(key) in problem for key, problem in zip(hit, named, strict=True))


TAR_DAMAGE = {
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:3000]), "has 3,000 bytes"),
    "cut between members": (lambda p: p.write_bytes(p.read_bytes()[:2048]), "cut off"),
    "empty": (lambda p: p.write_bytes(b""), "the shard is empty"),
    "missing": (lambda p: p.unlink(), "the shard is missing; it holds 4 samples"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "has 20,481 bytes"),
    "other": (
        lambda p: write_shard(p, [Member("cat/z", "jpg", b"z", 0)]),
        "holds 1 sample, the index says 4",
    ),
    "header in the middle": (lambda p: flip(p, 1536 + 512), "header at byte 2048 is broken"),
    "joined by cat": (lambda p: p.write_bytes(p.read_bytes() * 2), "or it is several tars joined by cat (tar -A"),
    "class number": (lambda p: flip(p, 512 + 512 + 512), "has no class: cat/1-0.cls holds b'e'"),
}


@pytest.mark.parametrize("case", TAR_DAMAGE)
def test_verify_names_the_damage(tmp_path, case):
    damage, message = TAR_DAMAGE[case]
    split = open_split(make_dataset(tmp_path), "train")
    damage(tmp_path / split.shards[1].file)
    problems = verify(split)
    assert any(message in problem for problem in problems), problems
    assert all(split.shards[1].file in problem for problem in problems)


def test_an_io_error_is_named_and_causes_no_bus_error(tmp_path, monkeypatch):
    """In a mapped file, an I/O error would be a SIGBUS. Missing permission is not damage."""
    split = open_split(make_dataset(tmp_path), "train")
    number, really_digest = errno.EIO, hashlib.file_digest

    def digest(file, name):
        if str(file.name).endswith("000001.tar"):
            raise OSError(number, os.strerror(number), file.name)
        return really_digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    monkeypatch.setattr(mmap, "mmap", lambda *_, **__: pytest.fail("mapped"))
    assert verify_shard(split, 1) == [f"{tmp_path / split.shards[1].file}: cannot be read: Input/output error"]
    with pytest.raises(UserError, match=r"000001\.tar: cannot be read \(Input/output error\); fetch or pack"):
        read_shard(tmp_path / split.shards[1].file)
    number = errno.EACCES
    with pytest.raises(PermissionError):
        verify_shard(split, 1)
    with pytest.raises(UserError, match=r"000001\.tar: cannot be read \(Permission denied\)$"):
        read_shard(tmp_path / split.shards[1].file)


@pytest.mark.parametrize("field", ["shard", "label", "offset", "length", "checksum", "key_end"])
def test_verify_compares_every_field_of_the_index(tmp_path, field):
    make_dataset(tmp_path)
    samples = np.load(tmp_path / "pets-train.samples.npy")
    samples[field][5] += 1
    np.save(tmp_path / "pets-train.samples.npy", samples)
    problems = verify(open_split(tmp_path, "train"))
    assert "pets-train.samples.npy: differs from the sha256" in problems[0]
    assert any("pets-train-000001.tar: sample" in problem for problem in problems[1:]), problems


def test_verify_checks_the_keys(tmp_path):
    make_dataset(tmp_path)
    flip(tmp_path / "pets-train.keys.npy", 130)
    assert len(verify(open_split(tmp_path, "train"))) == 2


def make_tar(path: Path, entries: dict[str, bytes]) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for name, data in entries.items():
            key, _, extension = name.partition(".")
            writer.write({"__key__": key, extension: data})
    return path


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a.jpg": b"x"}, "sample 'a' has no class: there is no a.cls"),
        ({"a.jpg": b"x", "a.cls": b"cat"}, "a.cls holds b'cat'; it must hold a number"),
        ({"a.jpg": b"x", "a.cls": b""}, "a.cls holds b''"),
        ({"a.cls": b"1"}, "sample 'a' has no payload"),
        ({"a.jpg": b"x", "a.png": b"x", "a.cls": b"1"}, "has 2 payloads (.jpg, .png)"),
        ({}, "holds no samples"),
    ],
)
def test_tars_made_elsewhere_that_cannot_be_indexed(tmp_path, entries, message):
    with pytest.raises(UserError) as error:
        read_shard(make_tar(tmp_path / "x.tar", entries))
    assert message in str(error.value)


def test_a_tar_made_elsewhere(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"d/a.JPG": b"abc", "d/a.cls": b"7\n", "d/a.json": b"{}"})
    index = read_shard(path)
    assert index.keys == b"d/a"
    assert index.samples[["label", "length"]].tolist() == [(7, 3)]


@pytest.mark.parametrize("content", [b"", b"not a tar" * 100, b"\0" * 100])
def test_files_that_are_not_tars_are_refused(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.tar: "):
        read_shard(tmp_path / "x.tar")

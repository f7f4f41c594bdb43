"""The report warns of a class that leaks into metadata or lengths, and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bfsys import typed_yaml
from bfsys.cli import call
from bfsys.config import Config
from bfsys.errors import UserError
from bfsys.explain import shortcuts_page
from bfsys.explain.ranges import Range, Structure
from bfsys.explain.references import LabelledFile
from bfsys.explain.shortcuts import Shortcuts, shortcuts, transplanted
from bfsys.explain.structure import structure
from tests.explain.tiny import BUDGET, png_file, trained, wav_file, write_split

CLASSES = ("cat", "<dog>")
Make = Callable[[int, np.random.Generator], bytes]


def leaking_png(label: int, rng: np.random.Generator) -> bytes:
    pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
    return png_file(pixels, "scanner A" if label else "camera XY")


def leaking_wav(label: int, rng: np.random.Generator) -> bytes:
    return wav_file(rng.integers(0, 256, 96, dtype=np.uint8), b"recorder" if label else b"computer")


def honest_wav(label: int, rng: np.random.Generator) -> bytes:
    return wav_file((rng.integers(0, 128, 96) + 128 * label).astype(np.uint8), rng.choice([b"recorder", b"computer"]))


def length_alone(label: int, rng: np.random.Generator) -> bytes:
    return rng.integers(0, 256, 40 + 100 * label, dtype=np.uint8).tobytes()


def report_on(make: Make, folder: Path) -> Shortcuts:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 3060).tolist()
    files = [make(label, rng) for label in labels]
    classifier = trained([np.frombuffer(one, np.uint8) for one in files[60:]], labels[60:])
    write_split(folder / "tree", "val", files[:60], labels[:60], CLASSES)
    write_split(folder / "tree", "train", files[60:70], labels[60:70], CLASSES)
    call("pack", [str(folder / "tree"), str(folder), "--name", "mine", "--workers", "1"])
    tree = {"data": {"sources": [{"path": str(folder / "mine")}], "eval_batch_bytes": BUDGET}}
    config = typed_yaml.from_tree(Config, tree, "config")
    return shortcuts(classifier, config, CLASSES, (), "val", 50, 0)


@pytest.mark.parametrize("make", [leaking_png, leaking_wav])
def test_a_class_that_leaks_into_metadata_is_found(make: Make, tmp_path: Path) -> None:
    report = report_on(make, tmp_path)
    assert report.all.accuracy > 0.95
    assert report.all.metadata_share + report.all.header_share > 0.9
    assert report.all.metadata_share > 0.5
    assert report.all.without_content > 0.9
    assert report.all.without_header_and_metadata < 0.1
    assert [warning.partition(":")[0] for warning in report.warnings] == [
        "the model reads headers or metadata",
        "the model does not need the content",
    ]
    page = shortcuts_page.html(report)
    assert "The model reads headers or metadata" in page
    assert "&lt;dog&gt;" in page
    assert "<dog>" not in page
    assert json.loads(json.dumps(report.as_dict()))["classes"].keys() == set(CLASSES)
    assert "warning: the model reads headers" in shortcuts_page.table(report)


def test_a_model_of_content_gets_no_warning(tmp_path: Path) -> None:
    report = report_on(honest_wav, tmp_path)
    assert report.all.accuracy > 0.95
    assert report.all.content_share > 0.9
    assert report.all.without_header_and_metadata > 0.9
    assert report.all.without_content < 0.1
    assert (report.warnings, report.notes) == ((), ())
    assert shortcuts_page.NO_WARNING in shortcuts_page.table(report)
    assert sum(row.files for row in report.classes.values()) == report.all.files == 50


def test_a_class_that_the_length_gives_away_is_found(tmp_path: Path) -> None:
    report = report_on(length_alone, tmp_path)
    assert report.all.accuracy > 0.9
    assert any("the model reads the length of files" in warning for warning in report.warnings)
    assert report.notes == ("50 of 50 files have no known headers or metadata: all of their bytes are content",)


def file_of(content: bytes, label: int = 0, found: Structure | None = None) -> LabelledFile:
    data = np.frombuffer(content, np.uint8)
    return LabelledFile(data, data, label, 0, found or structure(data))


def test_parts_are_replaced_by_parts_of_the_same_name_or_kind() -> None:
    one = file_of(wav_file(np.arange(10, dtype=np.uint8), b"short"))
    other = file_of(wav_file(np.arange(100, 130, dtype=np.uint8), b"a longer text"))
    changed = transplanted(one, other, lambda r: r.kind == "content")
    assert structure(changed) == one.structure
    assert changed[-10:].tolist() == list(range(100, 110))
    assert changed[:-10].tolist() == one.data[:-10].tolist()
    changed = transplanted(one, other, lambda r: r.kind == "metadata")
    assert b"a long" in changed.tobytes()
    assert changed[-10:].tolist() == list(range(10))
    assert transplanted(other, one, lambda r: True).tolist() == np.resize(one.data, len(other.data)).tolist()
    bare = file_of(b"0123456789", found=Structure("x", (Range(0, 10, "y", "content"),)))
    assert len(transplanted(one, bare, lambda r: r.kind == "header")) == len(one.data)


def test_a_split_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    write_split(tmp_path / "tree", "val", [b"one", b"two"], [0, 0], CLASSES)
    write_split(tmp_path / "tree", "train", [b"one", b"two"], [0, 1], CLASSES)
    call("pack", [str(tmp_path / "tree"), str(tmp_path), "--name", "mine", "--workers", "1"])
    tree = {"data": {"sources": [{"path": str(tmp_path / "mine")}]}}
    config = typed_yaml.from_tree(Config, tree, "config")
    classifier = trained([np.zeros(9, np.uint8)] * 64, [0] * 64, steps=1)
    with pytest.raises(UserError, match="no source of the run has a split 'test'; there are: train, val"):
        shortcuts(classifier, config, CLASSES, (), "test", 9, 0)
    with pytest.raises(UserError, match="fewer than two classes"):
        shortcuts(classifier, config, CLASSES, (), "val", 9, 0)

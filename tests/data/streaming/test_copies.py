"""Byte-identical files of a run are noted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bfsys.config import Config, Data, Source
from bfsys.data.streaming import copies
from bfsys.data.streaming.run_data import open_run_data
from bfsys.dist import Ranks
from tests.data.packed import Shards, pack

A, B, C = (bytes([value]) * 20 for value in b"abc")


def notes_of(*sources: Source, **settings: str) -> list[str]:
    data = Data(sources=sources, batch_samples=len(sources), lanes=1, **settings)
    return open_run_data(Config(data=data, name="run"), Ranks()).notes


def packed(folder: Path, name: str, **splits: Shards) -> Source:
    return Source(str(pack(folder, name, splits)))


def test_evaluated_files_that_are_training_files_are_noted(tmp_path: Path) -> None:
    apart = packed(tmp_path, "apart", train=[[(0, A), (1, B)]], val=[[(0, C)]])
    assert notes_of(apart) == []
    same = packed(tmp_path, "same", train=[[(0, A), (1, B)]], val=[[(0, A), (0, C), (0, A)]])
    (note,) = notes_of(same)
    assert note.startswith(f"{tmp_path}/same: 2 of 3 files in val are byte-identical to training files, so ")
    assert len(notes_of(same, eval_split="train")) == 1, "that the training split is evaluated is one note"
    other = packed(tmp_path, "other", train=[[(0, C), (1, b"d")]])
    without_val, note = notes_of(apart, other)
    assert without_val.startswith("other: has no split 'val'")
    assert note.startswith(f"{tmp_path}/apart: 1 of 1 files in val")


def test_copies_are_found_if_the_evaluation_data_are_in_another_encoding(tmp_path: Path) -> None:
    stored = packed(tmp_path, "stored", train=[[(0, A), (1, B)]], val=[[(0, A), (1, C)]])
    encoded = packed(tmp_path, "encoded", train=[[(0, b"x"), (1, b"y")]], val=[[(0, b"x"), (1, b"z")]])
    (note,) = notes_of(replace(stored, eval_path=encoded.path))
    assert note.startswith(f"{tmp_path}/stored: 1 of 2 files in val")


def test_training_files_of_two_classes_are_noted(tmp_path: Path) -> None:
    val = [[(0, b"v"), (1, b"w")]]
    twice = packed(tmp_path, "twice", train=[[(0, A), (0, A), (1, B)]], val=val)
    assert notes_of(twice) == []
    both = packed(tmp_path, "both", train=[[(0, A), (1, B)], [(1, A), (0, C), (0, A)]], val=val)
    assert notes_of(both) == ["3 training files are byte-identical to training files of another class"]
    assert notes_of(both, twice) == ["5 training files are byte-identical to training files of another class"]


def test_very_large_datasets_are_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = packed(tmp_path, "same", train=[[(0, A), (1, B)]], val=[[(0, A), (1, B)]])
    monkeypatch.setattr(copies, "MOST_FILES", 4)
    assert notes_of(same)
    monkeypatch.setattr(copies, "MOST_FILES", 3)
    assert notes_of(same) == []

"""The trial training leaves nothing behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from bfsys.fitting.trial import temporary_folder


def test_folders_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, others = tmp_path / "bfsys-fit-killed", tmp_path / "bfsys-fit-without-a-lock"
    for folder in (killed, others):
        (folder / "trial").mkdir(parents=True)
    (killed / "lock").touch()
    with temporary_folder() as first, temporary_folder() as second:
        assert sorted(tmp_path.iterdir()) == sorted([others, Path(first), Path(second)])
    assert list(tmp_path.iterdir()) == [others]

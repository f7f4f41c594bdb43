"""The trial training leaves nothing behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from bfsys.fitting.trial import reasons_of, temporary_folder


def test_the_reason_of_a_killed_rank_is_not_its_last_line() -> None:
    said = ["ranks: 2 on the CPU", "each step has 2 micro-batches"]
    (reason,) = reasons_of(137, said, longest=2_000_000_000)
    assert reason.startswith("its longest file has 2,000,000,000 bytes; if memory ran out, leave out long files (bfsys")
    assert reasons_of(1, said, longest=10) == said[-1:]
    assert reasons_of(137, [*said, "error: rank 0: a reason"], longest=10) == ["rank 0: a reason"]


def test_folders_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, others = tmp_path / "bfsys-fit-killed", tmp_path / "bfsys-fit-without-a-lock"
    for folder in (killed, others):
        (folder / "trial").mkdir(parents=True)
    (killed / "lock").touch()
    with temporary_folder() as first, temporary_folder() as second:
        assert sorted(tmp_path.iterdir()) == sorted([others, Path(first), Path(second)])
    assert list(tmp_path.iterdir()) == [others]

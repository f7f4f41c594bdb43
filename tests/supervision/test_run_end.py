from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from bfsys.supervision.run_end import forget_end, how_it_ended, note_end
from tests.conftest import REPOSITORY


def test_the_end_is_recorded_until_the_run_resumes(tmp_path: Path) -> None:
    note_end(tmp_path, 65, "diverged")
    note_end(tmp_path, 74, "full")
    end = how_it_ended(tmp_path)
    assert end is not None
    assert (end["exit_code"], end["reason"]) == (74, "full")
    assert [path.name for path in tmp_path.iterdir()] == ["ended.json"]
    forget_end(tmp_path)
    assert how_it_ended(tmp_path) is None
    note_end(tmp_path / "nowhere", 1, "of no run")
    assert not (tmp_path / "nowhere").exists()


def test_an_outage_does_not_hide_the_error_that_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(path: Path, **options: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "stat", away)
    monkeypatch.setattr(Path, "is_dir", away)
    note_end(tmp_path, 1, "a crash")


@pytest.mark.parametrize("damage", ["", "{", "[]", '"stopped"', "{}", '{"exit_code": "1", "reason": "", "time": ""}'])
def test_a_damaged_record_counts_as_none(damage: str, tmp_path: Path) -> None:
    (tmp_path / "ended.json").write_text(damage)
    assert how_it_ended(tmp_path) is None


def test_a_full_disk_does_not_hide_the_reason(tmp_path: Path) -> None:
    code = (
        "import resource, sys, pathlib\n"
        "from bfsys.supervision.run_end import note_end\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "try:\n"
        "    raise OSError('no space')\n"
        "except OSError:\n"
        "    note_end(pathlib.Path(sys.argv[1]), 74, 'no space')\n"
        "    raise\n"
    )
    command = [sys.executable, "-c", code, tmp_path]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False)
    assert ended.stderr.endswith("OSError: no space\n")
    assert "another exception" not in ended.stderr
    assert list(tmp_path.iterdir()) == []

"""The end of a SLURM job's script, with a `scontrol` of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bfsys import restarts
from bfsys.errors import EXIT_NO_PROGRESS
from bfsys.faults import how_it_ended


@pytest.fixture
def script_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`script_ends(code)`: the script's code, and whether SLURM was asked to start the job again."""
    asked = tmp_path / "asked"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setattr(restarts.time, "sleep", lambda _: None)

    def end(code: int) -> tuple[int, bool]:
        asked.unlink(missing_ok=True)
        ended = restarts.main([str(code), str(tmp_path)])
        return ended, asked.exists() and asked.read_text() == "requeue 42\n"

    return end


def save(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")


@pytest.mark.parametrize("code", restarts.FINAL_CODES)
def test_an_end_that_another_start_would_not_change(script_ends, code: int) -> None:
    assert script_ends(code) == (code, False)


def test_three_starts_again_without_progress_are_enough(script_ends, tmp_path: Path) -> None:
    save(tmp_path, 4)
    assert [script_ends(137) for _ in range(3)] == [(137, True)] * 3
    save(tmp_path, 8)
    assert [script_ends(code) for code in (1, 70, 137)] == [(1, True), (70, True), (137, True)]
    assert script_ends(1) == (EXIT_NO_PROGRESS, False)
    assert how_it_ended(tmp_path)["exit_code"] == EXIT_NO_PROGRESS
    assert json.loads((tmp_path / restarts.FILE).read_text()) == {"step": 8, "without_progress": 3}
    restarts.forget(tmp_path)  # a person has submitted it again
    assert script_ends(1) == (1, True)


def test_a_count_that_is_torn_is_none(script_ends, tmp_path: Path) -> None:
    (tmp_path / restarts.FILE).write_text('{"st')
    assert script_ends(1) == (1, True)

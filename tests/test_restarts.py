"""The end of a SLURM job's script, with a `scontrol` of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bfsys import restarts
from bfsys.errors import EXIT_NO_PROGRESS
from bfsys.faults import how_it_ended

RUNNING = "JobId=42 JobState=RUNNING Reason=None PreemptTime=None"


@pytest.fixture
def script_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`script_ends(code, facts)`: the script's code, and whether SLURM was asked to start the job again."""
    asked = tmp_path / "asked"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\nif [ "$1" = --oneliner ]; then [ "$4" = "$JOB" ] && echo "$FACTS"\n'
        f'elif [ -n "$REFUSE" ]; then echo "$REFUSE" >&2; exit 1\nelse echo "$@" >> {asked}; fi\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setattr(restarts.time, "sleep", lambda _: None)

    def end(code: int, facts: str = RUNNING, job: str = "42") -> tuple[int, bool]:
        asked.unlink(missing_ok=True)
        monkeypatch.setenv("FACTS", facts)
        monkeypatch.setenv("JOB", job)
        ended = restarts.main([str(code), str(tmp_path)])
        return ended, asked.exists() and asked.read_text() == f"requeue {job}\n"

    return end


def save(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")


@pytest.mark.parametrize("code", restarts.FINAL_CODES)
def test_an_end_that_another_start_would_not_change(script_ends, code: int) -> None:
    assert script_ends(code) == (code, False)


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", "NODE_FAIL"])
@pytest.mark.parametrize("code", [1, 75, 130, 137])
def test_a_job_that_slurm_is_ending_is_left_to_it(script_ends, state: str, code: int) -> None:
    """It was cancelled and would come back, or comes back anyway."""
    assert script_ends(code, f"JobState={state} Reason=None PreemptTime=None") == (code, False)


@pytest.mark.parametrize("code", [1, 75, 130, 137])
def test_a_job_that_is_out_of_time_goes_on(script_ends, code: int) -> None:
    assert script_ends(code, "JobState=COMPLETING Reason=TimeLimit PreemptTime=None")[1]
    assert not script_ends(0, "JobState=COMPLETING Reason=TimeLimit PreemptTime=None")[1]


def test_a_job_that_never_gets_to_training_in_its_time_is_given_up(script_ends, tmp_path: Path) -> None:
    assert [script_ends(75)[1] for _ in range(4)] == [True, True, True, False]
    assert "without a new checkpoint" in how_it_ended(tmp_path)["reason"]


def test_preemptions_do_not_count(script_ends) -> None:
    facts = "JobState=RUNNING Reason=None PreemptTime=2026-11-21T18:04:09"
    assert all(script_ends(code, facts)[1] for code in (130, 75, 137) * 3)
    assert not script_ends(0, facts)[1]
    assert not script_ends(65, facts)[1]


def test_of_an_array_one_job_is_started_again(script_ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert script_ends(1, job="40_3") == (1, True)


def test_a_refused_requeue_is_said(script_ends, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("REFUSE", "Requested operation is presently disabled")
    assert script_ends(1) == (1, False)
    error = capsys.readouterr().err
    assert "job 42 could not be requeued: Requested operation is presently disabled; " in error
    assert "submit again" in error
    monkeypatch.setenv("PATH", "/nowhere")
    assert script_ends(1) == (1, False)
    assert "could not be requeued: [Errno 2] No such file or directory: 'scontrol'" in capsys.readouterr().err


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

"""status, logs and stop, with a SLURM of small scripts."""

from __future__ import annotations

import json
import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bfsys.cli import call
from bfsys.errors import AGAIN_S, UserError, exit_code_of
from bfsys.launch import jobs
from bfsys.supervision.run_end import note_end


@pytest.fixture
def slurm_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`slurm_says(scontrol, sacct)` sets their output for any job; by default the job belongs to the run x."""

    def say(scontrol: str, sacct: str = "", complaint: str = "", files: str = "runs/x/slurm") -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        scontrol += f" StdOut={tmp_path}/{files}/42_0_log.out" if scontrol else ""
        sacct += f"|sbatch {tmp_path}/{files}/.submission_file.sh" if sacct else ""
        for name, text in (("scontrol", scontrol), ("sacct", sacct)):
            end = f"echo '{complaint}' >&2; exit 1" if complaint else ""
            (folder / name).write_text(f"#!/bin/sh\necho '{text}'\n{end}\n")
            (folder / name).chmod(0o755)
        (folder / "scancel").write_text(f"#!/bin/sh\necho $1 >> {tmp_path}/cancelled\n")
        (folder / "scancel").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return say


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with one job, 42, that has two ranks."""
    run = tmp_path / "runs" / "x"
    (run / "slurm").mkdir(parents=True)
    for rank in range(2):
        text = "".join(f"rank {rank} line {i}\n" for i in range(30))
        (run / "slurm" / f"42_{rank}_log.out").write_text(text)
    jobs.note_submission(run, jobs.Submitted("42", str(run / "slurm" / "42_0_log.out"), "2026-11-21 18:00:00", "again"))
    return run


RUNNING = "JobState=RUNNING Reason=None Restarts=2 RunTime=00:12:00 TimeLimit=01:00:00 NodeList=n[1-2]"
PENDING = "JobState=PENDING Reason=Resources Restarts=0 StartTime=2026-11-21T19:00:00"


def test_a_running_job(run: Path, slurm_says, capsys) -> None:
    slurm_says(RUNNING)
    lines = [
        {"kind": "train", "step": 1200, "seconds": {}},
        {"kind": "eval", "step": 1200, "classes": ["a class"] * 5000},
    ]
    (run / "metrics.jsonl").write_text("{}\n" + "".join(json.dumps(line) + "\n" for line in lines))
    assert call("slurm", ["status", str(run)]) == 0
    out = capsys.readouterr().out
    assert "job      42: RUNNING for 00:12:00 of 01:00:00 on n[1-2], started again 2 times, submitted 2026" in out
    assert "step     1,200 of ?, 0 s ago; newest checkpoint 0" in out
    slurm_says(RUNNING.replace("RUNNING", "SUSPENDED"))
    assert call("slurm", ["status", str(run)]) == 0
    assert "job      42: SUSPENDED on n[1-2], started again 2 times, submitted 2026" in capsys.readouterr().out
    slurm_says(RUNNING.replace("Restarts=2", "Restarts=(null)"))  # as an unusual version might write
    assert call("slurm", ["status", str(run)]) == 0
    assert "on n[1-2], submitted 2026" in capsys.readouterr().out


def test_a_waiting_job(run: Path, slurm_says, capsys) -> None:
    slurm_says(PENDING)
    assert call("slurm", ["status", str(run)]) == 0
    out = capsys.readouterr().out
    assert "42: PENDING waits (Resources), expected to start 2026-11-21 19:00:00" in out
    assert "training has not begun; newest checkpoint 0" in out
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "latest").write_text("step_00000003\n")
    assert call("slurm", ["status", str(run)]) == 0
    assert "step     no step is logged yet; newest checkpoint 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scontrol", "sacct", "shown"),
    [
        ("JobState=TIMEOUT EndTime=2026-11-21T18:30:00 Restarts=0", "", "TIMEOUT ended 2026-11-21 18:30:00"),
        ("", "FAILED|2026-11-21T18:30:00", "FAILED ended 2026-11-21 18:30:00"),
        ("", "RUNNING|Unknown", "unknown to SLURM, "),  # its end was not recorded, and it is in no queue
        ("", "", "unknown to SLURM, "),
    ],
)
def test_status_shows_why_a_job_ended(run: Path, slurm_says, capsys, scontrol: str, sacct: str, shown: str) -> None:
    slurm_says(scontrol, sacct)
    assert call("slurm", ["status", str(run)]) == 1
    out = capsys.readouterr().out
    assert f"42: {shown}" in out
    assert "training ended without a recorded reason; its log says why" in out
    (run / "slurm" / "42_0_log.out").unlink()
    note_end(run, 65, "diverged at step 7")
    assert call("slurm", ["status", str(run)]) == 1
    out = capsys.readouterr().out
    assert "ended    diverged at step 7 (code 65)" in out
    assert out.endswith("         again\n")
    note_end(run, 0, "finished")
    assert call("slurm", ["status", str(run)]) == 0


def test_an_unavailable_controller_does_not_mean_that_the_job_ended(run: Path, slurm_says, capsys) -> None:
    slurm_says("", complaint="slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    assert call("slurm", ["status", str(run)]) == 0
    assert "42: SLURM does not answer" in capsys.readouterr().out
    note_end(run, 0, "finished")  # it does not hide the real end either
    assert call("slurm", ["status", str(run)]) == 0
    assert "ended    finished (code 0)" in capsys.readouterr().out
    (run / "ended.json").unlink()
    with pytest.raises(UserError, match=r"SLURM does not answer whether job 42 is over; .* See sinfo"):
        call("slurm", ["stop", str(run)])
    slurm_says("", complaint="slurm_load_jobs error: Invalid job id specified")
    assert call("slurm", ["status", str(run)]) == 1
    assert "42: unknown to SLURM" in capsys.readouterr().out


def test_a_run_that_was_not_submitted_names_no_command(run: Path, slurm_says, capsys) -> None:
    slurm_says("")
    (run / "slurm" / "jobs.jsonl").unlink()
    note_end(run, 2, "no such file")
    assert call("slurm", ["status", str(run)]) == 1
    assert "next" not in capsys.readouterr().out


def test_a_member_of_an_array_that_slurm_has_forgotten_is_over(run: Path, slurm_says, tmp_path: Path) -> None:
    """While other members are in the queue, scontrol says so on its standard output, without an error."""
    slurm_says("")
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho 'Job 42_0 not found'; exit 1\n")
    (job,) = jobs.submissions(run)
    assert jobs.state_of(replace(job, job="42_0")) == jobs.UNKNOWN
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho 'scontrolx: not found' >&2; exit 127\n")
    assert jobs.state_of(job) == jobs.NO_ANSWER


def test_output_that_is_not_text_is_shown(run: Path, slurm_says, capsys) -> None:
    slurm_says(RUNNING.replace("NodeList", "Comment=COMMENT NodeList"))
    path = run.parents[1] / "bin" / "scontrol"
    path.write_bytes(path.read_bytes().replace(b"COMMENT", b"m\xfcde"))
    assert call("slurm", ["status", str(run)]) == 0
    assert "42: RUNNING" in capsys.readouterr().out


def test_an_unavailable_controller_is_asked_once(run: Path, slurm_says, tmp_path: Path, capsys) -> None:
    for number in range(43, 50):
        jobs.note_submission(run, jobs.Submitted(str(number), str(run / "slurm" / "log"), "", "again"))
    slurm_says("")
    (tmp_path / "bin" / "scontrol").write_text(f"#!/bin/sh\necho $4 >> {tmp_path}/asked\nexit 1\n")
    assert call("slurm", ["status", str(run)]) == 0
    assert (tmp_path / "asked").read_text() == "42\n"
    assert "job      49: SLURM does not answer" in capsys.readouterr().out


def test_a_job_number_that_belongs_to_another_run_does_not_count(run: Path, slurm_says, tmp_path: Path, capsys) -> None:
    slurm_says(RUNNING, "FAILED|2026-11-21T18:30:00", files="runs/y/slurm")
    with pytest.raises(UserError, match="this run has no pending or running job"):
        call("slurm", ["stop", str(run)])
    assert not (tmp_path / "cancelled").exists()
    note_end(run, 0, "finished")
    assert call("slurm", ["status", str(run)]) == 0
    out = capsys.readouterr().out
    assert "42: unknown to SLURM (another job has its number now), submitted" in out
    assert "ended    finished" in out
    jobs.note_submission(run, jobs.Submitted("42", str(run / "slurm" / "42_0_log.out"), "later", "again"))
    assert [submitted.time for submitted in jobs.submissions(run)] == ["later"]


def test_after_a_stop_on_request_the_run_has_not_failed(run: Path, slurm_says, capsys) -> None:
    slurm_says("JobState=CANCELLED Restarts=0")
    for code in (75, 130):
        note_end(run, code, "stopped on request after step 7")
        assert call("slurm", ["status", str(run)]) == 0
        out = capsys.readouterr().out
        assert f"stopped on request after step 7 (code {code})" in out
        assert "next     to continue, run this command again; it resumes from the newest checkpoint:\n" in out
        assert "fix the cause" not in out


def test_a_job_that_was_cancelled_while_it_waited(run: Path, slurm_says, capsys) -> None:
    slurm_says(PENDING)
    assert call("slurm", ["stop", str(run)]) == 0
    assert "job 42: cancelled while it waited; see" in capsys.readouterr().out
    (run / "slurm" / "42_0_log.out").unlink()
    slurm_says("", complaint="Invalid job id specified")  # not all sites have accounting
    assert call("slurm", ["status", str(run)]) == 0
    out = capsys.readouterr().out
    assert "ended    job 42 was cancelled while it waited (code 130)" in out
    assert "next     to continue, run this command again" in out
    (run / "ended.json").unlink()
    slurm_says("JobState=CANCELLED Restarts=0")  # by scancel
    assert call("slurm", ["status", str(run)]) == 0
    assert "ended    the job was cancelled before it began\nnext     to continue, run" in capsys.readouterr().out


def test_a_job_that_was_cancelled_and_could_not_save_has_not_failed(run: Path, slurm_says, capsys) -> None:
    """KillWait was too short, or the job was requeued and waited."""
    slurm_says("", "CANCELLED by 0|2026-11-21T18:30:00")
    assert call("slurm", ["status", str(run)]) == 0
    out = capsys.readouterr().out
    assert "42: CANCELLED ended 2026-11-21 18:30:00" in out
    assert "ended    the job was cancelled before the run could save\nnext     to continue, run" in out
    slurm_says("JobState=SUSPENDED Restarts=0")
    assert call("slurm", ["stop", str(run)]) == 0
    assert "job 42: cancelled while it was suspended, so it cannot save; see" in capsys.readouterr().out
    slurm_says("", complaint="Invalid job id specified")
    assert call("slurm", ["status", str(run)]) == 0
    assert "job 42 was cancelled while it was suspended, so it cannot save (code 130)" in capsys.readouterr().out


def test_a_job_that_was_stopped_during_its_start_has_not_failed(run: Path, slurm_says, capsys) -> None:
    slurm_says(RUNNING)
    assert call("slurm", ["stop", str(run)]) == 0
    slurm_says("", complaint="Invalid job id specified")  # not all sites have accounting
    assert call("slurm", ["status", str(run)]) == 0
    assert "ended    job 42 was cancelled before the run could save (code 130)" in capsys.readouterr().out
    slurm_says(RUNNING)
    note_end(run, 0, "finished")  # in the meantime
    assert call("slurm", ["stop", str(run)]) == 0
    slurm_says("", complaint="Invalid job id specified")
    assert call("slurm", ["status", str(run)]) == 0
    assert "ended    finished (code 0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("facts", "complaint", "said"),
    [
        ("Job 42 not found", "", "it was cancelled before it began, or the nodes cannot see"),  # a member of an array
        ("", "Invalid job id specified", "it was cancelled before it began, or the nodes cannot see"),
        ("JobState=FAILED Restarts=0", "", "check that the nodes can see"),
    ],
)
def test_a_job_without_a_log_was_perhaps_cancelled(run: Path, slurm_says, capsys, facts, complaint, said) -> None:
    slurm_says(facts, complaint=complaint)
    (run / "slurm" / "42_0_log.out").unlink()
    assert call("slurm", ["status", str(run)]) == 1
    assert f"ended    the job wrote no log: {said} the log's folder\n" in capsys.readouterr().out


def test_a_job_that_cannot_start_by_itself(run: Path, slurm_says, capsys) -> None:
    for reason in ("JobHeldUser", "JobHeldAdmin", "launch_failed_requeued_held"):
        slurm_says(f"JobState=PENDING Reason={reason} Restarts=0")
        assert call("slurm", ["status", str(run)]) == 0
        assert capsys.readouterr().out.endswith("next     the job is held: scontrol release 42\n")
    slurm_says("JobState=SUSPENDED Reason=None Restarts=0")
    assert call("slurm", ["status", str(run)]) == 0
    assert capsys.readouterr().out.endswith("next     if no other job has suspended it: scontrol resume 42\n")
    slurm_says("JobState=PENDING Reason=DependencyNeverSatisfied Restarts=0")
    assert call("slurm", ["status", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"next     the job can never start: bfsys slurm stop {run}, then submit it again:\n         again\n" in out


def test_the_folder_of_a_sweep_stands_for_its_runs(run: Path, slurm_says, capsys) -> None:
    sweep = run.with_name("sw")
    (sweep / "slurm").mkdir(parents=True)
    for number in range(2):
        member = run.with_name(f"sw-seed={number}")
        job = jobs.Submitted(f"42_{number}", str(sweep / "slurm" / f"42_{number}_0_log.out"), "", "again")
        jobs.note_submission(member, job)
    jobs.note_submission(run.with_name("sw-other"), jobs.Submitted("7", str(run / "slurm" / "log"), "", "again"))
    slurm_says(RUNNING, files="runs/sw/slurm")
    assert call("slurm", ["status", str(sweep)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("run ")] == [f"run      {sweep}-seed={n}" for n in range(2)]
    assert "job      42_1: RUNNING for" in "\n".join(lines)
    for action in ("stop", "logs"):
        with pytest.raises(UserError, match=r"holds the logs of a sweep; give one of its runs: .*sw-seed=0, .*seed=1$"):
            call("slurm", [action, str(sweep)])


def test_followed_logs_are_complete(run: Path, slurm_says, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_says(RUNNING)
    monkeypatch.setattr(jobs, "POLL_S", 0)
    monkeypatch.setattr(jobs, "STATE_POLL_S", 0.2)
    log, said = run / "slurm" / "42_0_log.out", 0

    def state_of(job: jobs.Submitted, **_: bool) -> jobs.State:
        nonlocal said
        said += 1
        with open(log, "a") as file:
            file.write(f"later {said}\n")
        return jobs.State("RUNNING" if said < 5 else "COMPLETED")

    monkeypatch.setattr(jobs, "state_of", state_of)
    note_end(run, 65, "diverged")
    assert jobs.follow(run) == 65
    lines = capsys.readouterr().out.splitlines()
    later = [line for line in lines if line.startswith("later")]
    assert later == [f"later {i + 1}" for i in range(len(later))]
    assert len(later) >= 5


def test_control_c_ends_the_display_of_a_log_and_no_second_one_comes(run: Path, monkeypatch, capsys) -> None:
    asked = 0

    def state_of(job: jobs.Submitted, **_: bool) -> jobs.State:
        nonlocal asked
        asked += 1
        if asked == 2:
            signal.raise_signal(signal.SIGINT)
        time.sleep(3 * AGAIN_S)  # SLURM answers slowly
        return jobs.State("RUNNING")

    monkeypatch.setattr(jobs, "state_of", state_of)
    assert exit_code_of(lambda: jobs.follow(run)) == 0
    assert "the job continues" in capsys.readouterr().err


def test_logs(run: Path, slurm_says, capsys) -> None:
    slurm_says("JobState=COMPLETED Restarts=0")
    assert call("slurm", ["logs", "--rank", "1", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"rank 1 line {i}" for i in range(10, 30)]
    assert call("slurm", ["logs", "--follow", str(run)]) == 0  # the job is over
    assert capsys.readouterr().out.splitlines()[-1] == "rank 0 line 29"
    for rank in ("7", "-1"):
        with pytest.raises(UserError, match=rf"^--rank: got {rank}; job 42 has logs of ranks 0 to 1$"):
            call("slurm", ["logs", "--rank", rank, str(run)])
    for log in (run / "slurm").glob("42_*"):
        log.unlink()
    with pytest.raises(UserError, match=r"42_7_log.out: does not exist yet; state of the job: COMPLETED"):
        call("slurm", ["logs", "--rank", "7", str(run)])
    with pytest.raises(UserError, match=r"^--rank: got -1; job 42 has no log yet; ranks are numbered from 0$"):
        call("slurm", ["logs", "--rank", "-1", str(run)])


def test_stop(run: Path, slurm_says, tmp_path: Path, capsys) -> None:
    run = run.rename(run.with_name("it's x"))  # messages quote it for a shell
    slurm_says(RUNNING)
    assert call("slurm", ["stop", str(run)]) == 0
    assert (tmp_path / "cancelled").read_text() == "42\n"
    assert f"see bfsys slurm status {shlex.quote(str(run))}" in capsys.readouterr().out
    slurm_says("JobState=COMPLETED Restarts=0")
    with pytest.raises(UserError, match="this run has no pending or running job"):
        call("slurm", ["stop", str(run)])


def test_missing_runs_are_refused(tmp_path: Path, slurm_says, capsys) -> None:
    slurm_says("")
    with pytest.raises(UserError, match="no such directory"):
        call("slurm", ["status", str(tmp_path / "nowhere")])
    other = tmp_path / "a folder of runs"
    other.mkdir()
    for action in ("status", "logs", "stop"):
        with pytest.raises(UserError, match=r"a folder of runs: holds no run; give a run directory"):
            call("slurm", [action, str(other)])
    (other / "config.yaml").touch()  # of a run without SLURM
    with pytest.raises(UserError, match="no job was submitted for this run"):
        call("slurm", ["logs", str(other)])
    assert call("slurm", ["status", str(other)]) == 0
    assert "none was submitted from here" in capsys.readouterr().out


def test_an_incomplete_record_of_a_submission_is_ignored(run: Path) -> None:
    with open(run / "slurm" / jobs.JOBS, "a") as file:
        file.write('{"job": "43", "lo')
    assert [submitted.job for submitted in jobs.submissions(run)] == ["42"]
    jobs.note_submission(run, jobs.Submitted("44", "log", "time", "again"))
    assert [submitted.job for submitted in jobs.submissions(run)] == ["42", "44"]
    assert jobs.submissions(run / "other") == []

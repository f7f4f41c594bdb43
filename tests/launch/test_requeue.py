"""The script of a SLURM job, with a `scontrol` of our own and small commands in the place of srun."""

from __future__ import annotations

import datetime
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from bfsys.errors import EXIT_NO_PROGRESS
from bfsys.launch import requeue, restart_policy, slurm_commands
from bfsys.launch.restart_policy import ERROR_CODES
from bfsys.supervision.run_end import how_it_ended, note_end
from tests.conftest import REPOSITORY

RUNNING = "JobId=42 JobState=RUNNING Reason=None PreemptTime=None"
OUT_OF_TIME = "JobState=COMPLETING Reason=TimeLimit PreemptTime=None"
PREEMPTED = "JobState=COMPLETING Reason=None EndTime=2026-11-21T18:04:09 PreemptTime=2026-11-21T18:04:09"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that simulates SLURM. It has `facts` of the job that `JOB` names, and `asked` after a requeue. The file
    `away` is the number of requests that get no answer."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        "#!/bin/sh\n"
        f"if read left < {tmp_path}/away && [ $left -gt 0 ]; then\n"
        f"echo $((left - 1)) > {tmp_path}/away; echo 'Socket timed out on send/recv operation' >&2; exit 1; fi\n"
        f'case "$*" in "--oneliner show job $JOB") cat {tmp_path}/facts;;\n'
        '"show config") echo "KillWait = ${KILL_WAIT:-9} sec";;\n'
        f'*) if [ -n "$REFUSE" ]; then echo "$REFUSE" >&2; exit 1; fi; echo "$@" >> {tmp_path}/asked;; esac\n'
    )
    scontrol.chmod(0o755)
    (tmp_path / "facts").write_text(RUNNING)
    (tmp_path / "away").write_text("0\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("JOB", "42")
    return tmp_path


@pytest.fixture
def ends(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, bool]]:
    """`ends(code, facts)` returns the script's exit code, and whether it asked for a requeue. There are no pauses."""
    monkeypatch.setattr(requeue, "END_WAIT_S", 0)
    monkeypatch.setattr(requeue, "PAUSES_S", (0, 0, 0))
    monkeypatch.setattr(requeue, "TRY_PAUSE_S", 0)
    monkeypatch.setattr(requeue, "TRIES", 30)

    def end(code: int, facts: str = RUNNING) -> tuple[int, bool]:
        (slurm / "asked").unlink(missing_ok=True)
        (slurm / "facts").write_text(facts)
        ended = requeue.JobSupervisor(slurm).after(code)
        return ended, (slurm / "asked").exists() and (slurm / "asked").read_text() == f"requeue {os.environ['JOB']}\n"

    return end


def save(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")


@pytest.mark.parametrize("code", [0, *ERROR_CODES])
def test_an_end_that_another_start_would_not_change(ends, code: int) -> None:
    assert ends(code) == (code, False)


def test_a_job_whose_ranks_are_stopped_by_a_node_that_shuts_down_continues(ends, tmp_path: Path) -> None:
    """The node sends SIGTERM to all processes. For SLURM, the job still runs."""
    save(tmp_path, 4)
    assert ends(130)[1]
    (tmp_path / "away").write_text("1000\n")
    assert ends(130) == (130, False)  # scancel may have ended it


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", "NODE_FAIL"])
@pytest.mark.parametrize("code", [1, 75, 130, 137])
def test_a_job_that_slurm_is_ending_is_left_to_it(ends, state: str, code: int) -> None:
    """The job was cancelled, or SLURM requeues it."""
    assert ends(code, f"JobState={state} Reason=None PreemptTime=None") == (code, False)


@pytest.mark.parametrize("code", [1, 75, 130, 137, 143])
def test_a_job_that_is_out_of_time_continues(ends, code: int) -> None:
    assert ends(code, OUT_OF_TIME)[1]
    assert not ends(0, OUT_OF_TIME)[1]


@pytest.mark.parametrize("code", [1, 75, 130, 137, 143])
def test_a_job_that_slurm_cancels_to_preempt_it_continues(ends, code: int) -> None:
    """As with PreemptMode=CANCEL and no grace time. A user may also cancel a job in its grace time."""
    assert all(ends(code, PREEMPTED)[1] for _ in range(5))
    assert not ends(0, PREEMPTED)[1]
    assert not ends(code, PREEMPTED.replace("EndTime=2026-11-21T18:04:09", "EndTime=2026-11-21T18:04:12"))[1]


def test_a_job_that_never_gets_to_training_in_its_time_is_given_up(ends, tmp_path: Path) -> None:
    assert [ends(143, OUT_OF_TIME)[1] for _ in range(4)] == [True, True, True, False]
    reason = how_it_ended(tmp_path)["reason"]
    assert "without a new checkpoint" in reason
    assert reason.endswith("; it ran out of time before it could save: give a longer --time")


def test_preemptions_do_not_count(ends) -> None:
    facts = "JobState=RUNNING Reason=None PreemptTime=2026-11-21T18:04:09"
    assert all(ends(code, facts)[1] for code in (130, 75, 137) * 3)
    assert not ends(0, facts)[1]
    assert not ends(65, facts)[1]


def test_only_the_failed_member_of_an_array_is_requeued(ends, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SLURM_ARRAY_JOB_ID", "40"), ("SLURM_ARRAY_TASK_ID", "3"), ("JOB", "40_3")):
        monkeypatch.setenv(name, value)
    assert ends(1) == (1, True)


def test_a_refused_requeue_is_reported(ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("REFUSE", "Requested operation is presently disabled for job 42")
    for code, noted in ((1, 1), (75, 1), (70, 70)):
        assert ends(code) == (code, False)
        error = capsys.readouterr().err
        assert "job 42 could not be requeued: Requested operation is presently disabled for job 42; " in error
        assert "submit again" in error
        assert how_it_ended(tmp_path)["exit_code"] == noted
        assert "could not be requeued" in how_it_ended(tmp_path)["reason"]
    requeue.forget(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert ends(1) == (1, False)
    assert "could not be requeued: [Errno 2] No such file or directory: 'scontrol'" in capsys.readouterr().err


@pytest.mark.parametrize("code", [1, 75])
def test_an_unavailable_or_busy_controller_is_asked_again(ends, tmp_path: Path, code: int, capsys) -> None:
    (tmp_path / "away").write_text("20\n")
    assert ends(code) == (code, True)
    assert capsys.readouterr().err == ""


def test_at_the_time_limit_a_controller_that_is_away_makes_no_stop_on_request(ends, tmp_path: Path) -> None:
    (tmp_path / "away").write_text("3\n")
    assert ends(130, OUT_OF_TIME)[1]


def test_a_requeue_whose_answer_was_lost_did_not_fail(ends, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("REFUSE", "Job is pending execution for job 42")  # the previous try has succeeded
    assert ends(1) == (1, False)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("REFUSE", "Unexpected message received for job 42")
    assert ends(1) == (1, False)
    error = capsys.readouterr().err
    assert error.startswith("error: job 42: SLURM did not say whether it requeues the job: Unexpected message ")
    assert "see `squeue --jobs 42`" in error
    assert "could not be requeued" not in error


def test_three_starts_again_without_progress_are_enough(ends, tmp_path: Path) -> None:
    save(tmp_path, 4)
    assert [ends(137) for _ in range(3)] == [(137, True)] * 3
    save(tmp_path, 8)
    assert [ends(code) for code in (1, 70, 137)] == [(1, True), (70, True), (137, True)]
    assert ends(1) == (EXIT_NO_PROGRESS, False)
    assert how_it_ended(tmp_path)["exit_code"] == EXIT_NO_PROGRESS
    assert json.loads((tmp_path / requeue.FILE).read_text()) == {"step": 8, "without_progress": 3}
    requeue.forget(tmp_path)  # a user submits it again
    assert [ends(1)[1] for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("damage", ['{"st', "[]", "{}", '{"step": null, "without_progress": "3"}'])
def test_a_damaged_count_of_restarts_is_ignored(damage: str, ends, tmp_path: Path) -> None:
    (tmp_path / requeue.FILE).write_text(damage)
    assert ends(1) == (1, True)


def test_an_outage_does_not_count_as_progress(ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it were, there would be no pause before the next start."""
    save(tmp_path, 8)
    assert ends(1) == (1, True)

    def away(path: Path) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(restart_policy, "read_regular", away)
    assert ends(1) == (1, True)
    assert json.loads((tmp_path / requeue.FILE).read_text()) == {"step": 8, "without_progress": 2}


def test_an_unreadable_count_does_not_count_as_progress(ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a job would be requeued at once, again and again."""
    pauses = []
    monkeypatch.setattr(requeue.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(restart_policy.Restarts, "pause_s", lambda restarts, *_: pauses.append(
        (restarts.step, restarts.without_progress)) or 0.0)  # fmt: skip
    save(tmp_path, 8)

    def away(path: Path) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(requeue, "read_regular", away)
    assert [ends(1)[1] for _ in range(2)] == [True, True]
    assert pauses == [(8, 1), (8, 1)]


def test_a_count_above_the_limit_is_the_limit(ends, tmp_path: Path) -> None:
    (tmp_path / requeue.FILE).write_text('{"step": 0, "without_progress": 99}')
    assert ends(1) == (EXIT_NO_PROGRESS, False)


IGNORE_SIGTERM = "trap '' TERM"


def start(slurm: Path, tasks: str, *runs: str, first: str = ":") -> subprocess.Popen:
    """Start the script with a shell command as its tasks. Returns when the command has written the file `began`, after
    the command `first`."""
    command = [sys.executable, "-m", "bfsys.launch.requeue", *(runs or [str(slurm)]), "--", "sh", "-c",
               f"{first}; echo > {slurm}/began; {tasks}"]  # fmt: skip
    process = subprocess.Popen(command, cwd=REPOSITORY)
    wait_for(slurm / "began")
    return process


def wait_for(file: Path) -> None:
    """Wait until a file exists and has content."""
    until = time.monotonic() + 900
    while not file.exists() or not file.stat().st_size:
        assert time.monotonic() < until, file
        time.sleep(0.05)


def test_fields_of_a_job_may_contain_spaces() -> None:
    line = (
        "JobId=7 JobName=a b Partition=low TRES=cpu=2,mem=4G Command=/home/me/my runs/job.sh NtasksPerN:B:S:C=1:0:*:* "
        "Comment=\n"
    )
    assert slurm_commands.fields_of(line) == {
        "JobId": "7",
        "JobName": "a b",
        "Partition": "low",
        "TRES": "cpu=2,mem=4G",
        "Command": "/home/me/my runs/job.sh",
        "NtasksPerN:B:S:C": "1:0:*:*",
        "Comment": "",
    }


def test_the_tasks_code_is_the_jobs(slurm: Path) -> None:
    assert start(slurm, "exit 2").wait(timeout=900) == 2
    assert not (slurm / "asked").exists()
    crashed = start(slurm, "kill -9 $$")
    wait_for(slurm / "asked")
    crashed.kill()  # like SLURM after a requeue
    crashed.wait()


@pytest.mark.parametrize("code", ERROR_CODES)
def test_the_noted_error_of_one_rank_counts_more_than_the_end_of_the_others(slurm: Path, code: int) -> None:
    """Ranks that wait on their GPUs for one that failed are killed, and srun returns the highest code."""
    note = json.dumps({"exit_code": code, "reason": "rank 3: no such file", "time": ""})
    assert start(slurm, f"echo '{note}' > {slurm}/ended.json; exit 137").wait(timeout=900) == code
    assert not (slurm / "asked").exists()


def test_the_noted_end_of_an_earlier_start_does_not_count(slurm: Path) -> None:
    note_end(slurm, 2, "no such file")
    crashed = start(slurm, "exit 137")
    wait_for(slurm / "asked")
    crashed.kill()
    crashed.wait()


def test_a_finished_run_keeps_its_end_until_training_takes_its_directory(slurm: Path) -> None:
    note_end(slurm, 0, "finished")
    assert start(slurm, "exit 2").wait(timeout=900) == 2
    assert how_it_ended(slurm)["exit_code"] == 0


def test_each_of_an_array_has_its_run(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [slurm / name for name in "abc"]
    for run in runs:
        run.mkdir()
    for name, value in (("SLURM_ARRAY_JOB_ID", "40"), ("SLURM_ARRAY_TASK_ID", "1"), ("JOB", "40_1")):
        monkeypatch.setenv(name, value)
    process = start(slurm, "exit 1", *map(str, runs))
    wait_for(slurm / "asked")
    process.kill()
    process.wait()
    assert [(run / requeue.FILE).exists() for run in runs] == [False, True, False]


def test_a_job_whose_submission_was_not_completed_ends(slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The launcher stores the job after sbatch has answered, and waits no longer than SLURM's limit for that."""
    monkeypatch.setattr(requeue, "PICKLE_WAIT_S", 0)
    monkeypatch.setattr(requeue.JobSupervisor, "run", lambda supervisor, command: 77)
    arguments = ["--folder", str(slurm), str(slurm), "--", "srun"]
    assert requeue.main(arguments) == 2
    assert "job 42: its submission was not completed" in capsys.readouterr().err
    (slurm / "42_submitted.pkl").touch()
    assert requeue.main(arguments) == 77


def test_a_cancelled_job_waits_for_its_tasks_and_is_not_requeued(slurm: Path) -> None:
    process = start(slurm, f"while [ ! -e {slurm}/saved ]; do sleep 0.1; done; exit 130", first=IGNORE_SIGTERM)
    (slurm / "facts").write_text("JobState=COMPLETING Reason=None PreemptTime=None")
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    (slurm / "saved").touch()
    assert process.wait(timeout=900) == 130
    assert not (slurm / "asked").exists()


@pytest.mark.parametrize("facts", [OUT_OF_TIME, PREEMPTED])
def test_tasks_that_outlast_the_end_of_the_job_do_not_prevent_the_requeue(slurm: Path, facts: str) -> None:
    process = start(slurm, f"while [ -e {slurm}/began ]; do sleep 0.1; done", first=IGNORE_SIGTERM)
    (slurm / "facts").write_text(facts)
    process.send_signal(signal.SIGTERM)
    wait_for(slurm / "asked")
    process.kill()
    process.wait()
    (slurm / "began").unlink()  # ends the tasks


@pytest.mark.parametrize(
    ("kill_wait", "away", "earliest", "latest"),
    [(9, 0, 2, 3), (9, 2, 4, 5), (30, 0, 22, 23), (2, 0, 0.6, 1), (1, 0, 0.3, 0.6)],
)
def test_the_script_asks_before_the_end_of_killwait(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, kill_wait: int, away: int, earliest: float, latest: float
) -> None:
    """If SLURM does not answer, the script retries every two seconds."""
    monkeypatch.setenv("KILL_WAIT", str(kill_wait))
    began = now = 100.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(requeue, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    (slurm / "facts").write_text(OUT_OF_TIME)
    (slurm / "away").write_text(f"{away}\n")
    supervisor = requeue.JobSupervisor(slurm)
    supervisor._end()
    assert supervisor._wait_for(SimpleNamespace(poll=lambda: None)) == requeue.OUT_OF_TIME
    assert earliest <= now - began < latest


def test_an_array_that_the_submitting_shell_was_in_is_not_the_jobs(slurm: Path, monkeypatch) -> None:
    for name, value in (("SLURM_ARRAY_JOB_ID", "40"), ("SLURM_ARRAY_TASK_ID", "3")):
        monkeypatch.setenv(name, value)
    process = start(slurm, f"env > {slurm}/environment; exit 1")
    wait_for(slurm / "asked")
    process.kill()
    process.wait()
    assert (slurm / "asked").read_text() == "requeue 42\n"
    assert "SLURM_ARRAY" not in (slurm / "environment").read_text()


def test_a_pause_ends_when_the_time_does(slurm: Path) -> None:
    (slurm / requeue.FILE).write_text('{"step": 0, "without_progress": 2}')
    process = start(slurm, "exit 1")
    time.sleep(1.5)
    assert not (slurm / "asked").exists()  # the pause is 300 s
    (slurm / "facts").write_text(OUT_OF_TIME)
    process.send_signal(signal.SIGTERM)
    wait_for(slurm / "asked")
    process.kill()
    process.wait()


def test_an_elastic_job_has_its_tasks_stopped_when_it_can_grow(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains on 2 of its 3 nodes. The tasks end after the signal, and the script asks for a requeue."""
    scripts = {
        "srun": f"echo $* > {slurm}/began; while [ ! -e {slurm}/cancelled ]; do sleep 0.1; done; exit 75",
        "sbatch": f"echo to start at {datetime.datetime.now().isoformat(timespec='seconds')} using 2 processors",
        "squeue": "",
        "scancel": f'echo "$*" > {slurm}/cancelled',
    }
    for name, script in scripts.items():
        (slurm / name).write_text(f"#!/bin/sh\n{script}\n")
        (slurm / name).chmod(0o755)
    (slurm / "facts").write_text(f"{RUNNING} Partition=batch Command=/job.sh")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    options = ["--fit=2,4", "--grow-every-s=0.1", str(slurm), "--", "srun", "train"]
    process = subprocess.Popen([sys.executable, "-m", "bfsys.launch.requeue", *options], cwd=REPOSITORY)
    try:
        wait_for(slurm / "began")
        assert (slurm / "began").read_text() == "--nodes=2 train\n"
        assert (slurm / "asked").read_text() == "update JobId=42 NumNodes=2\n"
        (slurm / "asked").unlink()
        time.sleep(1)
        assert not (slurm / "cancelled").exists()  # no checkpoint was saved
        save(slurm, 4)
        wait_for(slurm / "asked")
        assert (slurm / "cancelled").read_text() == "--signal=USR2 42\n"
        assert (slurm / "asked").read_text() == "requeue 42\n"
        process.kill()
        process.wait()
        process = subprocess.Popen(process.args, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        lines = [process.stdout.readline() for _ in range(2)]
        assert "does not try to grow before its next start" in lines[1]  # it has 3 nodes again
    finally:
        process.kill()
        process.communicate()

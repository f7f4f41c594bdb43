"""The script of a SLURM job: it runs the tasks, and decides whether the job is requeued.

    python -m bfsys.launch.requeue RUN [RUN …] -- srun …     a run directory for each member of an array

`--folder FOLDER` before these is the folder of the job's pickle, without which the job ends with code 2.
`--fit 2,4` before these makes the job elastic. The tasks run on the largest of these numbers of nodes that the job has.
With `--grow-every-s S` the job requeues itself when a larger one is free (elastic.py).

SLURM itself requeues a job whose node failed, or that it pre-empted. It does not requeue a job whose time is up, whose
rank crashed (srun then ends the other ranks), or that saved and exited during its grace time. In these cases this
process, the only one left, asks SLURM to requeue the job (restart_policy.py says when). It does the same if SLURM
cancels the job to pre-empt it (PreemptMode=CANCEL). It does not do so for a job that SLURM ends for another reason than
these and the time limit, because such a job was cancelled by a user. Ranks that SIGTERM stops while SLURM does not end
the job were stopped by their node, which sends it to all processes when it shuts down.

The script survives the SIGTERM that precedes its end by KillWait. If the tasks have not exited shortly before that end,
the job ends during a long step or a start, and is requeued as well.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from bfsys import console, process
from bfsys.errors import EXIT_CRASHED, EXIT_REQUEUE, EXIT_STOPPED, EXIT_USER_ERROR
from bfsys.files import exists, read_regular, replace_file
from bfsys.json_lines import parse_json_object
from bfsys.launch import elastic
from bfsys.launch.restart_policy import ERROR_CODES, FINAL_CODES, Restarts, newest_step
from bfsys.launch.slurm_commands import Answer, ask, fields_of
from bfsys.supervision.run_end import forget_end, how_it_ended, note_end

FILE = "restarts.json"
# Before restarts without progress. SLURM assigns a lost node until SlurmdTimeout has passed, 300 s by default.
PAUSES_S = (1.0, 60.0, 300.0)
POLL_S = 0.2
ASK_BEFORE_END_S = 8.0
KILL_WAIT_S = 30.0  # SLURM's default
PICKLE_WAIT_S = 60.0
END_WAIT_S = 600.0  # for SLURM to end this process after a requeue
# Tries of scontrol while the controller is unavailable: about an hour, or until SLURM ends this process.
TRIES, TRY_PAUSE_S = 180, 20.0
ENDING_LIMIT_S, ENDING_PAUSE_S = 5.0, 2.0  # limit and pause of tries after SIGTERM
# Errors that are permanent, so that a retry is useless.
REFUSALS = ("presently disabled", "Invalid job id", "Access/permission denied", "already finished", "not supported",
            "No such file or directory")  # fmt: skip
IS_REQUEUED = "Job is pending execution"
OUT_OF_TIME = 128 + signal.SIGTERM  # the code of tasks that did not end in time


class JobSupervisor:
    """One start of a job."""

    def __init__(self, run_dir: Path, growth: elastic.Growth | None = None) -> None:
        self.run_dir = run_dir
        self.growth = growth
        self.ending_since: float | None = None
        """When SLURM sent SIGTERM."""

    @property
    def is_being_ended(self) -> bool:
        return self.ending_since is not None

    def _end(self, *_: object) -> None:
        if self.ending_since is None:
            self.ending_since = time.monotonic()

    def run(self, command: list[str]) -> int:
        """Run the tasks. Returns the exit code of the job, if SLURM does not requeue it."""
        signal.signal(signal.SIGTERM, self._end)
        for number in (signal.SIGUSR1, signal.SIGUSR2):  # they are for the tasks
            signal.signal(number, signal.SIG_IGN)
        if (ended := how_it_ended(self.run_dir)) and ended["exit_code"]:
            with suppress(OSError):
                forget_end(self.run_dir)  # of an earlier start, which would be taken for that of this one
        return self.after(self._cause_of(self._wait_for(subprocess.Popen(command))))

    def _wait_for(self, tasks: subprocess.Popen) -> int:
        ask_at, next_try = None, 0.0
        while (code := tasks.poll()) is None:
            if self.ending_since is not None and ask_at is None and time.monotonic() > next_try:
                next_try = time.monotonic() + ENDING_PAUSE_S
                if job := job_facts(partial(ask, limit_s=ENDING_LIMIT_S)):
                    ask_at = self.ending_since + (asks_after_s() if is_ended_by_slurm(job) else float("inf"))
            if ask_at is not None and time.monotonic() > ask_at:
                return OUT_OF_TIME
            if self.growth and not self.is_being_ended and self.growth.is_due(job_facts):
                more, self.growth = self.growth.missing, None
                print(f"nodes: {more} more are free; the run saves and starts again with them", flush=True)
                # All ranks finish the step, save and exit with EXIT_REQUEUE.
                ask("scancel", "--signal=USR2", job_id())
            time.sleep(POLL_S)
        return code if code >= 0 else 128 - code

    def _cause_of(self, code: int) -> int:
        """The exit code of the rank that failed first. srun returns the highest code of all ranks, which is 137 if
        other ranks waited for that rank on their GPUs until srun killed them."""
        ended = None if code in FINAL_CODES else how_it_ended(self.run_dir)
        return ended["exit_code"] if ended and ended["exit_code"] in ERROR_CODES else code

    def after(self, code: int) -> int:
        """Requeue the job if necessary, after the tasks have ended with `code`. Returns the exit code of the job."""
        if code in FINAL_CODES and code != EXIT_STOPPED:
            return code
        job = job_facts(self._insist)
        if job.get("JobState", "RUNNING") != "RUNNING" and not is_ended_by_slurm(job):
            return code  # the job was cancelled, or SLURM itself requeues it
        is_preempted = job.get("PreemptTime", "None") != "None"
        if code == EXIT_STOPPED and job:  # SLURM or a node that shuts down requested the stop, not scancel
            code = EXIT_REQUEUE
        restarts = Restarts(self.run_dir, *_read_count(self.run_dir), PAUSES_S)
        # A pre-emption does not count as a restart without progress.
        remedy = "; it ran out of time before it could save: give a longer --time" if is_out_of_time(job) else ""
        pause_s = 0.0 if is_preempted and code not in FINAL_CODES else restarts.pause_s(code, remedy)
        if pause_s is None:
            return restarts.exit_code
        with suppress(OSError):  # a restart matters more than the right count
            _write_count(self.run_dir, restarts.step, restarts.without_progress)
        pause_s = 0.0 if code == EXIT_REQUEUE or self.is_being_ended else pause_s  # no time for a pause
        step = newest_step(self.run_dir)
        print(f"training ended with code {code}; restarting in {pause_s:.0f} s from step {step}", flush=True)
        until = time.monotonic() + pause_s
        while time.monotonic() < until:
            if self.is_being_ended:
                if not is_ended_by_slurm(job_facts(self._insist)):
                    return code
                break
            time.sleep(POLL_S)
        if problem := self._requeue():
            # With these codes, training expected a requeue, so its absence is a failure.
            note_end(self.run_dir, EXIT_CRASHED if code in (EXIT_REQUEUE, EXIT_STOPPED) else code, problem)
            print(f"error: {problem}", file=sys.stderr)
        else:
            time.sleep(END_WAIT_S)  # SLURM ends this process
        return code

    def _insist(self, *command: str) -> Answer:
        """Retry a SLURM command until it succeeds or fails permanently, up to TRIES times. Returns the last answer."""
        for number in range(1, TRIES + 1):
            answer = ask(*command, limit_s=ENDING_LIMIT_S if self.is_being_ended else None)
            if answer.is_good or is_final(answer):
                break
            if number < TRIES:
                pause_s = min(1, number / 10) * TRY_PAUSE_S
                time.sleep(min(pause_s, ENDING_PAUSE_S) if self.is_being_ended else pause_s)
        return answer

    def _requeue(self) -> str | None:
        """Ask SLURM to requeue this job, which ends all of its processes. Returns the problem if SLURM does not."""
        job = job_id()
        print(f"asking SLURM to requeue job {job}", flush=True)
        answer = self._insist("scontrol", "requeue", job)
        reason = answer.errors.strip()
        if answer.is_good or IS_REQUEUED in reason:  # an earlier try has succeeded
            return None
        again = "the checkpoint is saved: submit again with the same command to continue"
        if is_final(answer):
            return f"job {job} could not be requeued: {reason}; {again}"
        if job_facts().get("JobState") == "PENDING":
            return None
        return (
            f"job {job}: SLURM did not say whether it requeues the job: {reason}; see `squeue --jobs {job}`. If the "
            f"job is not there, {again}"
        )


def forget(run_dir: Path) -> None:
    """Reset the count of restarts without progress, because a user submits the run."""
    (run_dir / elastic.FILE).unlink(missing_ok=True)
    if step := newest_step(run_dir):
        _write_count(run_dir, step, 0)
    else:
        (run_dir / FILE).unlink(missing_ok=True)


def _read_count(run_dir: Path) -> tuple[int, int]:
    """(step of the newest checkpoint before this start, restarts without progress). If a file server does not answer,
    there is no progress, so that there is a pause before the next start."""
    try:
        counted = parse_json_object(read_regular(run_dir / FILE), {"step": int, "without_progress": int})
    except FileNotFoundError:
        counted = None
    except OSError:
        return newest_step(run_dir), 1
    return (counted["step"], counted["without_progress"]) if counted else (0, 0)


def _write_count(run_dir: Path, step: int, without_progress: int) -> None:
    content = json.dumps({"step": step, "without_progress": without_progress})
    replace_file(run_dir / FILE, content + "\n", durable=False)


def is_out_of_time(job: dict[str, str]) -> bool:
    return job.get("Reason") == "TimeLimit"


def is_ended_by_slurm(job: dict[str, str]) -> bool:
    """Whether SLURM itself ends the job without a requeue: its time is up, or it is pre-empted by PreemptMode=CANCEL
    without a grace time. It then ends at the time of the pre-emption. A user may cancel it later, in its grace time.
    """
    return is_out_of_time(job) or job.get("PreemptTime", "None") == job.get("EndTime")


def job_id() -> str:
    """The id of this process's job for scontrol. SLURM_JOB_ID alone may mean a whole array."""
    env = os.environ
    if "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def job_facts(ask: Callable[..., Answer] = ask) -> dict[str, str]:
    """SLURM's fields of this job: JobState, Reason, PreemptTime, …; empty if SLURM does not answer."""
    answer = ask("scontrol", "--oneliner", "show", "job", job_id())
    return fields_of(answer.output) if answer.is_good else {}


def asks_after_s() -> float:
    """Seconds from SIGTERM to the request for a requeue, in which the tasks can save. SIGKILL follows after KillWait,
    which sites set to one second or to minutes."""
    found = re.search(
        r"^KillWait\s*=\s*(\d+)", ask("scontrol", "show", "config", limit_s=ENDING_LIMIT_S).output, re.MULTILINE
    )
    kill_wait_s = float(found[1]) if found else KILL_WAIT_S
    return max(kill_wait_s - ASK_BEFORE_END_S, min(2.0, kill_wait_s / 3))


def is_final(answer: Answer) -> bool:
    """Whether the error is permanent, or an earlier try has succeeded."""
    return any(text in answer.errors for text in (*REFUSALS, IS_REQUEUED))


def has_pickle(folder: Path) -> bool:
    """Whether the launcher has stored this job, waiting for it as submitit does. It removes its files if SLURM does not
    answer sbatch in time. SLURM may start the job nevertheless, which would hold its nodes for all restarts."""
    pickle, until = folder / f"{job_id()}_submitted.pkl", time.monotonic() + PICKLE_WAIT_S
    while not (is_there := exists(pickle)) and time.monotonic() < until:
        time.sleep(POLL_S)
    return is_there


def main(arguments: list[str]) -> int:
    divide = arguments.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--fit", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--grow-every-s", type=float)
    parser.add_argument("runs", nargs="+", type=Path)
    args, command = parser.parse_args(arguments[:divide]), arguments[divide + 1 :]
    if len(args.runs) == 1:  # not an array: these variables come from the submitting shell
        os.environ.pop("SLURM_ARRAY_JOB_ID", None)
        os.environ.pop("SLURM_ARRAY_TASK_ID", None)
    if args.folder and not has_pickle(args.folder):
        print(f"error: job {job_id()}: its submission was not completed; submit the run again", file=sys.stderr)
        return EXIT_USER_ERROR
    run_dir, growth = args.runs[int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))], None
    if args.fit:
        used = elastic.use_nodes(args.fit)
        command.insert(1, f"--nodes={used}")
        if elastic.has_grown_in_vain(run_dir, used):
            print(
                "nodes: the job came back on no more nodes, so it does not try to grow before its next start",
                flush=True,
            )
        elif args.grow_every_s and used < max(args.fit):
            growth = elastic.Growth(run_dir, used, min(n for n in args.fit if n > used), args.grow_every_s)
    return JobSupervisor(run_dir, growth).run(command)


if __name__ == "__main__":
    process.prepare()
    console.prepare()
    console.go_on_without()  # the job is requeued even if its log cannot be written
    sys.exit(main(sys.argv[1:]))

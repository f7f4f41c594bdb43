"""When a run that has ended is started again: the policy of both launchers, and what a SLURM job's script does by it.

    python -m bfsys.restarts CODE RUN      the last line of a job's script: its tasks have ended with CODE

A crash, a hang and a lost node are started again from the newest whole checkpoint. An end that another start would not
change is none of these: finished, bad input, diverged, nothing can be saved, asked to stop or to requeue. Nor is the
third start again in a row that made no new checkpoint.

SLURM itself starts jobs again whose node failed, or that it ended for another one. But one whose time is up, or whose
rank died (srun then ends the others), or that saved and left while it had a grace time, would be over for good: so the
script asks, as the only one that is left, and that knows how it ended. Never for a job that is not running any more,
except for want of time: it was cancelled, and would come back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bfsys.checkpoint.files import LATEST, checkpoints_dir
from bfsys.errors import (
    EXIT_DIVERGED,
    EXIT_NO_PROGRESS,
    EXIT_REQUEUE,
    EXIT_STOPPED,
    EXIT_STORAGE,
    EXIT_USER_ERROR,
)
from bfsys.faults import note_end

# All ranks end with it, nearly together, and starting again would change nothing.
FINAL_CODES = (0, EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_STORAGE, EXIT_STOPPED)
MAX_RESTARTS = 3  # without a new checkpoint
PAUSES_S = (1.0, 10.0, 60.0)  # before them: what is only passing, such as a file server that is away, may pass
# Of jobs: SLURM hands out a node that is lost until it has missed it for SlurmdTimeout, 300 s by default.
JOB_PAUSES_S = (1.0, 60.0, 300.0)
END_WAIT_S = 600.0  # for SLURM, which was asked to end this process
SCONTROL_TIMEOUT_S = 60.0
FILE = "restarts.json"


@dataclass
class Restarts:
    """Counts the starts of a run that made no progress, which is a new checkpoint."""

    run_dir: Path
    step: int = 0
    """Of the newest checkpoint, before the present start."""
    without_progress: int = 0
    """Starts again since the last progress."""
    pauses_s: tuple[float, ...] = PAUSES_S
    exit_code: int = 0
    """Of the run, once there is to be no other start."""

    def pause_s(self, code: int) -> float | None:
        """How long to wait before the next start after one that ended with `code`; None: there is to be none."""
        self.exit_code = code
        if code in FINAL_CODES:
            return None
        before, self.step = self.step, newest_step(self.run_dir)
        if self.step != before:  # smaller, if later ones turned out to be damaged
            self.without_progress = 0
        if self.without_progress == MAX_RESTARTS:
            reason = f"{MAX_RESTARTS} starts again without a new checkpoint, the last one ended with code {code}"
            note_end(self.run_dir, EXIT_NO_PROGRESS, reason)
            print(f"error: {reason}; logs are in {self.run_dir}", file=sys.stderr)
            self.exit_code = EXIT_NO_PROGRESS
            return None
        self.without_progress += 1
        return self.pauses_s[self.without_progress - 1] if self.step == before else 0.0


def newest_step(run_dir: Path) -> int:
    """Of the checkpoint that was saved last; 0 if there is none."""
    try:
        return int((checkpoints_dir(run_dir) / LATEST).read_text().removeprefix("step_"))
    except (OSError, ValueError):
        return 0


def forget(run_dir: Path) -> None:
    """A person has started the run: nothing of before counts."""
    (run_dir / FILE).unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    code, run_dir = int(arguments[0]), Path(arguments[1])
    job = job_facts()
    is_out_of_time = job.get("Reason") == "TimeLimit"  # SLURM is ending it, and starts it again if asked to
    if job.get("JobState", "RUNNING") != "RUNNING" and not is_out_of_time:
        return code  # it was cancelled, or SLURM itself starts it again
    is_preempted = job.get("PreemptTime", "None") != "None"
    if code == EXIT_STOPPED and (is_out_of_time or is_preempted):
        code = EXIT_REQUEUE  # it was SLURM that asked to stop, and no person
    path, counted = run_dir / FILE, {}
    with suppress(OSError, ValueError):
        counted = json.loads(path.read_text())
    restarts = Restarts(run_dir, counted.get("step", 0), counted.get("without_progress", 0), JOB_PAUSES_S)
    # A pre-emption is nobody's fault and does not count.
    pause_s = 0.0 if is_preempted and code not in FINAL_CODES else restarts.pause_s(code)
    if pause_s is None:
        return restarts.exit_code
    path.write_text(json.dumps({"step": restarts.step, "without_progress": restarts.without_progress}) + "\n")
    if is_out_of_time:
        pause_s = 0.0  # there are seconds left
    print(
        f"training ended with code {code}: starting again in {pause_s:.0f} s, from step {newest_step(run_dir)}",
        flush=True,
    )
    time.sleep(pause_s)
    if requeue():
        time.sleep(END_WAIT_S)  # SLURM ends this script
    return code


def job_id() -> str:
    """Of the job that this process is in, as scontrol understands it: the number alone may mean a whole array."""
    env = os.environ
    if "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def job_facts() -> dict[str, str]:
    """What SLURM says of this job: JobState, Reason, PreemptTime, …; nothing if it does not answer."""
    try:
        said = _scontrol("--oneliner", "show", "job", job_id())
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(word.split("=", 1) for word in said.split() if "=" in word)


def requeue() -> bool:
    """Ask SLURM to start this job again, which ends all of its processes; False if it does not."""
    print(f"asking SLURM to start job {job_id()} again", flush=True)
    try:
        _scontrol("requeue", job_id())
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        print(
            f"error: job {job_id()} could not be requeued: {reason}; the checkpoint is saved: "
            f"submit again with the same command to continue",
            file=sys.stderr,
        )
        return False
    return True


def _scontrol(*arguments: str) -> str:
    return subprocess.run(
        ["scontrol", *arguments], check=True, capture_output=True, text=True, timeout=SCONTROL_TIMEOUT_S
    ).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""When a run that has ended is started again: the policy of both launchers, and what a SLURM job's script does by it.

    python -m bfsys.restarts CODE RUN      the last line of a job's script: its tasks have ended with CODE

A crash, a hang and a lost node are started again from the newest whole checkpoint. An end that another start would not
change is none of these: finished, bad input, diverged, nothing can be saved, asked to stop or to requeue. Nor is the
third start again in a row that made no new checkpoint.

SLURM itself starts jobs again whose node failed, or that were pre-empted; rank 0 asks for it when the time is up
(job.py). A rank that dies, be it of a signal or an error, makes srun end the others, and the job would be FAILED for
good: so the script asks, as the only one that is left.
"""

from __future__ import annotations

import json
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
from bfsys.job import END_WAIT_S, requeue

# All ranks end with it, nearly together, and starting again would change nothing.
FINAL_CODES = (0, EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_STORAGE, EXIT_REQUEUE, EXIT_STOPPED)
MAX_RESTARTS = 3  # without a new checkpoint
PAUSES_S = (1.0, 10.0, 60.0)  # before them: what is only passing, such as a file server that is away, may pass
FILE = "restarts.json"


@dataclass
class Restarts:
    """Counts the starts of a run that made no progress, which is a new checkpoint."""

    run_dir: Path
    step: int = 0
    """Of the newest checkpoint, before the present start."""
    without_progress: int = 0
    """Starts again since the last progress."""
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
        return PAUSES_S[self.without_progress - 1] if self.step == before else 0.0


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
    path, counted = run_dir / FILE, {}
    with suppress(OSError, ValueError):
        counted = json.loads(path.read_text())
    restarts = Restarts(run_dir, counted.get("step", 0), counted.get("without_progress", 0))
    pause_s = restarts.pause_s(code)
    if pause_s is None:
        return restarts.exit_code
    path.write_text(json.dumps({"step": restarts.step, "without_progress": restarts.without_progress}) + "\n")
    print(f"training ended with code {code}: starting again in {pause_s:.0f} s, from step {restarts.step}", flush=True)
    time.sleep(pause_s)
    if requeue():
        time.sleep(END_WAIT_S)  # SLURM ends this script
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

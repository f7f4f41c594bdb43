"""The restart policy of both launchers (launchers/local.py, requeue.py).

After a crash, a hang or a lost node, a run is restarted from the newest intact checkpoint. It is not restarted if
another start would end in the same way: the run is finished, its input is bad, it has diverged, it cannot write a
checkpoint, or it was asked to stop. After three restarts in a row without a new checkpoint, it is not restarted again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from bfsys.checkpoint.files import LATEST, checkpoints_dir
from bfsys.errors import (
    EXIT_DIVERGED,
    EXIT_NO_PROGRESS,
    EXIT_STOPPED,
    EXIT_STORAGE,
    EXIT_USER_ERROR,
    TRANSIENT_ERRNOS,
)
from bfsys.files import read_regular
from bfsys.process import end_of
from bfsys.supervision.run_end import note_end

ERROR_CODES = (EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_STORAGE)
FINAL_CODES = (0, *ERROR_CODES, EXIT_STOPPED)
MAX_RESTARTS = 3  # restarts without a new checkpoint
PAUSES_S = (1.0, 10.0, 60.0)  # before them, for temporary failures such as an unavailable file server


@dataclass
class Restarts:
    """Counts the restarts of a run without progress. Progress is a new checkpoint."""

    run_dir: Path
    step: int = 0
    """Step of the newest checkpoint before the current start."""
    without_progress: int = 0
    """Restarts since the last progress."""
    pauses_s: tuple[float, ...] = PAUSES_S
    exit_code: int = 0
    """Exit code of the run after its last start."""

    def pause_s(self, code: int, remedy: str = "") -> float | None:
        """Return the seconds to wait before the next start, after one that ended with `code`; None for no restart. If
        this was one restart too many, the recorded reason ends with `remedy`."""
        self.exit_code = code
        if code in FINAL_CODES:
            return None
        before, self.step = self.step, newest_step(self.run_dir, self.step)
        if self.step != before:  # it is smaller if later checkpoints were damaged
            self.without_progress = 0
        if self.without_progress >= MAX_RESTARTS:
            reason = (
                f"gave up after {MAX_RESTARTS} restarts without a new checkpoint; the last start {end_of(code)}{remedy}"
            )
            note_end(self.run_dir, EXIT_NO_PROGRESS, reason)
            print(f"error: {reason}; logs are in {self.run_dir}", file=sys.stderr)
            self.exit_code = EXIT_NO_PROGRESS
            return None
        self.without_progress += 1
        return self.pauses_s[self.without_progress - 1] if self.step == before else 0.0


def newest_step(run_dir: Path, unknown: int = 0) -> int:
    """The step of the newest checkpoint; 0 if there is none, and `unknown` if a file server does not answer."""
    try:
        return int(read_regular(checkpoints_dir(run_dir) / LATEST).removeprefix(b"step_"))
    except OSError as error:
        return unknown if error.errno in TRANSIENT_ERRNOS else 0
    except ValueError:
        return 0

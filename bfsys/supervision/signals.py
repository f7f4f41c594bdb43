"""Stop requests: a signal to any rank stops all ranks after the same step, with a checkpoint.

SIGUSR2 or SIGUSR1 (a job is about to run out of time) ends with EXIT_REQUEUE, so that a launcher restarts the run:
launchers of bfsys have SLURM send SIGUSR2, and the job scripts of many users send SIGUSR1. SIGTERM, Ctrl-C and SIGHUP
(the terminal or the ssh connection is lost) end with EXIT_STOPPED, because a requeue would undo a user's
cancellation. A run that was started by `nohup` ignores SIGHUP.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from bfsys.errors import EXIT_REQUEUE, EXIT_STOPPED

# A terminal's Ctrl-C may reach a rank twice, from the terminal and from a launcher. Only a repetition after this time
# means that the user does not want to wait for the checkpoint.
REPEAT_S = 2.0

EXIT_CODES: dict[int, int] = {
    signal.SIGUSR1: EXIT_REQUEUE,
    signal.SIGUSR2: EXIT_REQUEUE,
    signal.SIGTERM: EXIT_STOPPED,
    signal.SIGINT: EXIT_STOPPED,
    signal.SIGHUP: EXIT_STOPPED,
}


def stop_signals() -> list[int]:
    """The signals that ask this process to stop: all of EXIT_CODES, except SIGHUP if `nohup` makes it ignored."""
    return [n for n in EXIT_CODES if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def ends_at_once(number: int) -> bool:
    """Whether a repeated signal comes from a user who does not want to wait for the checkpoint.

    In a pre-emption with a grace time, SLURM sends SIGTERM twice, and leaves KillWait for saving after the second one.
    Schedulers may repeat SIGUSR1 and SIGUSR2, and every process that ends sends SIGHUP.
    """
    return number == signal.SIGINT or (number == signal.SIGTERM and "SLURM_JOB_ID" not in os.environ)


class StopRequests:
    """Catches the signals while open. `exit_code` is 0 until a stop is requested; then it is the code to exit with
    after saving. The ranks agree on it after each step."""

    def __init__(self) -> None:
        self.exit_code = 0
        self._received_at: dict[int, float] = {}
        self._process = os.getpid()
        self._previous = {number: signal.signal(number, self._receive) for number in stop_signals()}

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader process inherited the handler, and ignores the signal
            return
        now = time.monotonic()
        waited_s = now - self._received_at.setdefault(number, now)
        if waited_s > REPEAT_S and ends_at_once(number):
            os._exit(EXIT_CODES[number])
        self.exit_code = max(self.exit_code, EXIT_CODES[number])

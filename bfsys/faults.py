"""Stop requests: a signal to any one rank stops all of them after the same step, with a checkpoint.

SIGUSR2 (a job that is about to run out of time) ends with EXIT_REQUEUE, so that a launcher starts it again;
SIGTERM and Ctrl-C end with EXIT_STOPPED, because requeueing on these would undo a person's cancellation.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from bfsys.errors import EXIT_STOPPED

EXIT_REQUEUE = 75  # EX_TEMPFAIL: "try again later"

# A terminal's Ctrl-C reaches a rank twice, from the terminal and from the launcher; only a repetition after
# this long is the impatience of a person. Another signal is none: a pre-emption sends SIGTERM after its warning.
REPEAT_S = 2.0

_EXIT_CODES = {signal.SIGUSR2: EXIT_REQUEUE, signal.SIGTERM: EXIT_STOPPED, signal.SIGINT: EXIT_STOPPED}


class StopRequests:
    """Catches the signals while open. `exit_code` is what this rank was asked for: 0 is to go on, another the code to
    exit with after saving. The ranks agree on it after each step."""

    def __init__(self) -> None:
        self.exit_code = 0
        self._received_at: dict[int, float] = {}
        self._process = os.getpid()
        self._previous = {number: signal.signal(number, self._receive) for number in _EXIT_CODES}

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader process inherited the handler: stopping is not its affair
            return
        now = time.monotonic()
        waited_s = now - self._received_at.setdefault(number, now)
        if waited_s > REPEAT_S and number != signal.SIGUSR2:  # schedulers may repeat that one
            os._exit(_EXIT_CODES[number])
        self.exit_code = max(self.exit_code, _EXIT_CODES[number])

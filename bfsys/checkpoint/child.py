"""Child processes of training that work on checkpoints while training continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from bfsys.process import blocking

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def start_child(arguments: Sequence[str], task: dict, descriptors: Sequence[int] = ()) -> subprocess.Popen:
    """Start Python with these arguments, a task as JSON on its standard input and these open files. Its standard output
    is a pipe."""
    # A run that stops finishes its save first, so the child starts with these signals blocked.
    with blocking(STOP_SIGNALS):
        process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=descriptors
        )
    assert process.stdin is not None  # it is a PIPE
    with suppress(BrokenPipeError):  # it has already ended; the code that waits for it reports this
        process.stdin.write(json.dumps({"parent": os.getpid(), **task}).encode())
        process.stdin.close()
    process.stdin = None  # so that `communicate` only reads
    return process

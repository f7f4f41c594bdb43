"""Processes of the local launcher: ranks, and the runs of a sweep.

Each process gets its own process group, so that a terminal's Ctrl-C reaches it only once, through the launcher. Linux's
parent-death signal kills it when the launcher ends, even if the launcher is killed. Rejected alternatives: ranks that
watch their parent, because a rank that is blocked in a collective cannot look; and SIGTERM as the signal, for the same
reason.

CPU ranks are forked from the launcher, which has imported everything, so a restart takes a fraction of the time of the
first start. `ps -o comm` shows them as "bfsys rank 0" and so on. GPU ranks are separate programs, because CUDA does not
work in a process that was forked after CUDA was initialised.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bfsys.launch.job import TrainJob
from bfsys.process import blocking, die_with, set_name
from bfsys.supervision.signals import EXIT_CODES, stop_signals


class Forked:
    """A forked process that calls `act()`, with the interface of subprocess.Popen."""

    def __init__(self, act: Callable[[], None], name: str, log: Path | None) -> None:
        """`ps -o comm` shows `name`. The output goes to `log`, or to the console of this process."""
        self._process = multiprocessing.get_context("fork").Process(
            target=self._begin, args=(act, name.encode(), log, os.getpid())
        )
        # In the child, signals stay blocked until the handlers of this process are removed.
        with blocking(EXIT_CODES):
            self._process.start()
        assert self._process.pid is not None  # it was started
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> None:
        self._process.join()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    @staticmethod
    def _begin(act: Callable[[], None], name: bytes, log: Path | None, parent: int) -> None:
        os.setpgid(0, 0)
        die_with(parent)
        set_name(name)
        if log:
            with open(log, "ab") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        for number in stop_signals():
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)
        act()


Process = subprocess.Popen | Forked


def fork_rank(job: TrainJob, rank: int, env: dict[str, str], log: Path) -> Forked:
    def act() -> None:
        os.environ.update(env)
        _, sys.argv[0], *sys.argv[1:] = job.command()
        runpy.run_path(sys.argv[0], run_name="__main__")

    return Forked(act, f"bfsys rank {rank}", log)


def import_what_ranks_need() -> None:
    """Import modules before ranks are forked. This takes 6 of the 11 s of the first start on two cores."""
    import bfsys.train  # noqa: F401
    from bfsys.engine import import_deepspeed

    import_deepspeed()
    # DeepSpeed imports these only when it sets up an optimizer. Other versions may have other names for them.
    for name in ("torch._dynamo", "deepspeed.runtime.engine"):
        with suppress(ImportError):
            importlib.import_module(name)


def start_program(job: TrainJob, rank: int, env: dict[str, str], log: Path) -> subprocess.Popen:
    parent = os.getpid()
    with open(log, "ab") as output:
        return subprocess.Popen(
            job.command(),
            env={**env, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=lambda: die_with(parent),
        )

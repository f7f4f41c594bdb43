from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from bfsys.supervision import signals
from bfsys.supervision.signals import EXIT_REQUEUE, EXIT_STOPPED, StopRequests
from tests.conftest import REPOSITORY


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in signals.EXIT_CODES}
    stop = StopRequests()
    yield stop
    stop.close()
    assert {number: signal.getsignal(number) for number in signals.EXIT_CODES} == before


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([], 0),
        ([signal.SIGUSR1], EXIT_REQUEUE),
        ([signal.SIGUSR2], EXIT_REQUEUE),
        ([signal.SIGTERM], EXIT_STOPPED),
        ([signal.SIGINT], EXIT_STOPPED),
        ([signal.SIGHUP], EXIT_STOPPED),  # the terminal was closed
        ([signal.SIGINT, signal.SIGINT], EXIT_STOPPED),  # from a terminal and from a launcher
        ([signal.SIGUSR2, signal.SIGTERM], EXIT_STOPPED),  # a cancellation outweighs a time limit
        ([signal.SIGTERM, signal.SIGUSR2], EXIT_STOPPED),
    ],
)
def test_signals_become_exit_codes(stop: StopRequests, signals: list[int], code: int) -> None:
    for number in signals:
        os.kill(os.getpid(), number)
    assert stop.exit_code == code


def test_a_late_repetition_ends_at_once_and_another_signal_does_not() -> None:
    code = (
        "import os, signal, time\n"
        "from bfsys.supervision import signals\n"
        "signals.REPEAT_S = 0.1\n"
        "stop = signals.StopRequests()\n"
        "os.kill(os.getpid(), signal.SIGUSR2); time.sleep(0.2)\n"
        "os.kill(os.getpid(), signal.SIGTERM); print('still here', flush=True); time.sleep(0.2)\n"
        "os.kill(os.getpid(), signal.SIGTERM); print('never', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert (result.returncode, result.stdout) == (EXIT_STOPPED, "still here\n")


def test_a_scheduler_may_repeat_sigterm(stop: StopRequests, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM sends it at the begin and at the end of a grace time. After the second one, KillWait is left to save."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(signals, "REPEAT_S", -1.0)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.exit_code == EXIT_STOPPED


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequests()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.exit_code == 0
        stop.close()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_loader_process_ignores_the_inherited_handler(stop: StopRequests) -> None:
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(stop.exit_code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from bfsys import faults
from bfsys.faults import EXIT_REQUEUE, EXIT_STOPPED, StopRequests
from tests.conftest import REPOSITORY


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in faults._EXIT_CODES}
    stop = StopRequests()
    yield stop
    stop.close()
    assert {number: signal.getsignal(number) for number in faults._EXIT_CODES} == before


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([], 0),
        ([signal.SIGUSR2], EXIT_REQUEUE),
        ([signal.SIGTERM], EXIT_STOPPED),
        ([signal.SIGINT], EXIT_STOPPED),
        ([signal.SIGINT, signal.SIGINT], EXIT_STOPPED),  # a terminal's and a launcher's
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
        "from bfsys import faults\n"
        "faults.REPEAT_S = 0.1\n"
        "stop = faults.StopRequests()\n"
        "os.kill(os.getpid(), signal.SIGUSR2); time.sleep(0.2)\n"
        "os.kill(os.getpid(), signal.SIGTERM); print('still here', flush=True); time.sleep(0.2)\n"
        "os.kill(os.getpid(), signal.SIGTERM); print('never', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (EXIT_STOPPED, "still here\n")


def test_a_loader_process_ignores_the_inherited_handler(stop: StopRequests) -> None:
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(stop.exit_code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

"""Real servers, on ports that are free."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

LIMIT_S = 900


class Server:
    """A process of `bfsys serve` that is ready."""

    def __init__(self, *arguments: str | Path, program: Sequence[str] = ("-m", "bfsys")) -> None:
        command = [sys.executable, *program, "serve", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        assert self.process.stdout
        line = self.process.stdout.readline()
        found = re.fullmatch(r"(http://\S+:[1-9]\d*)  ready; .*\n", line)
        if not found:
            self.process.kill()
            raise AssertionError(line + self.process.communicate()[1])
        self.url = found[1]

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Stop it, and return (exit code, output since it was ready)."""
        self.process.send_signal(number)
        try:
            printed = self.process.communicate(timeout=LIMIT_S)
        finally:
            self.process.kill()
        return self.process.returncode, "".join(printed)


@pytest.fixture(scope="session")
def server(finished_run: Path) -> Iterator[Server]:
    """A server with the default limits, except the time of a request."""
    started = Server(finished_run, "--port", "0", "--timeout", str(LIMIT_S))
    yield started
    code, printed = started.stop()
    assert (code, printed) == (0, "")  # no request was logged


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def begin(*arguments: str | Path, **options: Sequence[str]) -> Server:
        started.append(Server(*arguments, **options))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        one.process.communicate()

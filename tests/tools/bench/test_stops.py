"""Benchmarks that are stopped by SIGTERM, as `timeout` does, or SIGHUP leave no files and no processes behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY

LIMIT_S = 900.0


def test_every_benchmark_ends_by_run_command() -> None:
    for path in sorted((REPOSITORY / "tools" / "bench").glob("*.py")):
        source = path.read_text()
        if source.rstrip().endswith("(main)"):
            assert "    run_command(main" in source, path.name


@pytest.mark.parametrize(
    ("command", "made", "number"),
    [
        (["bench_plan.py", "--samples", "1000000", "--ranks", "8"], "bfsys-plan-*", signal.SIGHUP),
        (["bench_copies.py"], "*/requests.log", signal.SIGTERM),
    ],
)
def test_nothing_is_left_behind(command: list[str], made: str, number: int, tmp_path: Path) -> None:
    if command[0] == "bench_copies.py":
        pytest.importorskip("moto.server", reason="needs moto[server]")
        pytest.importorskip("s3fs")
    command = [sys.executable, str(REPOSITORY / "tools" / "bench" / command[0]), *command[1:]]
    folder = tmp_path / "temporary"
    folder.mkdir()
    with open(tmp_path / "output", "wb") as output:
        benchmark = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "TMPDIR": str(folder)})
    children: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + LIMIT_S
        # An empty file is not enough: the process that writes it may just have been started.
        while not any(path.stat().st_size for path in folder.glob(made)):
            assert benchmark.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        children = psutil.Process(benchmark.pid).children(recursive=True)
        benchmark.send_signal(number)
        assert benchmark.wait(LIMIT_S) == 128 + number
        assert list(folder.iterdir()) == []
        assert psutil.wait_procs(children, LIMIT_S)[1] == []
    finally:
        for process in (benchmark, *children):
            with suppress(psutil.NoSuchProcess):
                process.kill()

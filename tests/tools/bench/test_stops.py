"""Benchmarks that are stopped by SIGTERM, as `timeout` does, leave no files and no processes behind."""

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
from tools.bench.command import STOPPED

LIMIT_S = 900.0


@pytest.mark.parametrize("path", sorted((REPOSITORY / "tools" / "bench").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_with_folders_or_processes_cleans_up(path: Path) -> None:
    source = path.read_text()
    is_command = source.rstrip().endswith("(main)")
    if is_command and any(word in source for word in ("TemporaryDirectory(", "Popen(", ".Process(")):
        assert "run_benchmark" in source


@pytest.mark.parametrize(
    ("command", "made"),
    [
        (["bench_plan.py", "--samples", "1000000", "--ranks", "8"], "bfsys-plan-*"),
        (["bench_copies.py"], "*/requests.log"),
    ],
)
def test_nothing_is_left_behind(command: list[str], made: str, tmp_path: Path) -> None:
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
        benchmark.send_signal(signal.SIGTERM)
        assert benchmark.wait(LIMIT_S) == STOPPED
        assert list(folder.iterdir()) == []
        assert psutil.wait_procs(children, LIMIT_S)[1] == []
    finally:
        for process in (benchmark, *children):
            with suppress(psutil.NoSuchProcess):
                process.kill()

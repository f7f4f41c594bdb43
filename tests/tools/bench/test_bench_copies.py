"""The benchmark of copies trains beside a copy to a real server."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_a_copy_is_measured() -> None:
    pytest.importorskip("moto.server", reason="needs moto[server]")
    pytest.importorskip("s3fs")
    command = [sys.executable, "tools/bench/bench_copies.py", "--copies", "1", "--files", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    figures = {line[:40].strip(): line[40:] for line in done.stdout.splitlines()}
    assert figures["checkpoint"].endswith("in 5 files")
    assert figures["step beside a copy"].endswith(" x")
    assert int(figures["a copy"].split()[2]) > 5  # requests

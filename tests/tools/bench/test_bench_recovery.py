"""Small runs of both measurements: their figures and their output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tools.bench import bench_recovery


@pytest.mark.slow
def test_saving(tmp_path: Path) -> None:
    command = [sys.executable, "tools/bench/bench_recovery.py", "saving", "--files", "1", "--file-bytes", "2000"]
    command += ["--folder", str(tmp_path), "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert rows["none"]["stall_s"] < rows["beside"]["stall_s"] < rows["waiting"]["stall_s"]
    assert "x less" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.slow
def test_attacks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.json"
    arguments = ["attacks", "--minutes", "1.2", "--every-s", "30", "--folder", str(tmp_path), "--json", str(out)]
    assert bench_recovery.main(arguments) == 0
    result = json.loads(out.read_text())
    assert result["killed"] == result["restarts"] == 2
    assert sum(result["seconds"].values()) == pytest.approx(result["wall_s"], rel=0.05)
    assert 0 < result["goodput"] < 1
    assert "goodput" in capsys.readouterr().out

"""`make quickstart` in a copy of the repository: it reaches the accuracies that README names, and can be repeated."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quickstart_learns_both_kinds_of_digits(tmp_path: Path) -> None:
    copy = tmp_path / "bfsys"
    copy.mkdir()
    for name in ("bfsys", "launchers", "configs", "tools", "Makefile", "setup.cfg", "pyproject.toml", "README.md"):
        source = REPOSITORY / name
        shutil.copytree(source, copy / name) if source.is_dir() else shutil.copy(source, copy / name)
    (copy / ".venv").symlink_to(sys.prefix)
    make = ["make", "-o", ".venv/installed", "quickstart"]  # it installs nothing

    first = subprocess.run(make, cwd=copy, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "Try next:" in first.stdout
    result = subprocess.run(
        [sys.executable, "-m", "bfsys.evaluate", "runs/quickstart", "--json"], cwd=copy, capture_output=True, text=True
    )
    sources = json.loads(result.stdout)["sources"]
    assert sources["image"]["samples"] == 718
    assert sources["speech"]["samples"] == 1000
    assert sources["image"]["top1"] >= 0.965
    assert sources["speech"]["top1"] >= 0.94

    again = subprocess.run(make, cwd=copy, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    for text in ("already there", "already packed", "continuing runs/quickstart after step 400"):
        assert text in again.stdout

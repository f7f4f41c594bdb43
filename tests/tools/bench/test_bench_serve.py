"""The rate of requests is measured, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bfsys.errors import UserError
from tools.bench import bench_serve

pytest.importorskip("fastapi")


def test_both_ways_answer(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "serve.json"
    small = ["--clients", "1,4", "--file-bytes", "50", "--seconds", "0.3", "--repeats", "1", "--json", str(out)]
    assert bench_serve.main([str(finished_run), *small]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["clients"] for row in rows] == [1, 4]
    assert all(row["batches"] > 0 and row["one by one"] > 0 for row in rows)
    assert "requests/s, files of 50 bytes" in capsys.readouterr().out


def test_a_run_is_found_from_the_current_folder(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished_run.parent)
    small = ["--clients", "1", "--file-bytes", "50", "--seconds", "0.1", "--repeats", "1"]
    assert bench_serve.main([finished_run.name, *small]) == 0
    with pytest.raises(UserError, match="gone: cannot be served; the reason is above"):
        bench_serve.main(["gone", *small])
    errors = capfd.readouterr().err
    assert "gone: no such directory" in errors
    assert "Traceback" not in errors


def test_wrong_arguments(tmp_path: Path) -> None:
    for arguments, expected in ((["--clients", "0,x"], "--clients"), (["--seconds", "0"], "--seconds")):
        with pytest.raises(UserError, match=expected):
            bench_serve.main([str(tmp_path), *arguments])

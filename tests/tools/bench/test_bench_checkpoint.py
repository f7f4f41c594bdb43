"""The benchmark of checkpoints of many ranks writes, verifies and removes small ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bfsys.config import Model
from tools.bench import bench_checkpoint


def test_both_layouts_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_checkpoint, "Model", lambda size: Model(size="custom", dim=8, layers=1, max_tokens=64))
    out = tmp_path / "checkpoint.json"
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    assert bench_checkpoint.main(["--ranks", "1", "3", "--folder", str(folder), "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["ranks"], row["stages"], row["files"]) for row in rows] == [
        (1, "0 1 2", 5), (1, "3", 5), (3, "0 1 2", 13), (3, "3", 13),
    ]  # fmt: skip
    assert rows[0]["pieces"] < rows[2]["pieces"] < rows[3]["pieces"]
    assert all(row["mb"] > row["mb_beside_numbers"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)
    assert not list(folder.iterdir())

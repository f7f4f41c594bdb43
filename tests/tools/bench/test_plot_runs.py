"""Learning curves as pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from bfsys.errors import UserError
from tools.bench import plot_runs


def test_curves_are_those_of_the_run(finished_run: Path, tmp_path: Path) -> None:
    problems: list[str] = []
    curves = plot_runs.read(finished_run, "loss", problems)
    assert not problems
    assert set(curves) == {"a", "b"}
    assert curves["a"]["train"][:, 0].tolist() == [40, 80, 120]
    assert curves["a"]["eval"][-1, 0] == 120
    assert curves["a"]["train"][0, 1] > curves["a"]["train"][-1, 1]
    plot_runs.main([str(tmp_path / "curves.png"), str(finished_run), "--score", "loss"])
    with Image.open(tmp_path / "curves.png") as image:
        assert min(image.size) > 300


def test_a_source_without_evaluation_and_an_evaluation_before_training(tmp_path: Path) -> None:
    def line(kind: str, step: int, *sources: str) -> str:
        return json.dumps({"kind": kind, "step": step, "top1": 0.5, "sources": {s: {"top1": 0.5} for s in sources}})

    lines = [line("eval", 1, "b"), line("train", 2, "a", "b"), line("eval", 2, "b")]
    for count in (1, 3):
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:count]))
        plot_runs.main([str(tmp_path / "curves.png"), str(tmp_path)])
    curves = plot_runs.read(tmp_path, "top1", [])
    assert {name: [len(points[kind]) for kind in ("train", "eval")] for name, points in curves.items()} == {
        "b": [1, 2], "a": [1, 0],
    }  # fmt: skip


def test_plot_runs_names_folders_without_measurements(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no measurement; give the directory of a run"):
        plot_runs.main([str(tmp_path / "curves.png"), str(finished_run), str(tmp_path)])
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="holds no measurement"):
        plot_runs.main([str(tmp_path / "curves.png"), str(tmp_path)])
    with pytest.raises(UserError, match="cannot be written"):
        plot_runs.main([str(tmp_path / "none" / "curves.png"), str(finished_run)])

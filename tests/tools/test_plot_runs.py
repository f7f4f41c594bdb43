"""Learning curves as pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from bfsys.errors import UserError
from tools import plot_runs


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


def test_what_is_no_run_is_named(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl that can be read"):
        plot_runs.main([str(tmp_path / "curves.png"), str(finished_run), str(tmp_path)])
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="has no measurement yet"):
        plot_runs.main([str(tmp_path / "curves.png"), str(tmp_path)])
    with pytest.raises(UserError, match="cannot be written"):
        plot_runs.main([str(tmp_path / "none" / "curves.png"), str(finished_run)])

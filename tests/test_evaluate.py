"""`python -m bfsys.evaluate` on a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bfsys.errors import UserError


def test_evaluation_counts_each_file_once_per_source(finished_run: Path, evaluate_run) -> None:
    result = json.loads(evaluate_run(finished_run, "--json"))
    assert result["samples"] == 35
    assert result["step"] == 120
    assert {name: s["samples"] for name, s in result["sources"].items()} == {"a": 21, "b": 14}
    weighted = sum(s["top1"] * s["samples"] for s in result["sources"].values()) / 35
    assert result["top1"] == pytest.approx(weighted)
    assert result["top1"] > 0.5, "the model learned nothing: the other assertions say little"
    assert "top-1" in evaluate_run(finished_run)


def test_evaluation_agrees_with_the_training_runs_own(finished_run: Path, evaluate_run) -> None:
    own = [json.loads(x) for x in (finished_run / "metrics.jsonl").read_text().splitlines()][-1]
    again = json.loads(evaluate_run(finished_run, "--json", "--weights", "last"))
    assert own["kind"] == "eval"
    for key in ("loss", "top1", "top5"):
        assert again[key] == pytest.approx(own[key], rel=1e-6)


def test_a_split_that_no_source_has_is_said(finished_run: Path, evaluate_run) -> None:
    with pytest.raises(UserError, match="has a split 'test'"):
        evaluate_run(finished_run, "--split", "test")

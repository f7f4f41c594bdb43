"""The benchmark of planning measures a small index."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bfsys.errors import UserError
from tools.bench import bench_plan


def test_start_steps_and_fetches_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_plan, "in_a_process", lambda act, *arguments: act(*arguments))
    out = tmp_path / "plan.json"
    arguments = ["--samples", "30000", "--ranks", "2", "--steps", "5", "--nodes", "2", "--json", str(out)]
    assert bench_plan.main(arguments) == 0
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert (row["samples"], row["ranks"], row["lanes"]) == (30_000, 2, 2)
    assert all(row[name] > 0 for name in ("start_s", "step_median_us", "first_batch_at_90%_ms"))
    coarse, fine = result["fetch_amplification"]
    assert (coarse["shards"], fine["shards"]) == (3, 30)
    assert 1 <= coarse["fetch_amplification"] <= coarse["fetch_amplification_of_shuffled_samples"] == 2
    assert fine["fetch_amplification"] < fine["fetch_amplification_of_shuffled_samples"]
    assert "30,000 samples on 2 ranks" in capsys.readouterr().out


def test_invalid_numbers_are_rejected() -> None:
    with pytest.raises(UserError, match="--samples is given 2 times and --ranks 1 times"):
        bench_plan.parse_arguments(["--samples", "10000", "--samples", "20000", "--ranks", "2"])
    with pytest.raises(UserError, match="--steps 2 or more"):
        bench_plan.parse_arguments(["--steps", "1"])

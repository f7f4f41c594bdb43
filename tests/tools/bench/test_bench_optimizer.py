"""The benchmark of optimizers measures both, and counts what ranks send."""

from __future__ import annotations

from pathlib import Path


def test_both_optimizers_are_measured_at_each_stage(config_file: Path, run_ranks) -> None:
    options = ["--files", "2", "--file-bytes", "40", "--stages", "1", "3", "--repeats", "1"]
    first, second = run_ranks(2, ["tools/bench/bench_optimizer.py", str(config_file), *options])
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    rows = [line.strip("│ ").split("│") for line in first.stdout.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["1", "3"]
    for row in rows:
        assert all(float(number.replace(",", "")) > 0 for number in row[1:4])
        assert float(row[-1].replace(",", "")) > 0
    assert not second.stdout

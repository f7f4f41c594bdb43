"""The curve over lengths is measured, in small."""

import itertools
import json
from pathlib import Path

import pytest

from tools.bench import bench_length


def test_rows_hold_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_child, jobs = bench_length.in_child, itertools.count()  # each child imports PyTorch, so one is enough
    monkeypatch.setattr(
        bench_length, "in_child", lambda job: bench_length.measure(job) if next(jobs) else in_child(job)
    )
    out = tmp_path / "length.json"
    arguments = ["--lengths", "1k,3000", "--repeats", "1", "--device", "cpu", "--precision", "fp32", "--json", str(out)]
    assert bench_length.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["length"], row["tokens"]) for row in rows] == [(1000, 63), (3000, 188)]
    assert all(row["answer_ms"] > 0 and row["step_ms"] > 0 for row in rows)
    assert next(jobs) == 4
    assert "3,000" in capsys.readouterr().out


@pytest.mark.parametrize("lengths", ["1x", "0", "", "5,,6"])
def test_invalid_lengths_are_rejected(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        bench_length.main(["--lengths", lengths])
    assert error.value.code == 2
    assert "--lengths" in capsys.readouterr().err

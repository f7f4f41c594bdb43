"""What metrics.jsonl holds after a resume (runs on real ranks: test_resume.py)."""

from __future__ import annotations

from pathlib import Path

from bfsys.supervision.metrics import _open_lines


def test_metrics_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = '{"kind": "train", "step": 1}\n{"kind": "eval", "step": 1}\n{"kind": "train", "step": 2}\n'
    path.write_text(kept + '{"kind": "train", "step": 3}\n{"ste')
    file, last_evaluation = _open_lines(path, 2)
    file.close()
    assert path.read_text() == kept
    assert last_evaluation == 1

"""The report of `bfsys fit` compares the model with baselines."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from bfsys.baselines import FIRST_BYTES, Table, byte_counts
from bfsys.fitting import report
from bfsys.fitting.report import LOGISTIC_CLASSES, logistic, note_on_baselines


def table_of(classes: int) -> Table:
    labels = np.arange(2 * classes) % classes
    counts = np.random.default_rng(0).random((len(labels), 256))
    return Table(np.ones_like(labels), counts, np.zeros((len(labels), FIRST_BYTES), np.int16), labels)


def test_a_logistic_regression_of_many_classes_is_left_out() -> None:
    """With 10,000 classes it would take hours, and gigabytes of memory."""
    few, many = table_of(3), table_of(LOGISTIC_CLASSES + 1)
    assert logistic(byte_counts, few, few) == 1.0
    assert str(logistic(byte_counts, many, many)).startswith("left out: ")


def test_a_logistic_regression_of_one_class_is_left_out() -> None:
    assert (
        logistic(byte_counts, table_of(1), table_of(3))
        == "left out: the training files that it would learn from have one class only"
    )


def test_the_report_tells_from_how_many_files_the_baselines_learned(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    assert "the baselines, except" not in "\n".join(report.report(run))
    monkeypatch.setattr(report, "BASELINE_FILES", 40)
    assert re.search(
        r"the baselines, except the largest class, learned from \d+ of \d+ training files",
        "\n".join(report.report(run)),
    )


def test_baselines_that_the_model_does_not_exceed_are_noted() -> None:
    """In float32 the model's accuracy is a little lower or higher than the same share in float64."""
    top1 = float(np.float32(0.95))
    baselines = {"from byte counts": "left out", "from file sizes": 0.5, "of the largest class": 0.95}
    (note,) = note_on_baselines(top1, baselines)
    assert note.startswith("note: top-1 of the largest class is not lower than that of the model, so ")
    assert not note_on_baselines(0.96, baselines)


def test_the_report_notes_baselines(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    monkeypatch.setattr(report, "nearest_size", lambda *_: 1.0)
    said = "\n".join(report.report(run))
    assert re.search(r"top-1 from file sizes +100\.00 %\n", said)
    assert re.search(r"note: top-1 .*from file sizes is not lower than that of the model", said)

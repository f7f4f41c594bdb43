"""The report of `bfsys fit` compares the model with baselines."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from bfsys.baselines import FIRST_BYTES, Table, byte_counts
from bfsys.fitting import report
from bfsys.fitting.report import LOGISTIC_CLASSES, logistic


def table_of(classes: int) -> Table:
    labels = np.arange(2 * classes) % classes
    counts = np.random.default_rng(0).random((len(labels), 256))
    return Table(np.ones_like(labels), counts, np.zeros((len(labels), FIRST_BYTES), np.int16), labels)


def test_a_logistic_regression_of_many_classes_is_left_out() -> None:
    """With 10,000 classes it would take hours, and gigabytes of memory."""
    few, many = table_of(3), table_of(LOGISTIC_CLASSES + 1)
    assert re.fullmatch(r" +\d+\.\d\d %   \(logistic regression\)", logistic(byte_counts, few, few))
    assert logistic(byte_counts, many, many).startswith("left out: ")


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

"""Accuracy by class and the confusion matrix."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bfsys.batch import ByteBatch, Sample
from bfsys.confusion import WORST_FILES, Answers, Report
from bfsys.errors import UserError


def answered(folder: Path, pairs: list[tuple[int, int]], classes: int = 4) -> list[str]:
    """Write the report for files of (class, answer), and return its lines."""
    report, answers = Report([f"c{i}" for i in range(classes)], folder), Answers(classes)
    for half in (pairs[::2], pairs[1::2]):
        labels = torch.tensor([label for label, _ in half])
        logits = torch.nn.functional.one_hot(torch.tensor([answer for _, answer in half]), classes).float()
        answers.add(batch_of(labels), logits)
    return report.write(answers)


def batch_of(labels: torch.Tensor) -> ByteBatch:
    return ByteBatch.from_samples([Sample("", np.zeros(1, np.uint8), int(label)) for label in labels])


def test_totals_of_a_rank_without_files_can_be_added_to_those_of_others() -> None:
    answers = Answers(4)
    assert answers.totals().tolist() == [[0.0] * 4] * 2
    empty = answers.totals().dtype
    answers.add(batch_of(torch.tensor([1, 1])), torch.eye(4)[[1, 2]])
    assert answers.totals().tolist() == [[0, 2, 0, 0], [0, 1, 0, 0]]
    assert answers.totals().dtype == empty == np.float64


PAIRS = [(0, 0)] * 3 + [(0, 1)] + [(1, 0)] * 2 + [(1, 3)] * 3 + [(1, 1)] * 5 + [(3, 3)] * 2


def test_files_and_summary(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    said = answered(folder, PAIRS)
    assert (folder / "classes.tsv").read_text().splitlines() == [
        "class\tfiles\ttop1\tmost often taken for\tfiles taken so",
        "c0\t4\t0.7500\tc1\t1",
        "c1\t10\t0.5000\tc3\t3",
        "c3\t2\t1.0000\t\t0",
    ]
    assert (folder / "confusion.tsv").read_text().splitlines() == [
        "class\tanswer\tfiles", "c0\tc0\t3", "c0\tc1\t1", "c1\tc0\t2", "c1\tc1\t5", "c1\tc3\t3", "c3\tc3\t2",
    ]  # fmt: skip
    assert said[:3] == [
        "lowest top-1 of a class: c1 50.0 % of 10 files",
        "  c1 taken for c3: 3 of 10 files",
        "  c1 taken for c0: 2 of 10 files",
    ]
    with Image.open(folder / "confusion.png") as image:
        assert min(image.size) > 300


def test_names_are_not_taken_for_formulas(tmp_path: Path) -> None:
    answers = Answers(2)
    answers.add(batch_of(torch.tensor([0, 1])), torch.eye(2))
    assert f"picture: {tmp_path}/confusion.png" in Report(["$5_$10", "x^$y_$"], tmp_path).write(answers)[-1]


def test_class_names_of_any_length_and_script_are_drawn_without_warnings(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    answers = Answers(2)
    answers.add(batch_of(torch.tensor([0, 1])), torch.eye(2))
    said = Report(["x" * 200, "y" * 200], tmp_path / "long").write(answers)
    assert said[-1].endswith(f"picture: {tmp_path}/long/confusion.png")
    assert "x" * 200 in (tmp_path / "long" / "classes.tsv").read_text()
    for names in (["猫" * 40, "dog"], ["🐕", "🐈"]):
        said = Report(names, tmp_path / names[1]).write(answers)
        assert said[-1].endswith("confusion.png (its font lacks letters of some names; the tables have them)")
    assert not recwarn.list


def test_classes_without_files_are_named(tmp_path: Path) -> None:
    assert answered(tmp_path, PAIRS)[-2] == "1 class has no file here and is not in the score: c2"
    few = answered(tmp_path, [(0, 0), (1, 1)], 9)
    assert few[-2] == "7 classes have no file here and are not in the score: c2, c3, c4, c5, c6, …"
    assert not any("no file here" in line for line in answered(tmp_path, [(0, 0), (1, 1)], 2))


def test_many_classes_need_no_matrix(tmp_path: Path) -> None:
    pairs = [(i, (i * 7) % 3000) for i in range(0, 3000)]
    assert "no picture of more than 2,000 classes" in answered(tmp_path, pairs, 3000)[-1]
    assert len((tmp_path / "confusion.tsv").read_text().splitlines()) == len(pairs) + 1


def test_the_files_that_were_judged_worst() -> None:
    answers, rng = Answers(3), torch.Generator().manual_seed(0)
    logits = torch.randn(40, 3, generator=rng)
    labels = torch.randint(0, 3, (40,), generator=rng)
    for part in (slice(0, 25), slice(25, 40)):
        batch = replace(batch_of(labels[part]), samples=torch.arange(40)[part])
        answers.add(batch, logits[part])
    own = logits.softmax(1)[torch.arange(40), labels]
    assert [file.sample for file in answers.worst] == own.argsort()[:WORST_FILES].tolist()
    assert answers.worst[0].probability == pytest.approx(float(own.min()))
    gathered = answers.over_ranks()
    assert gathered.worst == answers.worst
    assert all((a == b).all() for a, b in zip(gathered.counts(), answers.counts(), strict=True))


def test_without_matplotlib_the_tables_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in answered(tmp_path, PAIRS)[-1]
    assert (tmp_path / "classes.tsv").exists()
    assert not (tmp_path / "confusion.png").exists()


def test_a_report_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--report .*file/report: cannot be made: Not a directory"):
        Report(["a"], tmp_path / "file" / "report")

"""The accuracy of each class and the confusion matrix of a model.

    FOLDER/classes.tsv     class, files, top-1, the most frequent wrong answer
    FOLDER/confusion.tsv   class, answer, files; only pairs that occur
    FOLDER/confusion.png   share of each class's files (rows) that got each answer (columns)

Pairs are counted by sorting, so that 20,000 classes need no matrix of 400 million numbers. The picture shows as many
classes as can be distinguished on it.
"""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from bfsys.batch import ByteBatch
from bfsys.dist import gather_to_rank0
from bfsys.errors import os_errors_as, some
from bfsys.files import replace_file, replacing

MOST_CLASSES_DRAWN = 2000
MOST_CLASSES_NAMED = 60  # up to this number, rows and columns are labelled
MOST_CLASSES_COUNTED = 30  # up to this number, each cell shows its number of files
LONGEST_LABEL = 30  # characters of a class on the picture; longer names are cut in the middle
CHARACTER_INCHES = 0.09  # mean width of a character of a label
WORST_PAIRS = 5
WORST_FILES = 10


class Judged(NamedTuple):
    """A file, and the model's answer."""

    probability: float  # the probability of the file's own class
    label: int
    answer: int
    source: int  # position among the run's sources
    sample: int  # position in its source's split


class Answers:
    """The answers of an evaluation: the count of each pair of class and answer, and the worst files."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.worst: list[Judged] = []
        """The WORST_FILES files with the lowest probability of their own class, the lowest first."""
        self._pairs: list[np.ndarray] = [np.zeros(0, np.int64)]  # [files], class · number of classes + answer

    def add(self, batch: ByteBatch, logits: Tensor) -> None:
        """Add the answers of a batch: logits [B, classes]."""
        labels, answers = batch.labels.cpu(), logits.argmax(1).cpu()
        self._pairs.append((labels * self.num_classes + answers).numpy())
        own = logits.float().log_softmax(1).gather(1, batch.labels[:, None])[:, 0].exp().cpu()
        lowest = own.argsort()[:WORST_FILES]
        rows = (own[lowest], labels[lowest], answers[lowest], batch.sources.cpu()[lowest], batch.samples[lowest])
        found = [Judged(*row) for row in zip(*(values.tolist() for values in rows), strict=True)]
        self.worst = sorted([*self.worst, *found])[:WORST_FILES]

    def counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 [pairs] each: class, answer and number of files of the pairs that occur."""
        values, counts = np.unique(np.concatenate(self._pairs), return_counts=True)
        labels, answers = np.divmod(values, self.num_classes)
        return labels, answers, counts

    def totals(self) -> np.ndarray:
        """float64 [2, classes]: the number of files of each class, and of those that were classified correctly."""
        labels, answers, counts = self.counts()
        right = np.where(labels == answers, counts, 0)
        of_classes = [np.bincount(labels, weights, minlength=self.num_classes) for weights in (counts, right)]
        return np.stack(of_classes).astype(np.float64)  # without answers, bincount gives integers

    def over_ranks(self) -> Answers:
        """The answers of all ranks on rank 0; empty on the other ranks; collective."""
        gathered = Answers(self.num_classes)
        for labels, answers, counts, worst in gather_to_rank0((*self.counts(), self.worst)):
            gathered._pairs.append(np.repeat(labels * self.num_classes + answers, counts))
            gathered.worst += worst
        gathered.worst = sorted(gathered.worst)[:WORST_FILES]
        return gathered


class Report:
    """Writes files on the answers of an evaluation."""

    def __init__(self, classes: Sequence[str], folder: Path) -> None:
        self.classes, self.folder = tuple(classes), folder
        with os_errors_as(f"--report {folder}: cannot be made"):
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, all_answers: Answers) -> list[str]:
        """Write the files. Returns lines that summarise them."""
        labels, answers, counts = all_answers.counts()
        files, right = all_answers.totals().astype(np.int64)
        mistakes = sorted(
            (-int(count), int(label), int(answer))
            for label, answer, count in zip(labels, answers, counts, strict=True)
            if label != answer
        )
        worst: dict[int, tuple[int, int]] = {}  # class → most frequent wrong answer, its count
        for minus_count, label, answer in mistakes:
            worst.setdefault(label, (answer, -minus_count))
        with os_errors_as(f"--report {self.folder}: cannot be written"):
            self._write_classes(files, right, worst)
            pairs = zip(labels, answers, counts, strict=True)
            rows = ((self.classes[label], self.classes[answer], count) for label, answer, count in pairs)
            _write_table(self.folder / "confusion.tsv", ("class", "answer", "files"), rows)
            note = self._draw(labels, answers, counts, files)
        seen, unseen = np.flatnonzero(files), np.flatnonzero(files == 0)
        lowest = min(seen, key=lambda c: right[c] / files[c])
        return [
            f"lowest top-1 of a class: {self.classes[lowest]} {100 * right[lowest] / files[lowest]:.1f} % "
            f"of {files[lowest]} files",
            *(
                f"  {self.classes[label]} taken for {self.classes[answer]}: {-minus_count} of {files[label]} files"
                for minus_count, label, answer in mistakes[:WORST_PAIRS]
            ),
            *_note_on_unseen([self.classes[number] for number in unseen]),
            f"by class: {self.folder}/classes.tsv   by pair: {self.folder}/confusion.tsv   {note}",
        ]

    def _write_classes(self, files: np.ndarray, right: np.ndarray, worst: dict[int, tuple[int, int]]) -> None:
        rows = []
        for number in np.flatnonzero(files):
            answer, count = worst.get(int(number), (None, 0))
            taken_for = "" if answer is None else self.classes[answer]
            rows.append((self.classes[number], files[number], f"{right[number] / files[number]:.4f}", taken_for, count))
        columns = ("class", "files", "top1", "most often taken for", "files taken so")
        _write_table(self.folder / "classes.tsv", columns, rows)

    def _draw(self, labels: np.ndarray, answers: np.ndarray, counts: np.ndarray, files: np.ndarray) -> str:
        """Draw the matrix of the classes that occur. Returns a note with its path or with the reason for none."""
        try:
            from matplotlib.figure import Figure  # not pyplot, which would look for a display
        except ImportError:
            return "(no picture: pip install matplotlib)"
        shown = np.union1d(np.flatnonzero(files), answers)
        if len(shown) > MOST_CLASSES_DRAWN:
            return f"(no picture of more than {MOST_CLASSES_DRAWN:,} classes)"
        matrix = np.zeros((len(shown), len(shown)))
        matrix[np.searchsorted(shown, labels), np.searchsorted(shown, answers)] = counts
        share = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
        names = [_label(self.classes[number]) for number in shown] if len(shown) <= MOST_CLASSES_NAMED else []
        side = min(16.0, 4 + 0.3 * len(shown))
        margin = CHARACTER_INCHES * max(map(len, names), default=0)
        figure = Figure((side + margin + 1, side + margin), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        figure.colorbar(image, label="share of the class's files")
        axes.set(xlabel="answer", ylabel="class")
        if names:
            # No parse_math, since a class may have a name such as $5_$10
            axes.set_xticks(range(len(shown)), names, rotation=90, parse_math=False)
            axes.set_yticks(range(len(shown)), names, parse_math=False)
        if len(shown) <= MOST_CLASSES_COUNTED:
            for row, column in np.argwhere(matrix):
                colour = "white" if share[row, column] > 0.5 else "black"
                count = f"{matrix[row, column]:.0f}"
                axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=7)
        path = self.folder / "confusion.png"
        dpi = 120 if names else math.ceil(len(shown) / side)
        with replacing(path, durable=False) as file, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")  # also those that were given before
            figure.savefig(file, format="png", dpi=dpi)
        lacks_letters = any("missing from" in str(warning.message) for warning in warned)
        return f"picture: {path}" + lacks_letters * " (its font lacks letters of some names; the tables have them)"


def _label(name: str) -> str:
    """The name of a class for the picture. The middle of a long name is left out, since many names begin alike."""
    if len(name) <= LONGEST_LABEL:
        return name
    return f"{name[: LONGEST_LABEL // 2]}…{name[1 - LONGEST_LABEL // 2 :]}"


def _note_on_unseen(names: list[str]) -> list[str]:
    """A line on classes of which no file was evaluated, if there are any."""
    if not names:
        return []
    subject, verb = ("1 class has", "is") if len(names) == 1 else (f"{len(names):,} classes have", "are")
    return [f"{subject} no file here and {verb} not in the score: {some(names)}"]


def _write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    table = io.StringIO(newline="")
    writer = csv.writer(table, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    replace_file(path, table.getvalue(), durable=False)

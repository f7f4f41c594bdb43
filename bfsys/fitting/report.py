"""The report at the end of `bfsys fit`: the model's accuracy beside those of simple baselines, tables and plots."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bfsys.baselines import FIRST_BYTES, Table, byte_counts, first_bytes, largest_class, nearest_size, tables_of
from bfsys.checkpoint.loading import load_model
from bfsys.confusion import Answers, Report
from bfsys.curves import draw, read
from bfsys.data.streaming.copies import notes_on_copies
from bfsys.data.streaming.datasets import open_evaluation, open_training
from bfsys.data.streaming.quarantine import Quarantine
from bfsys.errors import one_line
from bfsys.evaluate import evaluate
from bfsys.ranks import Ranks

BASELINE_FILES = 20_000  # training files of the baselines, which would else take longer than the training
LOGISTIC_CLASSES = 200  # the time and memory of logistic regression grow with the number of classes


def report(run_dir: Path) -> list[str]:
    """Evaluate the averaged weights, compare with baselines and draw the plots. Returns lines to print."""
    model, config, manifest = load_model(run_dir, average=True)
    ranks, folder = Ranks(), run_dir / "report"
    training = open_training(config)
    sources = open_evaluation(config, config.data.eval_split, manifest["classes"])
    confusion, answers = Report(sources.classes, folder), Answers(len(sources.classes))
    bad_files = Quarantine()
    result = evaluate(model.to(ranks.device), config, sources, ranks, bad_files, manifest["step"], answers=answers)
    for bad in bad_files.share(ranks, sources.sizes, config.data.max_bad_share):
        print(f"left out: {one_line(bad.describe())}", file=sys.stderr)
    train, held_out = tables_of(config, training, sources, BASELINE_FILES)
    files = sum(len(split) for split in training.splits)
    problems: list[str] = []
    baselines = {
        "from byte counts": logistic(byte_counts, train, held_out),
        f"from first {FIRST_BYTES} bytes": logistic(first_bytes, train, held_out),
        "from file sizes": nearest_size(train, held_out),
        "of the largest class": largest_class(training, held_out),
    }
    lines = [
        f"held-out files ({config.data.eval_split})      {result['samples']:>8,}",
        f"top-1 of this model         {100 * result['top1']:8.2f} %",
        *(f"top-1 {name:<20}  {shown(accuracy)}" for name, accuracy in baselines.items()),
        *note_on_baselines(result["top1"], baselines),
    ]
    if len(train.labels) < files:
        lines.append(
            f"the baselines, except the largest class, learned from {len(train.labels):,} of {files:,} training files"
        )
    lines += [f"note: {note}" for note in notes_on_copies(training, sources, config.data.eval_split)]
    lines += confusion.write(answers)
    draw({run_dir: read(run_dir, "top1", problems)}, "top1", folder / "learning_curve.png")
    return [*lines, f"learning curve: {folder / 'learning_curve.png'}"]


def logistic(baseline: Callable[[Table, Table], float], train: Table, held_out: Table) -> float | str:
    """The accuracy of a baseline that is a logistic regression, or why it is left out."""
    classes = len(np.unique(train.labels))
    if classes > LOGISTIC_CLASSES:
        return f"left out: logistic regression takes long with more than {LOGISTIC_CLASSES} classes"
    if classes == 1:
        return "left out: the training files that it would learn from have one class only"
    return baseline(train, held_out)


def shown(accuracy: float | str) -> str:
    return accuracy if isinstance(accuracy, str) else f"{100 * accuracy:8.2f} %"


def note_on_baselines(top1: float, baselines: dict[str, float | str]) -> list[str]:
    """A line on the baselines whose accuracy the model does not exceed, if there are any."""
    # Rounded, since the two are computed in different ways
    reached = [
        name for name, accuracy in baselines.items() if not isinstance(accuracy, str) and accuracy >= round(top1, 6)
    ]
    if not reached:
        return []
    return [
        f"note: top-1 {' and '.join(reached)} is not lower than that of the model, so the score does not show that the "
        "model learned more"
    ]

"""Which checkpoints of a run are kept: the newest, every so many steps, and the best by the scores of evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bfsys.checkpoint.files import METRICS, step_of, with_retries
from bfsys.files import open_regular
from bfsys.json_lines import NUMBER, Fields, parse_json_lines


@dataclass(frozen=True)
class RetentionPolicy:
    """The checkpoints to keep: see `steps_to_keep`."""

    last: int
    every: int = 0
    best: int = 0
    metric: str = "top1"


def steps_to_keep(steps: Sequence[int], keep: RetentionPolicy, scores: Mapping[int, Mapping[str, float]]) -> set[int]:
    """The steps of the intact checkpoints to keep: the `last` newest, the multiples of `every`, and the `best` by the
    scores of their evaluations. Of equal scores, the newer one is kept."""
    kept = set(sorted(steps)[-keep.last :])
    if keep.every:
        kept |= {step for step in steps if step and step % keep.every == 0}
    if keep.best:
        sign = -1 if keep.metric == "loss" else 1
        scored = [(sign * scores[step][keep.metric], step) for step in steps if step in scores]
        scored.sort(key=lambda each: (True, *each) if not math.isnan(each[0]) else (False, 0.0, each[1]))  # NaN first
        kept |= {step for _, step in scored[-keep.best :]}
    return kept


def to_prune(run_dir: Path, paths: Sequence[Path], keep: RetentionPolicy) -> list[Path]:
    """The checkpoints of a run that `keep` does not keep."""
    scores = comparable(evaluations(run_dir)) if keep.best else {}
    kept = steps_to_keep([step_of(path) for path in paths], keep, scores)
    return [path for path in paths if step_of(path) not in kept]


def evaluations(run_dir: Path) -> dict[int, dict]:
    """The scores of every evaluation in metrics.jsonl, by step.

    Raises Unreachable or OSError if the file cannot be read: without scores, the best checkpoints would be removed.
    """
    try:
        return with_retries(_read_evaluations, run_dir / METRICS)
    except FileNotFoundError:
        return {}


def _read_evaluations(metrics: Path) -> dict[int, dict]:
    with open_regular(metrics) as lines:
        return evaluations_in(lines)


def evaluations_in(lines: Iterable[bytes]) -> dict[int, dict]:
    """The scores of every evaluation, by step, in the lines of a metrics.jsonl."""
    of_evaluations = (line for line in lines if b'"kind": "eval"' in line)
    fields: Fields = {"step": int, "top1": NUMBER, "loss": NUMBER}
    return {scores["step"]: scores for scores in parse_json_lines(of_evaluations, fields)}


def comparable(scores: dict[int, dict]) -> dict[int, dict]:
    """The scores, by step, on the files of the latest evaluation. Earlier versions did not record the files."""
    latest = scores[max(scores)].get("evaluated") if scores else None
    return {step: each for step, each in scores.items() if each.get("evaluated", latest) == latest}

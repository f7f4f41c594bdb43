"""A comparison of runs: the settings that differ, and the scores.

Runs whose configs differ only in their seed, or in keys that have no influence on results, are repetitions. They form
one row, with means and standard deviations. A run without an evaluation after its last step has its own row, because
the mean of a half-trained and a trained model means nothing.

The comparison reads only config.yaml, metrics.jsonl and the manifest of a checkpoint, so it needs neither PyTorch nor
the data.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bfsys import typed_yaml
from bfsys.checkpoint.files import CONTENT_HEAD, METRICS, all_checkpoints, newest_manifest, problem_of_place, step_of
from bfsys.checkpoint.retention import evaluations
from bfsys.config import Config, load_config
from bfsys.errors import UserError, collecting, one_line
from bfsys.files import exists, is_dir, is_file, open_regular
from bfsys.json_lines import NUMBER, read_json_lines_backwards
from bfsys.locations import without_secrets

CONFIG = "config.yaml"
WITHOUT_INFLUENCE = frozenset((
    "name", "runs_dir", "recipe",
    "data.eval_batch_bytes", "data.max_bad_share", "data.workers", "data.cache_dir", "data.fetch_tries",
    "data.cache_gb",
    "train.log_every", "train.eval_every", "train.save_every", "train.keep_checkpoints", "train.keep_every",
    "train.keep_best", "train.best_metric", "train.checkpoint_copy",
    "train.hang_timeout_s", "train.collective_timeout_s",
))  # fmt: skip
SEED, STEPS = "train.seed", "train.steps"
DATA = ("data.sources", "data.train_split", "data.eval_split")  # beginnings of the keys that select files
TRAINING = ("productive", "stall", "data_wait")  # causes in the ledger, without restarts and lost steps


@dataclass(frozen=True)
class Run:
    """The content of a run directory."""

    path: Path
    settings: dict[str, Any]
    """All config keys that influence results, without the seed, by their dotted names."""
    seed: int
    step: int
    """Number of steps so far."""
    scores: dict | None
    """The latest evaluation: step, loss, top1, and in `sources` the scores of each source."""
    minutes: float | None
    """Training time, including waits for data and saves, without restarts and the steps that they repeat."""
    parameters: int | None
    """The number of parameters; None before the first checkpoint."""
    training_data: str | None
    """What the newest checkpoint records of the training files; None before the first checkpoint."""

    @property
    def evaluation_data(self) -> str | None:
        """The number of files of each source in the latest evaluation."""
        sources = self.scores["sources"] if self.scores else {}
        return json.dumps({name: part.get("samples") for name, part in sources.items()}) if sources else None

    @property
    def steps(self) -> int:
        return self.settings[STEPS]

    @property
    def is_finished(self) -> bool:
        return self.scores is not None and self.scores["step"] >= self.steps


@dataclass(frozen=True)
class Row:
    """The finished repetitions of one config, or one unfinished run."""

    settings: dict[str, Any]
    """The keys that differ between rows. A key that the run lacks, such as one of a second source, is absent."""
    runs: list[Run]

    def values(self, score: str, source: str | None = None) -> list[float]:
        """This score of each run that has it."""
        parts = [run.scores["sources"].get(source, {}) if source else run.scores for run in self.runs if run.scores]
        return [part[score] for part in parts if score in part]


def influential_settings(config: Config) -> dict[str, Any]:
    """All keys that influence results, including the seed, by their dotted names."""
    settings = typed_yaml.flatten(typed_yaml.to_tree(config))
    return {key: value for key, value in settings.items() if key not in WITHOUT_INFLUENCE}


def find_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs in run directories and in folders of run directories, and problems of unreadable runs in folders.

    Raises UserError if a path contains no run, if a run directory in `paths` cannot be read, or if no run was evaluated
    yet.
    """
    problems: list[str] = []
    unreadable: list[str] = []
    runs: dict[Path, Run] = {}
    for path in paths:
        is_run = is_file(path / CONFIG)
        found = [path] if is_run else _runs_in(path)
        if not found and (problem := problem_of_place(path)):
            problems.append(problem)
        elif not found:
            known = "not a run, and no folder of runs" if exists(path) else "no such directory"
            if exists(path / METRICS):
                known = f"a run without its {CONFIG}, which its next start writes"
            problems.append(f"{path}: {known}; give run directories (runs/NAME) or a folder of them (runs)")
        for run_dir in found:
            with collecting(problems if is_run else unreadable):
                try:
                    runs.setdefault(run_dir.resolve(), read_run(run_dir))
                except OSError as error:
                    raise UserError(f"{error.filename or run_dir}: {error.strerror}") from None
    if not any(run.scores for run in runs.values()):
        problems += unreadable
        problems += [f"{run.path}: no evaluation yet, after {run.step} of {run.steps} steps" for run in runs.values()]
    if problems:
        raise UserError(*problems)
    return list(runs.values()), unreadable


def _runs_in(folder: Path) -> list[Path]:
    """The folders in a folder that have a config, or that cannot be read."""

    def may_be_run(path: Path) -> bool:
        try:
            return exists(path / CONFIG)
        except OSError:
            return True

    return sorted(path for path in folder.iterdir() if may_be_run(path)) if is_dir(folder) else []


def read_run(run_dir: Path) -> Run:
    """Read a run from its directory. Raises UserError if its config cannot be read."""
    open_regular(run_dir / CONFIG).close()
    settings = influential_settings(load_config(run_dir / CONFIG))
    seed = settings.pop(SEED)
    scores = evaluations(run_dir)
    newest = {"sources": {}, **scores[max(scores)]} if scores else None
    trained = last_train_line(run_dir / METRICS)
    checkpoints = all_checkpoints(run_dir)
    manifest = newest_manifest(checkpoints)
    seconds = [float(trained["seconds"].get(cause, 0)) for cause in TRAINING] if trained else []
    return Run(
        path=run_dir,
        settings=settings,
        seed=seed,
        step=max([0, *(line["step"] for line in (trained, newest) if line), *map(step_of, checkpoints[-1:])]),
        scores=newest,
        minutes=sum(seconds) / 60 if seconds else None,
        parameters=_parameters(manifest) if manifest else None,
        training_data=_training_data(manifest) if manifest else None,
    )


def last_train_line(path: Path) -> dict | None:
    """The last line about steps in a metrics.jsonl; None if there is none."""
    found = read_json_lines_backwards(path, {"kind": str, "step": int, "seconds": dict})
    of_steps = (line for line in found if line["kind"] == "train")
    return next((line for line in of_steps if all(isinstance(s, NUMBER) for s in line["seconds"].values())), None)


def _parameters(manifest: dict) -> int:
    return sum(math.prod(s) for name, s in manifest["shapes"].items() if not name.startswith(CONTENT_HEAD))


def _training_data(manifest: dict) -> str | None:
    sources = {name: fact for name, fact in (manifest["plan"] or {}).items() if name.startswith("source ")}
    return json.dumps(sources, sort_keys=True) if sources else None


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """The rows of a table, sorted by top-1, the best first. Unfinished runs come last."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    differing = [key for key in keys if key != STEPS and len({_text_of(run, key) for run in runs}) > 1]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        same = "" if run.is_finished else str(run.path)
        groups.setdefault(json.dumps([same, run.settings], sort_keys=True), []).append(run)
    rows = [
        Row({key: without_secrets(group[0].settings[key]) for key in differing if key in group[0].settings}, group)
        for group in groups.values()
    ]
    return sorted(rows, key=lambda row: (not row.runs[0].is_finished, -statistics.mean(row.values("top1") or [0.0])))


def _text_of(run: Run, key: str) -> str:
    return json.dumps(run.settings[key]) if key in run.settings else ""


def table(rows: Sequence[Row]) -> str:
    """The rows as plain text, one line each, with notes below."""
    runs = [run for row in rows for run in row.runs]
    sources = dict.fromkeys(name for run in runs if run.scores for name in run.scores["sources"])
    several = any(len(run.scores["sources"]) > 1 for run in runs if run.scores)
    columns = _short_names(list(dict.fromkeys(key for row in rows for key in row.settings)))
    head = [*columns.values(), "seeds", "top-1 %", *(f"top-1 % {name}" for name in sources if several), "loss", "steps",
            "min", "parameters", "run"]  # fmt: skip
    lines = [head]
    for row in rows:
        first = row.runs[0]
        minutes = [run.minutes for run in row.runs if run.minutes is not None]
        lines.append([
            *(_value(row.settings[key]) if key in row.settings else "-" for key in columns),
            str(len(row.runs)),
            _mean(row.values("top1"), 100, 2),
            *(_mean(row.values("top1", name), 100, 2) for name in sources if several),
            _mean(row.values("loss"), 1, 3),
            f"{first.steps}" if first.is_finished else f"{first.step} of {first.steps}",
            f"{statistics.mean(minutes):.1f}" if minutes else "-",
            f"{first.parameters:,}" if first.parameters else "-",
            _common_name(row.runs),
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join([*(f"{cell:>{width}}" for cell, width in zip(line[:-1], widths, strict=False)), line[-1]])
        for line in lines
    ]
    return "\n".join([*shown, *_notes(rows)])


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    runs = [run for row in rows for run in row.runs]
    if unfinished := sum(not run.is_finished for run in runs):
        which = f"not evaluated after the last step: {unfinished} of {len(runs)} runs"
        yield f"{which}. Each has its own row with its latest evaluation"
    for row in rows:
        seeds: dict[int, list[str]] = {}
        for run in row.runs:
            seeds.setdefault(run.seed, []).append(one_line(str(run.path)))
        yield from (
            f"note: {' = '.join(same)}: the same settings and the same seed" for same in seeds.values() if len(same) > 1
        )
    yield from _notes_on_data(runs)


def _notes_on_data(runs: Sequence[Run]) -> Iterator[str]:
    """Notes on runs with equal data settings and different data, such as before and after packing a dataset again."""
    alike: dict[tuple[str, str], dict[str, list[str]]] = {}  # (what was done, data settings) → data → runs
    # Earlier versions did not record which files they evaluated.
    is_recorded = all("evaluated" in run.scores for run in runs if run.scores)
    for run in runs:
        settings = json.dumps({key: value for key, value in run.settings.items() if key.startswith(DATA)})
        evaluated = run.scores.get("evaluated") if run.scores and is_recorded else run.evaluation_data
        for what, data in (("trained", run.training_data), ("evaluated", evaluated)):
            if data:
                alike.setdefault((what, settings), {}).setdefault(data, []).append(one_line(str(run.path)))
    for (what, _), groups in alike.items():
        if len(groups) > 1:
            named = [
                f"{first} and {len(others)} other{'s' * (len(others) > 1)}" if others else first
                for first, *others in groups.values()
            ]
            yield (
                f"note: {' / '.join(named)}: they were {what} on different files, although their data settings are "
                "equal, so their scores cannot be compared"
            )


def _short_names(keys: list[str]) -> dict[str, str]:
    """The last part of each dotted key, or the whole key if several keys have the same last part."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _mean(values: Sequence[float], scale: float, digits: int) -> str:
    """The mean ± sample standard deviation."""
    if not values:
        return "-"
    mean = math.fsum(values) / len(values)  # statistics.stdev raises AttributeError on NaN
    text = f"{scale * mean:.{digits}f}"
    if len(values) == 1:
        return text
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return f"{text} ± {scale * math.sqrt(variance):.{digits}f}"


def _common_name(runs: Sequence[Run]) -> str:
    """The path of a run, or a pattern that its repetitions match."""
    paths = [one_line(str(run.path)) for run in runs]
    return paths[0] if len(paths) == 1 else f"{os.path.commonprefix(paths)}*"  # noqa: RUF071 (also a part of a name)

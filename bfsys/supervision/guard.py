"""Bad steps: their definition, how they are handled, and the roll-back of a run.

A step is bad if its loss or gradient is non-finite. All ranks then skip its update (engine.py). A step is also bad if
its loss spikes: the robust z-score of the logarithm of the loss, computed with the median and the median absolute
deviation of the last good losses, is above a limit. A single bad step is recorded with its samples. After
`max_bad_steps` in a row, the run rolls back to the last checkpoint before the first of them, and skips these steps. If
that happens more than MAX_ROLLBACKS times from the same weights, the run ends.

    rollbacks.json in the run directory: from where to where, which steps are skipped, why, and their samples

The data of a skipped step are drawn and dropped, so all other steps keep their data. The file is written after the
checkpoints of bad steps are removed: a run that is killed in between repeats these steps and judges them again.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from bfsys import dist
from bfsys.checkpoint.files import (
    all_checkpoints,
    checkpoints_dir,
    newest_manifest,
    point_to_newest,
    remove,
    step_of,
)
from bfsys.checkpoint.rollbacks import FILE
from bfsys.config import Train
from bfsys.data.streaming.datasets import Sources
from bfsys.errors import EXIT_DIVERGED, UserError
from bfsys.files import replace_file

MAX_ROLLBACKS = 3
WINDOW_STEPS = 128  # number of good losses that a loss is compared with
LEAST_STEPS = 32  # with fewer good losses, spikes are not detected
# Lower bound of the deviation of the log-loss: at the default z-score of 10, a spike at least doubles the loss.
LEAST_DEVIATION = 0.07


class Guard:
    """Judges every step. All ranks get the same verdict, because they use the same agreed numbers."""

    def __init__(self, train: Train, rollbacks: list[dict]) -> None:
        self.max_bad_steps, self.spike_zscore = train.max_bad_steps, train.spike_zscore
        self.skipped_steps = {step for rollback in rollbacks for step in rollback["steps"]}
        self.bad_in_a_row: list[dict] = []
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)

    def state_dict(self) -> dict:
        return {"losses": list(self._losses), "in_a_row": list(self.bad_in_a_row)}

    def load_state_dict(self, state: dict, *, is_same_loss: bool = True) -> None:
        """Load a checkpoint's state. Its losses are not comparable unless the run still has the same loss function."""
        self.bad_in_a_row = list(state["in_a_row"])
        self._losses = deque(state["losses"] if is_same_loss else [], WINDOW_STEPS)

    def judge(self, loss: float, grad_norm: float) -> str:
        """Return the problem of a step with this mean loss and gradient norm, or "" for a good step."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return f"loss {loss:g}, norm of the gradient {grad_norm:g}"
        score = self._zscore(loss)
        if self.spike_zscore and score > self.spike_zscore:
            return f"loss {loss:g}, a spike: z-score {score:.1f}"
        self._losses.append(loss)
        return ""

    def record(self, step: int, problem: str, samples: list[str]) -> None:
        """Record a bad step. A good step, whose `problem` is empty, clears the record."""
        if problem:
            self.bad_in_a_row.append({"step": step, "problem": problem, "samples": samples})
        else:
            self.bad_in_a_row.clear()

    @property
    def wants_rollback(self) -> bool:
        return len(self.bad_in_a_row) >= self.max_bad_steps

    def _zscore(self, loss: float) -> float:
        if len(self._losses) < LEAST_STEPS:
            return 0.0
        logs = [math.log(max(x, 1e-12)) for x in self._losses]
        median = statistics.median(logs)
        deviation = 1.4826 * statistics.median(abs(x - median) for x in logs)  # normal distribution
        return (math.log(max(loss, 1e-12)) - median) / max(deviation, LEAST_DEVIATION)


def return_to_good_checkpoint(run_dir: Path, rollbacks: list[dict], bad: list[dict]) -> str:
    """Make the last checkpoint before the bad steps the newest, and record that they are skipped. Only rank 0 calls it.
    Returns what was done. Raises UserError after MAX_ROLLBACKS roll-backs to the same weights."""
    paths = all_checkpoints(run_dir)
    good = [path for path in paths if step_of(path) < bad[0]["step"]]
    manifest = newest_manifest(good)  # a resume skips damaged ones, too
    if manifest is None:
        raise UserError(f"{run_dir}: no checkpoint is from before the bad steps", exit_code=EXIT_DIVERGED)
    to, updates = manifest["step"], manifest["updates"]
    steps = [b["step"] for b in bad]
    if sum(rollback["updates"] == updates for rollback in rollbacks) >= MAX_ROLLBACKS:
        raise UserError(
            f"bad steps again after {MAX_ROLLBACKS} roll-backs to step {to}: {steps}: {bad[-1]['problem']}. Try a "
            f"lower optim.lr, or optim.clip_norm=1; or, if these losses are expected, a larger "
            f"train.spike_zscore or train.max_bad_steps. Their samples are in {run_dir / FILE}",
            *(f"sample of step {steps[-1]}: {name}" for name in bad[-1]["samples"]),
            exit_code=EXIT_DIVERGED,
        )
    for path in reversed(paths[len(good) :]):
        remove(path)
    point_to_newest(checkpoints_dir(run_dir))
    rollback = {"from": steps[-1], "to": to, "updates": updates, "steps": steps, "bad": bad}
    replace_file(run_dir / FILE, json.dumps([*rollbacks, rollback], indent=1) + "\n")
    return f"rolled back from step {steps[-1]} to {to}; skipping steps {ranges_of(steps)}"


def ranges_of(steps: list[int]) -> str:
    """Format ascending steps as ranges: 3-5, 9"""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1][1:] = [step]
        else:
            parts.append([step])
    return ", ".join("-".join(map(str, part)) for part in parts)


class Drawn(NamedTuple):
    """The part of a micro-batch that is kept until its step is judged. Its bytes are not kept, to save memory."""

    sources: Tensor  # int64 [B]
    samples: Tensor  # int64 [B]
    loss: Tensor  # summed, without gradient


def samples_of(drawn: list[Drawn], sources: Sources) -> list[str]:
    """Return SOURCE/KEY of the samples of a bad step, over all ranks; collective. If some micro-batches have a
    non-finite loss, only their samples are returned."""
    mine = []
    for of_source, samples, loss in drawn:
        pairs = zip(of_source.tolist(), samples.tolist(), strict=True)
        mine.append((bool(loss.isfinite()), [sources.key_of(*pair) for pair in pairs]))
    micro_batches = [micro_batch for of_rank in dist.gather_to_all(mine) for micro_batch in of_rank]
    suspects = [keys for is_finite, keys in micro_batches if not is_finite] or [keys for _, keys in micro_batches]
    return sorted({key for keys in suspects for key in keys})

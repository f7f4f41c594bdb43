"""How long a run takes on N ranks: steps, communication, saves, evaluations, starts and failures.

Failures are assumed to be independent of each other and of the run's progress, so the time between them is
exponentially distributed. A failure costs the steps since the last checkpoint and a restart. The expected time and the
best interval between checkpoints are those of Daly 2006, "A higher order estimate of the optimum checkpoint interval
for restart dumps".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HOUR = 3600.0
DAY = 24 * HOUR


@dataclass(frozen=True)
class RunTime:
    """The parts of the time of a run, in seconds, without failures."""

    steps: int
    step_s: float
    save_every: int
    """Steps between checkpoints."""
    save_s: float = 0.0
    """The time that training waits for one checkpoint."""
    evaluations_s: float = 0.0
    """The time of all evaluations together."""
    restart_s: float = 0.0
    """The time from a failure, or from the first start, to the next step."""

    @property
    def work_s(self) -> float:
        """The time of steps and evaluations."""
        return self.steps * self.step_s + self.evaluations_s

    @property
    def interval_s(self) -> float:
        """The time of steps and evaluations between two checkpoints."""
        return self.work_s * min(1.0, self.save_every / self.steps)

    def expected_s(self, mtbf_s: float = math.inf) -> float:
        """The expected time of the whole run, if one of its nodes fails every `mtbf_s` seconds on average."""
        if math.isinf(mtbf_s):
            return self.restart_s + self.work_s + self.steps / self.save_every * self.save_s
        try:
            of_interval_s = mtbf_s * math.exp(self.restart_s / mtbf_s)
            of_interval_s *= math.expm1((self.interval_s + self.save_s) / mtbf_s)
        except OverflowError:  # failures are so frequent that hardly any interval is completed
            return math.inf
        return self.restart_s + of_interval_s * self.work_s / self.interval_s

    def best_save_every(self, mtbf_s: float) -> int:
        """The number of steps between checkpoints that gives the shortest expected time; at most all steps."""
        if math.isinf(mtbf_s) or not self.save_s:
            return self.steps if math.isinf(mtbf_s) else 1
        x = self.save_s / (2 * mtbf_s)
        best_s = math.sqrt(2 * self.save_s * mtbf_s) * (1 + math.sqrt(x) / 3 + x / 9) - self.save_s if x < 1 else mtbf_s
        return min(self.steps, max(1, round(best_s / (self.work_s / self.steps))))


def sent_bytes(
    stage: int, parameters: int, ranks: int, micro_batches: int, *, bf16: bool, muon_parameters: int
) -> float:
    """Bytes that one rank sends in a step for gradients, weights and Muon's matrices, if all collectives use rings.

    Gradients are reduced in float32: all-reduced at stages 0 to 2 (DeepSpeed 0.19.8), reduce-scattered at stage 3.
    Stages 2 and 3 do so for every micro-batch. The updated weights are gathered once per step; at stage 3, twice per
    micro-batch. Small parameters count in the same way, although stage 3 keeps them gathered.
    """
    others = (ranks - 1) / ranks
    gradients, weights = 4 * parameters * others, (2 if bf16 and stage else 4) * parameters * others
    matrices = (2 if bf16 else 4) * muon_parameters * others
    if stage == 0:  # the owner of a matrix broadcasts its result
        return 2 * gradients + matrices
    of_stage = {
        1: 2 * gradients + weights,
        2: micro_batches * 2 * gradients + weights,
        3: micro_batches * (gradients + 2 * weights),
    }
    return of_stage[stage] + 2 * matrices / ranks  # pieces are sent to the owner of a matrix and back

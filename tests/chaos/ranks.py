"""Ranks that are killed at any moment, and that write down what they draw: a line per micro-batch."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.forked import start_ranks

HELD, KILLED = "held", "killed"  # files: a rank waits before the last step, and a rank was killed


def train_watched(
    config: str, overrides: Sequence[str], folder: str, poison: dict | None, waits_at_the_end: bool
) -> None:
    """Run bfsys/train.py with injected faults, and record the samples that it draws."""
    from bfsys import dist, train
    from bfsys.config import load_config
    from bfsys.errors import exit_code_of
    from bfsys.ranks import ranks_from_environment

    path = f"{folder}/rank-{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}.audit"
    train.training_batches = audited(train.training_batches, path, waits_at_the_end)
    if poison:
        train.training_loss = poisoned(train.training_loss, **poison)
    ranks = ranks_from_environment()
    dist.hard_exit(exit_code_of(lambda: train.train_rank(load_config(config, overrides), ranks)))


def train_several(config: str, runs: Sequence[tuple[Sequence[str], Sequence[dict]]]) -> None:
    """Train several runs one after the other, each with (overrides, poisons)."""
    from bfsys import dist, train
    from bfsys.config import load_config
    from bfsys.ranks import ranks_from_environment

    ranks, training_loss = ranks_from_environment(), train.training_loss
    dist.start(ranks, timeout_s=900)
    for overrides, poisons in runs:
        train.training_loss = training_loss
        for poison in poisons:
            train.training_loss = poisoned(train.training_loss, **poison)
        assert train.train(load_config(config, overrides), ranks) == 0
    dist.hard_exit(0)


def audited(training_batches, path: str, waits_at_the_end: bool):
    def batches(config, sources, plan, ranks, *, first_step, **others):
        lanes = plan.lanes // ranks.world_size
        drawn = training_batches(config, sources, plan, ranks, first_step=first_step, **others)
        with open(path, "a") as file:
            for i, batch in enumerate(drawn):
                if waits_at_the_end and first_step + i // lanes == config.train.steps - 1:
                    Path(path).with_name(HELD).touch()
                    while not Path(path).with_name(KILLED).exists():
                        time.sleep(0.01)
                pairs = sorted(zip(batch.sources.tolist(), batch.samples.tolist(), strict=True))
                lane = ranks.rank * lanes + i % lanes
                file.write(json.dumps([first_step + i // lanes, lane, pairs]) + "\n")
                file.flush()
                yield batch

    return batches


def poisoned(training_loss, kind: str, samples: Sequence[Sequence[int]]):
    """Corrupt the loss of micro-batches with one of these (source, sample): NaN, infinite, with non-finite gradients,
    or a spike."""
    wanted = {tuple(pair) for pair in samples}

    def loss(logits, batch, *rest):
        total, sums = training_loss(logits, batch, *rest)
        if logits.requires_grad and wanted & set(zip(batch.sources.tolist(), batch.samples.tolist(), strict=True)):
            if kind == "gradient":
                total = total + (logits.float().sum() * 0).sqrt()  # 0, whose gradient is 0 * inf
            elif kind == "loss":  # the gradients stay finite
                total, sums = total + float("inf"), sums + float("inf")
            else:
                factor = {"nan": float("nan"), "spike": 1e4}[kind]
                total, sums = total * factor, sums * factor
        return total, sums

    return loss


class Ranks:
    """The processes of one start of a run."""

    def __init__(
        self, world_size: int, config: Path, overrides: Sequence[str], folder: Path, poison: dict | None = None,
        waits_at_the_end: bool = False,
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        for name in (HELD, KILLED):
            (folder / name).unlink(missing_ok=True)
        self.folder = folder
        arguments = (str(config), tuple(overrides), str(folder), poison, waits_at_the_end)
        self.processes = start_ranks(world_size, train_watched, arguments)

    @property
    def are_running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    @property
    def are_held(self) -> bool:
        """Whether a rank waits before the last step."""
        return (self.folder / HELD).exists()

    def end(self, timeout_s: float = 900) -> list[int]:
        """Wait for all processes to end, and return their exit codes."""
        try:
            for process in self.processes:
                process.communicate(timeout_s)
        finally:
            self.kill()
        return [process.returncode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def said(self) -> str:
        return "\n".join(f"rank {i}: {''.join(process.said())}" for i, process in enumerate(self.processes))

    def audit_bytes(self) -> int:
        """The size of the record of drawn samples, which grows with every micro-batch."""
        return sum(path.stat().st_size for path in self.folder.glob("*.audit"))


def draws(folder: Path) -> dict[tuple[int, int], list]:
    """Return the samples drawn at each (step, lane). Assert that every repetition drew the same."""
    found: dict[tuple[int, int], list] = {}
    for path in sorted(folder.glob("*.audit")):
        for line in path.read_text().split("\n")[:-1]:  # after a kill, the last line may be incomplete
            step, lane, pairs = json.loads(line)
            assert found.setdefault((step, lane), pairs) == pairs, (path, step, lane)
    return found


def kill_at_random(ranks: Ranks, run: Path, rng: random.Random, longest_s: float) -> str:
    """Kill one of the ranks at a random moment after training has resumed, or during a save."""
    wants_save = rng.random() < 0.5
    before, old = ranks.audit_bytes(), parts(run)
    deadline = time.monotonic() + 900
    while ranks.are_running and ranks.audit_bytes() == before and not ranks.are_held:
        assert time.monotonic() < deadline, ranks.said()
        time.sleep(0.01)
    if wants_save:
        while ranks.are_running and not parts(run) - old and not ranks.are_held:
            time.sleep(0.0005)
        time.sleep(rng.random() ** 4 * 0.25)  # often just after the begin, since fast disks save in milliseconds
    else:
        time.sleep(rng.random() * longest_s)
    rng.choice(ranks.processes).kill()
    (ranks.folder / KILLED).touch()
    ranks.end()
    return "in a save" if parts(run) - old else "between"


def parts(run: Path) -> set[Path]:
    """Incomplete saves."""
    return set((run / "checkpoints").glob(".step_*.part"))


def kill_again_and_again(
    config: Path, run: Path, folder: Path, overrides: Sequence[str], kills: int, seed: int, world_sizes: Iterator[int]
) -> dict[str, int]:
    """Start the run and kill a rank, repeatedly, then let it end. Returns how often each kind of moment was hit.

    Before the last step, ranks wait until one of them is killed, so that no run ends before its kill.
    """
    rng, moments = random.Random(seed), {"between": 0, "in a save": 0}
    while True:
        is_last = sum(moments.values()) == kills
        ranks = Ranks(next(world_sizes), config, overrides, folder, waits_at_the_end=not is_last)
        if is_last:
            codes = ranks.end()
            assert set(codes) == {0}, ranks.said()
            return moments
        moment = kill_at_random(ranks, run, rng, longest_s=1.0)
        moments[moment] += -signal.SIGKILL in ranks.end()

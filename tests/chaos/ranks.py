"""Ranks that can be started in a second and killed at any moment.

They are forked from a server process that has imported PyTorch and DeepSpeed already, which takes most of a start.
What they draw is written down: a line per micro-batch, (step, lane, samples).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# Not imported before ranks are forked: all of this has threads of its own.
PRELOADED = ["torch", "torch._dynamo", "torch.utils.tensorboard", "deepspeed", "bfsys.train", "tests.chaos.ranks"]


def context() -> multiprocessing.context.ForkServerContext:
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["OMP_NUM_THREADS"] = "1"
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def run_rank(variables: dict[str, str], config: str, overrides: Sequence[str], log: str, poison: dict | None) -> None:
    """Train as rank `variables["RANK"]`; the code is that of the process."""
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)

    from bfsys import dist, train
    from bfsys.errors import run_command

    train.training_batches = audited(train.training_batches, log + ".audit")
    if poison:
        train.loss_and_sums = poisoned(train.loss_and_sums, **poison)
    try:
        run_command(lambda: train.main([config, *overrides]))
    except SystemExit as end:
        dist.leave(end.code)


def audited(training_batches, path: str):
    def batches(config, sources, plan, ranks, *, first_step, quarantine):
        lanes = plan.lanes // ranks.world_size
        drawn = training_batches(config, sources, plan, ranks, first_step=first_step, quarantine=quarantine)
        with open(path, "a") as file:
            for i, batch in enumerate(drawn):
                pairs = sorted(zip(batch.sources.tolist(), batch.samples.tolist(), strict=True))
                lane = ranks.rank * lanes + i % lanes
                file.write(json.dumps([first_step + i // lanes, lane, pairs]) + "\n")
                file.flush()
                yield batch

    return batches


def poisoned(loss_and_sums, kind: str, samples: Sequence[Sequence[int]]):
    """The loss of micro-batches with one of these (source, sample): no number, with gradients that are none, or much
    too large."""
    wanted = {tuple(pair) for pair in samples}

    def loss(logits, batch, *rest):
        total, sums = loss_and_sums(logits, batch, *rest)
        if logits.requires_grad and wanted & set(zip(batch.sources.tolist(), batch.samples.tolist(), strict=True)):
            if kind == "gradient":
                total = total + (logits.float().sum() * 0).sqrt()  # 0, whose gradient is 0 * inf
            else:
                total = total * {"nan": float("nan"), "inf": float("inf"), "spike": 1e4}[kind]
        return total, sums

    return loss


class Ranks:
    """The processes of one start of a run."""

    def __init__(
        self, world_size: int, config: Path, overrides: Sequence[str], folder: Path, poison: dict | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.logs = [folder / f"rank-{rank}-of-{world_size}" for rank in range(world_size)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            variables = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            arguments = (variables, str(config), tuple(overrides), str(log), poison)
            process = context().Process(target=run_rank, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)

    @property
    def are_running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def end(self, timeout_s: float = 120) -> list[int]:
        """Wait for all to end; their exit codes."""
        try:
            for process in self.processes:
                process.join(timeout_s)
                assert process.exitcode is not None, f"no end after {timeout_s} s\n{self.said()}"
        finally:
            self.kill()
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def said(self) -> str:
        return "".join(f"{log.name}: {log.read_text()}\n" for log in self.logs if log.exists())


def draws(folder: Path) -> dict[tuple[int, int], list]:
    """What was drawn at each (step, lane); asserts that every repetition drew the same."""
    found: dict[tuple[int, int], list] = {}
    for path in sorted(folder.glob("*.audit")):
        for line in path.read_text().split("\n")[:-1]:  # a kill may have torn the last one
            step, lane, pairs = json.loads(line)
            assert found.setdefault((step, lane), pairs) == pairs, (path, step, lane)
    return found


def kill_at_random(ranks: Ranks, run: Path, rng: random.Random, longest_s: float) -> str:
    """SIGKILL one of the ranks, at a random moment after training goes on or in the middle of a save."""
    wants_save = rng.random() < 0.5
    audits = [log.with_name(log.name + ".audit") for log in ranks.logs]
    sizes = audit_sizes(audits)
    deadline = time.monotonic() + 60
    while ranks.are_running and audit_sizes(audits) == sizes:
        assert time.monotonic() < deadline, ranks.said()
        time.sleep(0.01)
    moment = "between"
    if wants_save:
        while ranks.are_running and not list((run / "checkpoints").glob(".step_*")):
            time.sleep(0.0005)
        moment = "in a save"
        time.sleep(rng.random() * 0.25)
    else:
        time.sleep(rng.random() * longest_s)
    rng.choice(ranks.processes).kill()
    return moment


def audit_sizes(audits: Sequence[Path]) -> list[int]:
    return [path.stat().st_size if path.exists() else 0 for path in audits]


def kill_again_and_again(
    config: Path, run: Path, folder: Path, overrides: Sequence[str], kills: int, seed: int, world_sizes: Iterator[int]
) -> dict[str, int]:
    """Start the run, kill a rank, start it again …, and let it end; how often each kind of moment was hit."""
    rng, moments = random.Random(seed), {"between": 0, "in a save": 0}
    while True:
        ranks = Ranks(next(world_sizes), config, overrides, folder)
        if sum(moments.values()) == kills:
            codes = ranks.end()
            assert set(codes) == {0}, ranks.said()
            return moments
        moment = kill_at_random(ranks, run, rng, longest_s=1.0)
        codes = ranks.end()
        if set(codes) == {0}:
            raise AssertionError(f"the run is over after {moments}: too few steps")
        moments[moment] += -signal.SIGKILL in codes

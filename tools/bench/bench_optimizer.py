"""Benchmark of Muon beside AdamW: time of a step, time of its update, and bytes that ranks send, at each ZeRO stage.

    python tools/bench/bench_optimizer.py configs/quickstart.yaml --files 32 --file-bytes 1700
    torchrun --standalone --nproc-per-node 2 tools/bench/bench_optimizer.py configs/quickstart.yaml --stages 0 1 2 3

Both optimizers train the config's model on the same random files, `--files` on each rank, with alternating steps. The
figures are those of the fastest of `--repeats` steps on the slowest rank. CPU time does not include waiting for other
ranks. Bytes are those that the rank that sends most sends to others by all_to_all, to assemble the matrices and to
return results. At stage 0 results are broadcast, which is not counted. ZeRO itself sends the same for both optimizers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from unittest.mock import patch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from bfsys.start import let_signals_end_the_process

    let_signals_end_the_process()

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bfsys import dist
from bfsys.batch import ByteBatch, Sample
from bfsys.commands.arguments import add_config
from bfsys.config import Config, load_config
from bfsys.engine import Engine
from bfsys.errors import run_command, summary_of
from bfsys.loss import loss_and_sums
from bfsys.model.byteformer import ByteFormer
from bfsys.model.flops import synchronize
from bfsys.ranks import Ranks, ranks_from_environment
from tools.bench.command import at_least

NAMES: tuple[Literal["adamw", "muon"], ...] = ("adamw", "muon")
CLASSES = 20


@dataclass
class Times:
    """The times of the steps of one optimizer on this rank."""

    step_s: list[float] = field(default_factory=list)
    update_s: list[float] = field(default_factory=list)
    update_cpu_s: list[float] = field(default_factory=list)
    sent_bytes: int = 0

    def best(self) -> list[float]:
        return [min(self.step_s), min(self.update_s), min(self.update_cpu_s), self.sent_bytes]


def measure(config: Config, ranks: Ranks, batch: ByteBatch, repeats: int) -> dict[str, list[float]]:
    """{name of the optimizer: [step_s, update_s, update_cpu_s, sent bytes]}, the largest of all ranks; collective."""
    engines = {}
    for name in NAMES:
        torch.manual_seed(0)
        of_name = replace(config, optim=replace(config.optim, name=name))
        engines[name] = Engine(ByteFormer(config.model.architecture(), CLASSES), of_name, ranks, micro_batches=1)
    times = {name: Times() for name in NAMES}
    for repeat in range(repeats + 1):
        for name in NAMES if repeat % 2 else reversed(NAMES):
            _step(engines[name], batch, config, times[name])
    for seconds in times.values():  # without the first step, which allocates
        del seconds.step_s[0], seconds.update_s[0], seconds.update_cpu_s[0]
    return {name: dist.gather_numbers(times[name].best()).amax(0).tolist() for name in NAMES}


def _step(engine: Engine, batch: ByteBatch, config: Config, times: Times) -> None:
    sent = 0

    def counted(values: Tensor, counts: Sequence[int], received: Sequence[int]) -> Tensor:
        nonlocal sent
        sent += (len(values) - counts[engine.ranks.rank]) * values.element_size()
        return all_to_all(values, counts, received)

    all_to_all = dist.all_to_all
    dist.gather_to_all(None)  # a barrier
    began = time.perf_counter()
    loss, _ = loss_and_sums(engine.forward(batch), batch, 1, config.optim.label_smoothing)
    engine.backward(loss)
    synchronize(engine.device)
    updating, cpu = time.perf_counter(), time.process_time()
    with patch.object(dist, "all_to_all", counted):
        engine.step(1e-4, 0.9)
    synchronize(engine.device)
    times.update_cpu_s.append(time.process_time() - cpu)
    times.update_s.append(time.perf_counter() - updating)
    times.step_s.append(time.perf_counter() - began)
    times.sent_bytes = sent


def main() -> None:
    parser = argparse.ArgumentParser(description=summary_of(__doc__))
    add_config(parser)
    parser.add_argument(
        "--files", type=at_least(1), default=16, metavar="N", help="files of each rank in a step (default 16)"
    )
    parser.add_argument(
        "--file-bytes", type=at_least(1), default=2000, metavar="B", help="bytes of each file (default 2000)"
    )
    parser.add_argument("--stages", type=int, nargs="+", default=[1], choices=range(4), help="ZeRO stages (default 1)")
    parser.add_argument(
        "--repeats", type=at_least(1), default=5, metavar="N", help="steps of each optimizer (default 5)"
    )
    args = parser.parse_intermixed_args()
    ranks = ranks_from_environment()
    dist.start(ranks, timeout_s=600)
    torch.set_num_threads(1)
    config = load_config(args.config, [*args.overrides, f"data.lanes={ranks.world_size}"])
    rng = np.random.default_rng(ranks.rank)
    files = [rng.integers(0, 256, args.file_bytes, dtype=np.uint8) for _ in range(args.files)]
    batch = ByteBatch.from_samples([Sample("", content, i % CLASSES) for i, content in enumerate(files)])
    batch = batch.to(ranks.device)
    table = Table(title=f"{args.config}, {config.train.precision}, {ranks.world_size} ranks, milliseconds")
    for column in ("ZeRO", "step, AdamW", "step, Muon", "ratio", "update, AdamW", "update, Muon", "CPU time of updates",
                   "KB sent"):  # fmt: skip
        table.add_column(column, justify="right")
    for stage in args.stages:
        of_stage = replace(config, train=replace(config.train, zero_stage=stage))
        adamw, muon = measure(of_stage, ranks, batch, args.repeats).values()
        table.add_row(
            str(stage), f"{1e3 * adamw[0]:,.1f}", f"{1e3 * muon[0]:,.1f}", f"{muon[0] / adamw[0]:.3f}",
            f"{1e3 * adamw[1]:,.1f}", f"{1e3 * muon[1]:,.1f}", f"{1e3 * adamw[2]:,.1f}, {1e3 * muon[2]:,.1f}",
            f"{muon[3] / 1e3:,.1f}",
        )  # fmt: skip
    if ranks.is_rank_zero:
        Console(width=None if sys.stdout.isatty() else 120).print(table)
    dist.stop()
    dist.hard_exit(0)  # gloo may abort a process that ends while another one still closes its connections


if __name__ == "__main__":
    run_command(main)

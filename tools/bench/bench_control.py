"""Benchmark of the control message of a step and of the start of the process group, with an estimate for 1,024 ranks.

    python tools/bench/bench_control.py
    python tools/bench/bench_control.py --ranks 2 8 32 --json control.json

Processes without a model form a process group as the ranks of a run do (`bfsys.dist.start`). They exchange the five
numbers of a control message in two ways: as the supervisor does, and by gloo's own all-gather (a ring). They share the
cores of this machine, so their wall time is about ranks x CPU time / cores, and says nothing about a cluster.

Two processes, each on its own core, therefore also exchange as many messages of the same sizes as one of N ranks does.
Their time is that of N ranks on cores of this machine, without the network. The network adds one message between two
nodes to each round.
"""

import argparse
import functools
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from bfsys.start import let_signals_end_the_process

    let_signals_end_the_process()

import numpy as np
import torch
import torch.distributed

from bfsys import dist
from bfsys.errors import UserError, run_command, summary_of
from tools.bench.command import at_least

NUMBERS = 5  # numbers in a control message
BLOCKS = 5  # blocks of steps; the fastest block counts
PAIR_RANKS = (2, 4, 16, 64, 256, 1024)
TIMEOUT_S = 300
LOCAL_RANKS = 8


@dataclass(frozen=True)
class Exchange:
    """One way to exchange a control message."""

    name: str
    act: Callable[[list[float]], object]
    as_one_of: Callable[[int, int], None]
    """(ranks, the other process): act as one of this number of ranks. The other process replaces all other ranks."""
    messages: Callable[[int], int]
    """Messages that a rank sends, by the number of ranks. Each message waits for the one before."""


def ring(values: list[float]) -> None:
    """gloo's own all-gather."""
    mine = torch.tensor(values, dtype=torch.float64)
    everyones = torch.empty(torch.distributed.get_world_size(), len(mine), dtype=torch.float64)
    torch.distributed.all_gather(list(everyones.unbind()), mine)


def ring_as_one_of(ranks: int, other: int) -> None:
    for _ in range(ranks - 1):
        ring([0.0] * NUMBERS)


def message_as_one_of(ranks: int, other: int) -> None:
    mine = torch.tensor([0.0] * NUMBERS, dtype=torch.float64)
    _exchange_with(ranks, other).gather(mine).amax(0)


@functools.cache
def _exchange_with(ranks: int, other: int) -> dist.RowExchange:
    exchange = dist.RowExchange([NUMBERS], torch.float64, ranks, 0)
    exchange.rounds = [each._replace(source=other, destination=other) for each in exchange.rounds]
    return exchange


EXCHANGES = (
    Exchange("ring", ring, ring_as_one_of, lambda ranks: ranks - 1),
    Exchange("control message", dist.gather_numbers, message_as_one_of, lambda ranks: (ranks - 1).bit_length()),
)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=summary_of(__doc__))
    add = parser.add_argument
    add("--ranks", type=int, nargs="*", default=[2, 8, 32, 64, 128], metavar="N", help="numbers of processes to start")
    add(
        "--steps",
        type=at_least(1),
        default=400,
        metavar="N",
        help="steps of a block, which all processes make together",
    )
    add("--step-ms", type=float, default=50, help="duration of a step, of which the cost is a share")
    add("--hop-us", type=float, default=10, help="assumed time of a message between two nodes")
    add("--json", type=Path, metavar="OUT")
    args = parser.parse_args(arguments)
    if args.ranks and min(args.ranks) < 2:
        raise UserError("--ranks: at least 2 are needed")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    torch.set_num_threads(1)
    rows = []
    if args.ranks:
        print("                       start of the group      |  a control message")
        print("ranks connections    wall  CPU/rank    sockets |  exchange          messages  waits  CPU/rank      wall")
    for ranks in args.ranks:
        for mesh in ("full", "on demand"):
            rows.append(row := measure(ranks, mesh, max(3, args.steps // ranks)))
            start = f"{row['start_wall_s']:>6.2f} s {1e3 * row['start_cpu_s']:>6.1f} ms {row['sockets']:>10}"
            for each in row["exchanges"]:
                print(
                    f"{ranks:>5} {mesh:<11} {start} |  {each['name']:<17} {each['messages']:>8} {each['waits']:>6.1f} "
                    f"{each['cpu_us']:>6.0f} us {each['wall_us']:>6.0f} us",
                    flush=True,
                )
    pairs = run_processes(2, "full", as_one_of_many)[0]
    fits = [fit(exchange, pairs[exchange.name], args) for exchange in EXCHANGES]
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "as_one_of": fits, "cores": os.cpu_count()}, indent=1) + "\n")
    return 0


def measure(ranks: int, mesh: str, steps: int) -> dict:
    """Measure a group of `ranks` processes. CPU times are the mean over the ranks, wall times the maximum."""
    figures = run_processes(ranks, mesh, functools.partial(exchange_steps, steps=steps))
    return {
        "ranks": ranks,
        "connections": mesh,
        "start_wall_s": max(of_rank["start_wall_s"] for of_rank in figures),
        "start_cpu_s": float(np.mean([of_rank["start_cpu_s"] for of_rank in figures])),
        "sockets": max(of_rank["sockets"] for of_rank in figures),
        "exchanges": [
            {
                "name": exchange.name,
                "messages": exchange.messages(ranks),
                "waits": float(np.mean([of_rank[exchange.name]["waits"] for of_rank in figures])),
                "cpu_us": float(np.mean([of_rank[exchange.name]["cpu_us"] for of_rank in figures])),
                "wall_us": max(of_rank[exchange.name]["wall_us"] for of_rank in figures),
            }
            for exchange in EXCHANGES
        ],
    }


def run_processes(ranks: int, mesh: str, act: Callable[[int], dict]) -> list[dict]:
    """Return the results of `act(rank)` in each process of a group, by rank, and the cost of their start."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    answers = context.SimpleQueue()
    processes = [
        context.Process(target=be_rank, args=(rank, ranks, port, mesh, act, answers), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    figures = dict(answers.get() for _ in processes)
    for process in processes:
        process.join()
    return [figures[rank] for rank in range(ranks)]


def be_rank(rank: int, ranks: int, port: int, mesh: str, act: Callable[[int], dict], answers: SimpleQueue) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an inherited handler would wait for the end of an exchange
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    os.environ[dist.CONNECT_ON_DEMAND] = str(int(mesh == "on demand"))
    began = Clock()
    dist.start(dist.Ranks(rank, ranks, rank % LOCAL_RANKS, LOCAL_RANKS), TIMEOUT_S)
    wall_s, cpu_s, _ = began.elapsed()
    figures = {"start_wall_s": wall_s, "start_cpu_s": cpu_s, **act(rank)}
    torch.distributed.barrier()
    answers.put((rank, figures))
    dist.hard_exit(0)


def exchange_steps(rank: int, steps: int) -> dict:
    """Time the control messages of `steps` steps with each exchange, and count the sockets that are open afterwards."""
    figures: dict = {}
    for exchange in EXCHANGES:
        figures[exchange.name] = time_of(functools.partial(exchange.act, [float(rank)] * NUMBERS), steps)
        figures["sockets"] = sum(
            os.readlink(path).startswith("socket:") for path in Path("/proc/self/fd").iterdir() if os.path.lexists(path)
        )
    return figures


def as_one_of_many(rank: int) -> dict:
    """Time the work of one of many ranks, with two processes, by exchange and number of ranks."""
    return {
        exchange.name: {
            ranks: time_of(functools.partial(exchange.as_one_of, ranks, 1 - rank), 5) for ranks in PAIR_RANKS
        }
        for exchange in EXCHANGES
    }


def time_of(act: Callable[[], object], times: int) -> dict[str, float]:
    """The seconds that one `act()` takes in the fastest block."""
    act()  # connects
    blocks = []
    for _ in range(BLOCKS):
        torch.distributed.barrier()
        began = Clock()
        for _ in range(times):
            act()
        blocks.append(began.elapsed())
    wall_s, cpu_s, waits = (min(of_blocks) / times for of_blocks in zip(*blocks, strict=True))
    return {"wall_us": 1e6 * wall_s, "cpu_us": 1e6 * cpu_s, "waits": waits}


class Clock:
    """The wall time and the CPU time of this process in seconds, and the number of its waits."""

    def __init__(self) -> None:
        self._began = self._now()

    def elapsed(self) -> tuple[float, float, float]:
        wall_s, cpu_s, waits = (now - then for now, then in zip(self._now(), self._began, strict=True))
        return wall_s, cpu_s, waits

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


def fit(exchange: Exchange, figures: dict[int, dict], args: argparse.Namespace) -> dict:
    """Fit a line through (messages, wall time) of a pair, and estimate the time of the largest number of ranks."""
    messages = [exchange.messages(ranks) for ranks in figures]
    slope, constant = np.polyfit(messages, [of_ranks["wall_us"] for of_ranks in figures.values()], 1)
    for ranks, of_ranks in figures.items():
        wall_us, cpu_us = of_ranks["wall_us"], of_ranks["cpu_us"]
        print(f"as one of {ranks:>5,} ranks, {exchange.name}: {wall_us:,.0f} us, {cpu_us:,.0f} us CPU")
    total_ms = (constant + slope * messages[-1] + args.hop_us * messages[-1]) / 1e3
    print(
        f"{exchange.name}: {constant:.0f} us + {slope:.0f} us x messages; {ranks:,} ranks: {messages[-1]} messages, "
        f"{total_ms:.2f} ms with the network, which is {total_ms / args.step_ms:.1%} of {args.step_ms:.0f} ms"
    )
    return {
        "name": exchange.name,
        "figures": figures,
        "constant_us": constant,
        "us_per_message": slope,
        "with_network_ms": total_ms,
    }


if __name__ == "__main__":
    run_command(main)

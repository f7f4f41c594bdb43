"""Estimate what a run will need: memory of a rank, time, checkpoints, disk."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bfsys.commands.arguments import add_config
from bfsys.errors import UserError
from bfsys.model import peaks
from bfsys.run_time import DAY, HOUR

if TYPE_CHECKING:
    from bfsys.plan_run import Estimate

# FLOP/s in bfloat16, by the names that --gpu takes.
PEAKS = {name.lower().replace(" ", "-"): 1e12 * peak.bf16 for name, peak in peaks.PEAKS.items() if peak.bf16}
NOTES = """\
Time needs a run that was measured (--like) or a share of a GPU's peak. Failures
need --like, whose saves and starts count. docs/scale.md has the formulas."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s CONFIG [section.key=value …] [OPTION …]", NOTES
    add_config(parser)
    add = parser.add_argument
    add("--ranks", type=int, default=1, metavar="N", help="GPUs, or CPU processes (default: 1)")
    add("--gpu", choices=PEAKS, metavar="GPU", help="whose peak is meant, such as h100 or l40s")
    add("--utilisation", type=float, metavar="SHARE", default=0.3, help="of that peak (default: %(default)s)")
    add("--like", type=Path, metavar="RUN", help="a run whose rate per rank was measured")
    add("--network", type=float, metavar="GB/S", help="that a rank sends, if steps wait for it")
    add("--mtbf-days", type=float, metavar="D", help="mean time between failures of a node")
    add("--ranks-per-node", type=int, metavar="N", default=8, help="default: %(default)s")
    add("--price", type=float, metavar="P", help="of a rank for an hour")
    add("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    _check(args)
    from bfsys.config import load_config

    config = load_config(args.config, args.overrides)
    from bfsys.data.streaming.run_data import open_run_data
    from bfsys.plan_run import estimate, measured, run_time
    from bfsys.ranks import Ranks, gpu_count

    plan = estimate(open_run_data(config, Ranks()), args.ranks, on_gpu=bool(args.gpu) or gpu_count() > 0)
    like = measured(args.like) if args.like else None
    if not like and not args.gpu:
        print(json.dumps(asdict(plan), indent=1) if args.json else f"{_lines_of(plan)}\ntime: give --like or --gpu")
        return 0
    step_s = plan.step_s(like.flops_per_s if like else PEAKS[args.gpu] * args.utilisation / plan.busiest)
    if args.network:  # with --like, as if steps there waited for no network
        step_s += plan.sent_bytes / (args.network * 1e9)
    time = run_time(plan, config, like, step_s)
    mtbf_s = args.mtbf_days * DAY / -(-args.ranks // args.ranks_per_node) if args.mtbf_days else math.inf
    expected_s = time.expected_s(mtbf_s)
    figures = {
        "step_s": step_s,
        "expected_s": expected_s,
        "goodput": time.work_s / expected_s,
        "best_save_every": time.best_save_every(mtbf_s) if args.mtbf_days else None,
        "price": args.price and args.price * args.ranks * expected_s / HOUR,
    }
    if args.json:
        print(json.dumps(asdict(plan) | asdict(time) | figures, indent=1))
        return 0
    meant = f"as in {args.like}" if like else f"if {args.utilisation:.0%} of the peak of an {args.gpu} is reached"
    print(_lines_of(plan))
    print(f"{step_s:.3f} s a step, {_duration(time.steps * step_s)} for {time.steps:,} steps, {meant}")
    if like:
        print(
            f"a start takes {time.restart_s:.1f} s, a checkpoint stalls training for {time.save_s:.2f} s every "
            f"{time.save_every:,} steps, evaluations take {_duration(time.evaluations_s)} in all"
        )
    if args.mtbf_days:
        print(
            f"{expected_s / mtbf_s:.2f} failures are expected, {_duration(expected_s)} in all, goodput "
            f"{figures['goodput']:.1%}; best train.save_every: {figures['best_save_every']:,}"
        )
    if args.price:
        print(f"price: {figures['price']:,.0f}")
    return 0


def _check(args: argparse.Namespace) -> None:
    problems = []
    if args.ranks < 1 or args.ranks_per_node < 1:
        problems.append("--ranks, --ranks-per-node: at least 1 is needed")
    if not 0 < args.utilisation <= 1:
        problems.append(f"--utilisation: got {args.utilisation:g}; allowed is more than 0 and at most 1")
    for name in ("network", "mtbf_days", "price"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            problems.append(f"--{name.replace('_', '-')}: got {value:g}; allowed is a number above 0")
    if args.mtbf_days and not args.like:
        problems.append("--mtbf-days needs --like: a run whose saves and starts were measured")
    if problems:
        raise UserError(*problems)


def _lines_of(plan: Estimate) -> str:
    return f"{plan.describe().replace('; ', chr(10))}\nbusiest rank of a step: {plan.busiest:.3f} x the mean"


def _duration(seconds: float) -> str:
    if seconds < HOUR:
        return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
    return f"{seconds / HOUR:,.1f} h" if seconds < math.inf else "no end"

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

# By the names that --gpu takes.
PEAKS = {name.lower().replace(" ", "-"): peak for name, peak in peaks.PEAKS.items() if peak.bf16}
LIMITS = (("utilisation", 0.001, 1), ("network", 0.001, 1e6), ("mtbf_days", 0.001, 1e6), ("price", 0, 1e6))
NOTES = """\
The time is estimated with --like or --gpu. The cost of failures needs --like,
for the times of saves and starts. docs/scale.md has the formulas."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s CONFIG [section.key=value …] [OPTION …]", NOTES
    add_config(parser)
    add = parser.add_argument
    add("--ranks", type=int, default=1, metavar="N", help="GPUs, or CPU processes (default: 1)")
    add("--gpu", choices=PEAKS, metavar="GPU", help="type of GPU whose peak is used, such as h100")
    add("--utilisation", type=float, metavar="SHARE", help="share of that peak (default: as on an H200)")
    add("--like", type=Path, metavar="RUN", help="take the speed of a rank from a trained run")
    add("--network", type=float, metavar="GB/S", help="bandwidth of a rank; adds the time of communication")
    add("--mtbf-days", type=float, metavar="D", help="mean time between failures of a node")
    add("--ranks-per-node", type=int, metavar="N", default=8, help="ranks on a node (default: %(default)s)")
    add("--price", type=float, metavar="P", help="price of a rank for an hour")
    add("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    _check(args)
    from bfsys.config import load_config

    config = load_config(args.config, args.overrides)
    from bfsys.data.streaming.run_data import open_run_data
    from bfsys.plan_run import estimate, measured, run_time, usual_utilisation
    from bfsys.ranks import Ranks, gpu_count

    like = measured(args.like) if args.like else None
    plan = estimate(open_run_data(config, Ranks()), args.ranks, on_gpu=bool(args.gpu) or gpu_count() > 0)
    if like:
        step_s, meant = plan.step_s(like.flops_per_s), f"as in {args.like}"
    elif args.gpu:
        share = args.utilisation or usual_utilisation(config.model.architecture().dim)
        precision = config.train.precision
        step_s = plan.step_s(1e12 * getattr(PEAKS[args.gpu], precision) * share / plan.busiest)
        meant = (
            f"if {100 * share:.0f} % of the peak of an {args.gpu} in {precision} is reached and kernel launches are "
            "not the bottleneck"
        )
    else:
        print(
            json.dumps(asdict(plan), indent=1)
            if args.json
            else f"{_lines_of(plan)}\ntime: not estimated; give --like RUN or --gpu GPU"
        )
        return 0
    if args.network:
        step_s += plan.sent_bytes / (args.network * 1e9)
    time = run_time(plan, config, like, step_s)
    mtbf_s = args.mtbf_days * DAY / -(-args.ranks // args.ranks_per_node) if args.mtbf_days else math.inf
    expected_s = time.expected_s(mtbf_s)
    best = time.best_save_every(mtbf_s) if args.mtbf_days else None
    price = args.price * args.ranks * expected_s / HOUR if args.price else None
    if args.json:
        figures = {
            "expected_s": expected_s,
            "goodput": time.work_s / expected_s,
            "price": price,
        }
        finite = {name: value if value is None or value < math.inf else None for name, value in figures.items()}
        print(json.dumps(asdict(plan) | asdict(time) | finite | {"best_save_every": best}, indent=1))
        return 0
    print(_lines_of(plan))
    print(f"{step_s:.3g} s a step, {_duration(time.steps * step_s)} for {time.steps:,} steps, {meant}")
    if like:
        print(
            f"a start takes {time.restart_s:.1f} s, a checkpoint stalls training for {time.save_s:.2f} s every "
            f"{time.save_every:,} steps, evaluations take {_duration(time.evaluations_s)} in all"
        )
        for what in ("train.precision", "train.zero_stage", "optim.name"):
            section, _, key = what.partition(".")
            theirs, ours = (getattr(getattr(one, section), key) for one in (like.config, config))
            if theirs != ours:
                print(
                    f"note: {what} is {ours}, and was {theirs} in {args.like}: its measured rate may not "
                    f"apply to this run"
                )
    if best:
        print(
            f"expected: {expected_s / mtbf_s:.2g} failures, and {_duration(expected_s)} in all, of which "
            f"{100 * time.work_s / expected_s:.1f} % are steps and evaluations; best train.save_every: {best:,}"
        )
    if price:
        print(
            f"price: {price:,.2f}"
            if price < math.inf
            else "price: unbounded, since a run with so many failures would not finish"
        )
    return 0


def _check(args: argparse.Namespace) -> None:
    problems = []
    for name in ("ranks", "ranks_per_node"):
        if getattr(args, name) < 1:
            problems.append(f"--{name.replace('_', '-')}: got {getattr(args, name)}; at least 1 is needed")
    for name, low, high in LIMITS:
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            problems.append(f"--{name.replace('_', '-')}: got {value:g}; allowed is {low:g} to {high:,.0f}")
    if args.like and args.gpu:
        problems.append("--like, --gpu: give one of them, since a run that was measured has its own rate")
    if args.utilisation is not None and not args.gpu:
        problems.append("--utilisation needs --gpu: it is a share of that GPU's peak")
    if args.mtbf_days and not args.like:
        problems.append("--mtbf-days needs --like: a run whose saves and starts were measured")
    for name in ("network", "price"):
        if getattr(args, name) is not None and not (args.like or args.gpu):
            problems.append(f"--{name} needs --like or --gpu: the time cannot be estimated without a rate")
    if problems:
        raise UserError(*problems)


def _lines_of(plan: Estimate) -> str:
    return f"{plan.describe().replace('; ', chr(10))}\nbusiest rank of a step: {plan.busiest:.3f} x the mean"


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    if seconds < HOUR:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / HOUR:,.1f} h" if seconds < 1e12 else "no end"

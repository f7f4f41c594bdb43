"""Estimate what a run will need: memory of a rank, time, checkpoints, disk."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from bfsys.commands.arguments import add_config
from bfsys.errors import UserError
from bfsys.model import peaks

# FLOP/s in bfloat16, by the names that --gpu takes.
PEAKS = {name.lower().replace(" ", "-"): 1e12 * peak.bf16 for name, peak in peaks.PEAKS.items() if peak.bf16}
NOTES = """\
Operations and memory are counted for the first steps as training will plan
them; what CUDA, NCCL and the allocator take for themselves is left out. Time
needs the rate of a run that was measured (--like), or a share of a GPU's peak.

  bfsys plan configs/joint.yaml --ranks 64 --gpu h200
  bfsys plan configs/joint.yaml --ranks 64 --like runs/a_short_one"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s CONFIG [section.key=value …] [OPTION …]", NOTES
    add_config(parser)
    add = parser.add_argument
    add("--ranks", type=int, default=1, metavar="N", help="GPUs, or CPU processes (default: 1)")
    add("--gpu", choices=PEAKS, metavar="GPU", help="whose peak is meant, such as h100 or l40s")
    add("--utilisation", type=float, metavar="SHARE", default=0.3, help="of that peak (default: %(default)s)")
    add("--like", type=Path, metavar="RUN", help="a run whose rate per rank was measured")
    add("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    if args.ranks < 1 or not 0 < args.utilisation <= 1:
        raise UserError("--ranks: at least 1 is needed; --utilisation: more than 0 and at most 1")
    from bfsys.config import load_config

    config = load_config(args.config, args.overrides)
    from bfsys.data.streaming.run_data import open_run_data
    from bfsys.plan_run import estimate, measured_rate
    from bfsys.ranks import Ranks, gpu_count

    plan = estimate(open_run_data(config, Ranks()), args.ranks, on_gpu=bool(args.gpu) or gpu_count() > 0)
    rate, share, meant = None, 1.0, ""
    if args.like:
        (rate, share), meant = measured_rate(args.like), f"as measured in {args.like}"
    elif args.gpu:
        rate = PEAKS[args.gpu] * args.utilisation / plan.busiest  # the others wait for it
        meant = f"if {args.utilisation:.0%} of the peak of an {args.gpu} is reached"
    if args.json:
        print(json.dumps(asdict(plan) | {"step_s": plan.step_s(rate) if rate else None}, indent=1))
        return 0
    print(plan.describe().replace("; ", "\n"))
    print(f"busiest rank of a step: {plan.busiest:.3f} x the mean")
    if rate:
        step_s = plan.step_s(rate)
        print(f"{step_s:.3f} s a step, {step_s / share * plan.steps / 3600:,.1f} h for {plan.steps:,} steps, {meant}")
    else:
        print("time: give --gpu, or better --like a run that was measured")
    return 0

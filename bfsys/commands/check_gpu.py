"""Check a new machine or cluster: environment, NCCL, kernels, engine, one step, and a short training."""

from __future__ import annotations

import argparse
import json
import math
import socket
from dataclasses import asdict
from typing import TYPE_CHECKING

from bfsys.commands.arguments import local_path
from bfsys.errors import UserError, did_you_mean
from bfsys.files import is_dir
from bfsys.gpu_check.checks import CHECKS

if TYPE_CHECKING:
    from bfsys.gpu_check.findings import Finding

NOTES = f"""\
Checks: {", ".join(CHECKS)}.
Without a GPU, only the checks run that need none. To check all GPUs of a
cluster, and NCCL among its nodes, start a process for each GPU:

  srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 bfsys check-gpu
  torchrun --nproc-per-node 8 tools/check_gpu.py

Exit code 0: nothing is wrong (it may be slow); 1: something is wrong."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = NOTES
    add = parser.add_argument
    add("--only", metavar="NAME,NAME", help="run only these checks")
    add("--seconds", type=float, default=300, metavar="N", help="time for all checks (default: %(default)s)")
    add("--json", type=local_path, metavar="FILE", help="write all findings to FILE; rank N: to FILE.N")


def run(args: argparse.Namespace) -> int:
    names = args.only.split(",") if args.only is not None else list(CHECKS)
    problems = [
        f"--only: got {name!r}{did_you_mean(name, CHECKS)}; the checks are {', '.join(CHECKS)}"
        for name in names
        if name not in CHECKS
    ]
    if not (args.seconds > 0 and math.isfinite(args.seconds)):
        problems.append(f"--seconds: got {args.seconds:g}; more than 0 is needed, such as 300")
    if args.json and not is_dir(args.json.absolute().parent):
        problems.append(f"--json: the folder {args.json.absolute().parent} does not exist")
    if problems:
        raise UserError(*problems)
    from bfsys.files import replace_file
    from bfsys.gpu_check.findings import exit_code
    from bfsys.gpu_check.processes import run_checks
    from bfsys.launch.job import set_slurm_variables
    from bfsys.ranks import ranks_from_environment

    set_slurm_variables()
    ranks = ranks_from_environment()
    where = f"rank {ranks.rank} on {socket.gethostname()}" if ranks.world_size > 1 else ""

    def say(name: str, findings: list[Finding]) -> None:
        for line in rows(name, findings, where, shows_all=ranks.is_rank_zero):
            print(line, flush=True)

    names = [name for name in CHECKS if name in names]
    results = run_checks(names, args.seconds, ranks, say)
    if args.json:
        path = args.json if ranks.is_rank_zero else args.json.with_name(f"{args.json.name}.{ranks.rank}")
        content = {name: [asdict(finding) for finding in found] for name, found in results.items()}
        replace_file(path, json.dumps({"host": socket.gethostname(), "rank": ranks.rank, "checks": content}, indent=1))
    return exit_code([finding for found in results.values() for finding in found])


def rows(name: str, findings: list[Finding], where: str, *, shows_all: bool) -> list[str]:
    """Return a line for each finding and one for its advice. Without `shows_all`, leave out ok and skipped findings."""
    lines = []
    for finding in findings:
        if not shows_all and finding.verdict in ("ok", "skipped"):
            continue
        prefix = f"{where}: " if where else ""
        lines.append(f"{prefix}{name:<12} {finding.verdict:<8} {finding.what}: {finding.detail}")
        if finding.advice:
            lines.append(f"{prefix}{'':<12} {'':<8} → {finding.advice}")
    return lines

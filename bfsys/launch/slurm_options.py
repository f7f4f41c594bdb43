"""The options of a SLURM job, and the problems of the command line itself. Importing this module is quick."""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator

from bfsys.config import Config
from bfsys.errors import UserError, counted, is_printable
from bfsys.launch.elastic import MOST, parse_range
from bfsys.launch.slurm_commands import AS_OF_SBATCH
from bfsys.launch.sweep import sweep_configs

LONGEST_NAME = 250  # bytes; a file system has 255 for NAME.yaml
# The variables of sbatch that override an option of the script, if they have other names than the option.
VARIABLES_OF = {
    "time": ["TIMELIMIT"],
    "requeue": ["REQUEUE", "NO_REQUEUE"],
    "output": ["OUTPUT", "ERROR"],
    "mem": ["MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"],
    "gpus-per-node": ["GPUS_PER_NODE", "GPUS", "GPUS_PER_TASK"],
    "wckey": [],  # empty in the script, so a user's own key may stay
}
NEVER = ["ARRAY_INX", "WAIT"]  # they make an array in one run directory, and make sbatch wait for the job
# The job would inherit it, and srun would end the tasks after this time, in every start.
LIMIT_OF_STEPS = "SLURM_TIMELIMIT"


def ranks_per_node(args: argparse.Namespace) -> int:
    return args.tasks_per_node or args.gpus_per_node or 1


def option_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield the problems of the command line itself."""
    nodes = parse_range(args.nodes)
    if nodes is None:
        yield f"--nodes: got {args.nodes!r}; N or MIN-MAX is allowed, such as 8 or 4-8, from 1 to {MOST:,}, MIN first"
    elif args.grow is not None and len(nodes) == 1:
        yield f"--grow: got --nodes {args.nodes}; a job grows within a range: give --nodes MIN-MAX"
    if args.grow is not None and not (0 < args.grow < math.inf):
        yield f"--grow-every: got {args.grow:g} minutes; more than zero is needed"
    for name in ("tasks_per_node", "cpus_per_task"):
        value = getattr(args, name)
        if value is not None and value < 1:
            yield f"--{name.replace('_', '-')}: got {value}; at least 1 is needed"
    if args.gpus_per_node < 0:
        yield f"--gpus-per-node: got {args.gpus_per_node}; 0 (CPUs) or more is allowed"
    if args.gpus_per_node > 0 and args.tasks_per_node not in (None, args.gpus_per_node):
        yield (
            f"--tasks-per-node: got {args.tasks_per_node} with {counted(args.gpus_per_node, 'GPU')} on a node; "
            f"each GPU has one task: leave it out"
        )
    if parse_minutes(args.time) is None:
        yield f"--time: got {args.time!r}; minutes, HH:MM:SS or D-HH:MM:SS are allowed, more than zero"
    if args.mem and not re.fullmatch(r"\d+[KMGT]?", args.mem):
        yield f"--mem: got {args.mem!r}; a number with K, M, G or T is allowed, for example 200G; 0: all of a node's"
    for name in ("name", *AS_OF_SBATCH):
        value = getattr(args, name)
        if value is not None and not is_printable(value):
            yield f"--{name}: got {value!r}; one line of printable characters is allowed"
    if clusters := os.environ.get("SBATCH_CLUSTERS"):
        yield (
            f"SBATCH_CLUSTERS: got {clusters!r}; other commands of SLURM do not read it and would not find the job; "
            "unset it, and set SLURM_CLUSTERS or use a login node of that cluster"
        )
    for assignment in args.env:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", assignment, re.DOTALL | re.ASCII):
            yield f"--env: got {assignment!r}; NAME=VALUE is expected"
    if args.setup:
        commands = os.fsencode("\n".join(args.setup))
        # With patterns that a command of the setup may enable, since nothing is executed.
        parsed = subprocess.run(["/bin/bash", "-O", "extglob", "-n"], input=commands, capture_output=True, check=False)
        if parsed.returncode:
            yield f"--setup: bash cannot parse it: {'; '.join(parsed.stderr.decode(errors='replace').splitlines())}"


def nodes_of(args: argparse.Namespace) -> range:
    """The requested numbers of nodes."""
    nodes = parse_range(args.nodes)
    assert nodes is not None, "option_problems has checked it"
    return nodes


def minutes_of(args: argparse.Namespace) -> int:
    minutes = parse_minutes(args.time)
    assert minutes is not None, "option_problems has checked it"
    return minutes


def parse_minutes(text: str) -> int | None:
    """Parse a time limit of sbatch into whole minutes, rounded up. Returns None for other text and for zero.

    minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        return None
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) < 3:
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    else:
        hours, minutes, seconds = numbers
    if (len(numbers) > 1 and seconds > 59) or (minutes > 59 and (days is not None or len(numbers) == 3)):
        return None
    return (-(-seconds // 60) + minutes + 60 * (hours + 24 * int(days or 0))) or None


def name_problem(config: Config) -> str | None:
    """Return why a run of this name cannot be a job, or None."""
    if (size := len(os.fsencode(config.name))) > LONGEST_NAME:
        shown = f"{config.name[:40]}…"
        return f"name: {shown} has {size} bytes; at most {LONGEST_NAME} are allowed: give a shorter one with name=…"
    path = config.run_dir.absolute()
    if not is_printable(str(path)):
        return f"run directory {str(path)!r}: one line of printable characters is allowed; see name=… and runs_dir=…"
    if found := [character for character in "%\\" if character in str(path)]:
        return (
            f"run directory {path}: has a {found[0]} in its path, which SLURM replaces or removes in names of logs; "
            f"choose another with name=… or runs_dir=…"
        )
    return None


def forget_overrides(script: str) -> list[str]:
    """Remove environment variables that would override options of the script or of srun in it, and return their names.

    For sbatch, variables take precedence over the script. Variables of options that the launcher was not given, such as
    SBATCH_ACCOUNT, are set by the site or the user, and stay.
    """
    options = re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE)
    ends = [*NEVER, *(end for o in options for end in VARIABLES_OF.get(o, [o.upper().replace("-", "_")]))]
    names = sorted({LIMIT_OF_STEPS, *(f"SBATCH_{end}" for end in ends)} & set(os.environ))
    for name in names:
        del os.environ[name]
    return names


def configs_of(args: argparse.Namespace) -> tuple[list[Config], list[str]]:
    """Return the configs that can be read, and the problems of the others and of the options.

    Raises UserError with the problems if there is no config, because then nothing else can be checked.
    """
    problems = list(option_problems(args))
    if not args.dry_run and not shutil.which("sbatch"):
        problems.append(
            "sbatch: not found; run this on a login node of the cluster, or `bfsys launch` to train on this machine"
        )
    configs = sweep_configs(args.config, args.overrides, args.sweep, problems)
    problems += [problem for config in configs if (problem := name_problem(config))]
    configs = [config for config in configs if not name_problem(config)]
    if not configs:
        raise UserError(*dict.fromkeys(problems))
    return configs, problems

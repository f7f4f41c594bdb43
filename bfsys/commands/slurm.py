"""Train on a SLURM cluster: check the run, then submit it as one job with one task per GPU, or CPU tasks."""

from __future__ import annotations

import argparse

from bfsys.commands.arguments import add_config, add_sweep
from bfsys.launch.slurm_commands import AS_OF_SBATCH

NOTES = f"""\
Passed to sbatch: {", ".join(f"--{name}" for name in AS_OF_SBATCH[:4])},
  {", ".join(f"--{name}" for name in AS_OF_SBATCH[4:])}.
The job runs a copy of bfsys and of the resolved config, made now in RUN/slurm.
All nodes must see the data, runs_dir, the current folder and Python.

  %(prog)s --nodes 2 --gpus-per-node 4 --time 24:00:00 CONFIG
  %(prog)s --nodes 2-4 --grow CONFIG
  %(prog)s --nodes 1 --sweep train.seed=0,1,2 CONFIG"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "%(prog)s --nodes N [OPTION …] CONFIG [section.key=value …]\n       %(prog)s status|logs|stop RUN [OPTION …]"
    )
    parser.epilog = NOTES
    add_config(parser)
    add = parser.add_argument
    add(
        "--nodes",
        required=True,
        metavar="N",
        help="nodes; MIN-MAX: as many of them as SLURM gives and data.lanes allows",
    )
    add(
        "--grow",
        action="store_const",
        const=10.0,
        help="with MIN-MAX: requeue on more nodes when they are free, 10 minutes after a start",
    )
    add("--grow-every", dest="grow", type=float, metavar="M", help="the same, M minutes after a start")
    add("--gpus-per-node", type=int, default=8, metavar="G", help="GPUs per node (default: 8; 0: train on CPUs)")
    add("--tasks-per-node", type=int, metavar="T", help="ranks per node (default: one per GPU; 1 on CPUs)")
    add("--cpus-per-task", type=int, metavar="C", help="cores per rank (default: the cluster's)")
    add("--mem", metavar="SIZE", help="memory of a node, for example 200G (default: the cluster's)")
    add("--time", metavar="LIMIT", default="60", help="time limit of one start, [D-]HH:MM:SS or minutes (default: 60)")
    for name in AS_OF_SBATCH:
        add(f"--{name}", help=argparse.SUPPRESS)
    add("--name", help="name of the job (default: the run's)")
    add_sweep(parser)
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="environment variable of the job; repeatable")
    add("--setup", action="append", default=[], metavar="CMD", help="shell command before training; repeatable")
    add("--container", metavar="IMAGE", help=".sif file for apptainer, or other for pyxis")
    add("--follow", action="store_true", help="show rank 0's log; Ctrl-C does not stop the job")
    add("--dry-run", action="store_true", help="make all checks, print the job script, submit nothing")


def run(args: argparse.Namespace) -> int:
    from bfsys.launch.slurm_options import configs_of

    configs, problems = configs_of(args)
    from bfsys.launch.slurm import submit_runs

    return submit_runs(args, configs, problems)

"""Train as one rank: deepspeed, torchrun and srun start one process for each rank."""

from __future__ import annotations

import argparse
import os
import signal

from bfsys import console
from bfsys.commands.arguments import add_config
from bfsys.errors import UserError, exit_code_of

NOTES = """\
The same command resumes from the newest intact checkpoint of its run. Without
a launcher, one process trains. To train on all GPUs of a machine:

  bfsys launch CONFIG
  deepspeed bfsys/train.py CONFIG      (on a CPU with --num_accelerators 2)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s CONFIG [section.key=value …] [OPTION …]", NOTES
    add_config(parser)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="check config and data, print the sizes, and stop")
    add("--no-data", action="store_true", help="with --dry-run: do not open the data")
    add("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it


def run(args: argparse.Namespace) -> int:
    from bfsys.config import load_config
    from bfsys.launch.job import set_slurm_variables
    from bfsys.ranks import Ranks, ranks_from_environment

    if args.no_data and not args.dry_run:
        raise UserError("--no-data needs --dry-run")
    if not args.dry_run:
        console.go_on_without()  # a closed console must not stop training
        # Until training installs its handlers, these signals kill a rank: it has nothing to save or to remove, and it
        # may be waiting for other ranks, where Python does not react. The kernel kills no process 1, such as that of a
        # container, by a signal that has no handler.
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN and os.getpid() != 1:
                signal.signal(number, signal.SIG_DFL)
    ranks = Ranks()
    try:
        set_slurm_variables()
        ranks = ranks_from_environment()
        config = load_config(args.config, args.overrides)
    except UserError as error:  # all ranks raise it; one message per node is enough
        if ranks.local_rank:
            return error.exit_code
        raise
    if args.dry_run:
        from bfsys.dryrun import dry_run

        if ranks.is_rank_zero:
            dry_run(config, ranks.world_size, with_data=not args.no_data)
        return 0
    from bfsys.dist import hard_exit
    from bfsys.train import train_rank

    hard_exit(exit_code_of(lambda: train_rank(config, ranks)))

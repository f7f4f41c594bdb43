"""Train on this machine: one process per GPU, or several on the CPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from bfsys import console
from bfsys.commands.arguments import add_config

NOTES = """\
Ctrl-C, SIGTERM, or SIGHUP from a terminal that has gone, saves a checkpoint
and stops; the same command resumes from there. A second Ctrl-C, a few seconds
later, ends the run at once. A run that crashes or hangs is started again from
its newest intact checkpoint, unless only a person can help; RUN/ended.json
says why.

  bfsys launch --ranks 2 configs/quickstart.yaml train.steps=100"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s CONFIG [section.key=value …] [OPTION …]", NOTES
    add_config(parser)
    add = parser.add_argument
    add("--ranks", type=int, metavar="N", help="processes (default: one per GPU or core, as data.lanes allows)")
    add("--dry-run", action="store_true", help="check config and data, show the command, stop")


def run(args: argparse.Namespace) -> int:
    console.go_on_without()  # training is the work
    from bfsys.config import load_config

    config = load_config(args.config, args.overrides)
    from bfsys.launch.local import launch

    return launch(config, Path(args.config), args.overrides, args.ranks, is_dry_run=args.dry_run)

"""Compare runs: a row for each config, with mean and deviation over its seeds."""

from __future__ import annotations

import argparse
from pathlib import Path

NOTES = """\
Columns: the config keys that differ; top-1 and loss of the last evaluation, as
mean ± sample standard deviation over seeds; mean minutes of training, without
restarts. Each unfinished run has its own row.

  bfsys compare runs/small-lr=*
  bfsys compare runs"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = NOTES
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, or a folder of them")


def run(args: argparse.Namespace) -> int:
    from bfsys.compare import find_runs, rows_of, table
    from bfsys.errors import one_line

    runs, unreadable = find_runs(args.runs)
    print("\n".join([table(rows_of(runs)), *(one_line(f"not read: {problem}") for problem in unreadable)]))
    return 0

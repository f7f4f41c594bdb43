"""Show or stop the jobs of a run that were submitted by `bfsys slurm`."""

from __future__ import annotations

import argparse
from pathlib import Path

from bfsys.errors import UserError
from bfsys.files import exists, is_dir

NOTES = """\
status  state of the run and its jobs, and what to do next
logs    output of a rank
stop    save a checkpoint, and end the jobs without a requeue"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s status|logs|stop RUN [OPTION …]", NOTES
    parser.add_argument("action", choices=("status", "logs", "stop"), metavar="ACTION", help="see below")
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory, for example runs/joint")
    logs = parser.add_argument_group("options of logs")
    logs.add_argument("--rank", type=int, metavar="N", help="rank whose log is shown (default: 0)")
    logs.add_argument("--follow", "-f", action="store_true", help="show new lines until the job ends")


def run(args: argparse.Namespace) -> int:
    from bfsys.launch import jobs

    if args.action != "logs" and (args.follow or args.rank is not None):
        raise UserError(f"--rank, --follow: only logs takes these, got {args.action}")
    if not is_dir(args.run):
        raise UserError(f"{args.run}: no such directory; give a run directory (runs/NAME)")
    if not exists(jobs.slurm_folder(args.run)) and not exists(args.run / "config.yaml"):
        raise UserError(f"{args.run}: holds no run; give a run directory (runs/NAME)")
    if members := jobs.members(args.run):
        if args.action == "status":
            return jobs.show_status_of_all(members)
        raise UserError(f"{args.run}: holds the logs of a sweep; give one of its runs: {', '.join(map(str, members))}")
    if args.action == "logs":
        jobs.show_log(args.run, args.rank or 0, args.follow)
        return 0
    return jobs.show_status(args.run) if args.action == "status" else jobs.stop(args.run)

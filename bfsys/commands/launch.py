"""Train on this machine: one process per GPU, or several on the CPU."""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import suppress
from pathlib import Path

from bfsys.commands.arguments import add_config, add_sweep
from bfsys.errors import EXIT_REQUEUE, EXIT_STOPPED, UserError

NOTES = """\
Ctrl-C, SIGTERM and SIGHUP save a checkpoint and stop; the same command resumes.
A second Ctrl-C a few seconds later ends the run at once. A run that crashes or
hangs is restarted from its newest intact checkpoint, unless a restart cannot
help. RUN/ended.json holds the reason. A sweep ends with a table of its runs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s CONFIG [section.key=value …] [OPTION …]", NOTES
    add_config(parser)
    add = parser.add_argument
    add("--ranks", metavar="N", help="processes (default: one per GPU or core, as data.lanes allows); MIN-MAX: as many "
        "as possible, fewer after one was killed")  # fmt: skip
    add_sweep(parser)
    add("--at-once", type=int, metavar="N", help="runs of a sweep that train at once (default: 1)")
    add("--dry-run", action="store_true", help="check config and data, print the command, and stop")


def run(args: argparse.Namespace) -> int:
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, stop_for_a_requeue)
    try:
        return run_sweep(args) if args.sweep else run_one(args)
    except KeyboardInterrupt:  # by SIGTERM and SIGHUP, too, while there are no ranks
        print("stopped on request", file=sys.stderr)
        return EXIT_STOPPED


def stop_for_a_requeue(*_: object) -> None:
    """Handle SIGUSR1 and SIGUSR2 while there are no ranks."""
    print("stopped on request", file=sys.stderr)
    sys.exit(EXIT_REQUEUE)


def run_one(args: argparse.Namespace) -> int:
    if args.at_once is not None:
        raise UserError("--at-once: only a sweep has several runs; give --sweep KEY=A,B, or leave it out")
    from bfsys.config import load_config

    config = load_config(args.config, args.overrides)
    from bfsys.launch.local import launch, parse_ranks

    return launch(config, Path(args.config), args.overrides, parse_ranks(args.ranks), is_dry_run=args.dry_run)


def run_sweep(args: argparse.Namespace) -> int:
    from bfsys.launch.sweep import sweep_configs

    problems: list[str] = []
    at_once = 1 if args.at_once is None else args.at_once
    if at_once < 1:
        problems.append(f"--at-once: got {at_once}; at least 1 is needed")
    configs = sweep_configs(args.config, args.overrides, args.sweep, problems)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    from bfsys.compare import find_runs, rows_of, table
    from bfsys.launch.local import parse_ranks
    from bfsys.launch.local_sweep import check_sweep, state_of, train_sweep
    from bfsys.supervision.signals import EXIT_CODES

    at_once = min(at_once, len(configs))
    ranks = parse_ranks(args.ranks)
    notes = check_sweep(configs, ranks, at_once)
    if args.dry_run:
        print("\n".join([*notes, *(f"{config.run_dir}: {state_of(config)}" for config in configs)]))
        return 0
    code = train_sweep(configs, ranks, at_once)
    if code in EXIT_CODES.values():  # stopped by a signal
        return code
    with suppress(UserError):  # no run was evaluated; the lines above give the reason
        runs, _ = find_runs([config.run_dir for config in configs])
        print(table(rows_of(runs)))
    return code

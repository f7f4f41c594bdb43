"""Train and evaluate a model on a folder of files."""

from __future__ import annotations

import argparse
import math
import os
import re
import time
from importlib.util import find_spec
from pathlib import Path

from bfsys.commands.arguments import local_path
from bfsys.errors import UserError
from bfsys.files import exists, is_dir, is_file

NOTES = """\
FOLDER holds a folder of files per class, or split folders (train, val) with
such folders. It may also be a list of files (bfsys pack --from filelist) or a
packed dataset. The command chooses encoding, model and steps for this machine
and the time, and writes them with reasons to RUNS/NAME.yaml. It packs, trains,
evaluates on held-out files, and compares with simple baselines. Compressed
files, large pictures and long sounds of a folder or list are re-encoded
(docs/fit.md). The same command resumes after a stop."""
LONGEST_MINUTES = 60 * 24 * 30
NEEDED = {"deepspeed": "deepspeed", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}  # packages by module


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s FOLDER [OPTION …]", NOTES
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=local_path, help="files by class")
    add("--name", help="name of the run (default: the folder's)")
    add("--minutes", type=float, default=10.0, metavar="M", help="time for the whole command (default 10)")
    add("--as-stored", action="store_true", help="do not re-encode files")
    add("--skip-bad", action="store_true", help="leave out files that cannot be used")
    add("--runs", type=local_path, default=Path("runs"), metavar="DIR", help="folder of runs (default runs)")
    add("--shards", type=local_path, default=Path("data/shards"), metavar="DIR",
        help="folder of packed data (default data/shards)")  # fmt: skip


def is_writable(folder: Path) -> bool:
    """Whether files can be written to a folder, which may not exist yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if exists(path))
    return is_dir(there) and os.access(there, os.W_OK | os.X_OK)


def run(args: argparse.Namespace) -> int:
    began_s = time.monotonic()
    problems = []
    if not (0 < args.minutes <= LONGEST_MINUTES and math.isfinite(args.minutes)):
        problems.append(f"--minutes: got {args.minutes:g}; more than 0 and at most {LONGEST_MINUTES:,} are allowed")
    if args.name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", args.name):
        problems.append(f"--name: got {args.name!r}; letters, digits, _ - . are allowed")
    if not exists(args.folder):
        problems.append(f"{args.folder}: there is no such file or folder")
    elif not (is_dir(args.folder) or is_file(args.folder)):
        problems.append(f"{args.folder}: is a pipe or a device, and fit reads a list repeatedly; write it to a file")
    is_packed = exists(args.folder / "dataset.json")
    for option, folder in [("--runs", args.runs)] + ([] if is_packed else [("--shards", args.shards)]):
        if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(args.folder)):
            problems.append(
                f"{option} {folder}: lies in {args.folder}, so its files would become training data; give "
                f"another {option}"
            )
        elif not is_writable(folder):
            problems.append(f"{option} {folder}: cannot be written")
    missing = [name for module, name in NEEDED.items() if find_spec(module) is None]
    if missing:
        problems.append(f"bfsys fit needs {', '.join(missing)}: pip install 'bfsys[train,fit]', or '.[train,fit]'")
    if problems:
        raise UserError(*problems)
    from bfsys.fitting.fit import next_commands, prepare, train
    from bfsys.fitting.report import report
    from bfsys.fitting.request import Request, name_for
    from bfsys.supervision.signals import EXIT_CODES

    request = Request(
        folder=args.folder,
        name=args.name or name_for(args.folder),
        minutes=args.minutes,
        as_stored=args.as_stored,
        skip_bad=args.skip_bad,
        shards=args.shards,
        runs=args.runs,
    )
    config = prepare(request, began_s)
    code = config if isinstance(config, int) else train(request, config)
    if isinstance(config, int) or code:
        if code in EXIT_CODES.values():
            print("training was stopped; the same command resumes")
        else:
            print(f"training failed with exit code {code}, see above")
        return code
    print("\n".join(["", *report(request.run_dir)]))
    print(f"\ntook {(time.monotonic() - began_s) / 60:.1f} minutes; try next:")
    print("\n".join(f"  {line}" for line in next_commands(request, config)))
    return 0

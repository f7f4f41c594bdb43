"""List, show, verify and prune the checkpoints of a run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from bfsys import console
from bfsys.checkpoint.files import (
    MANIFEST,
    RetentionPolicy,
    all_checkpoints,
    evaluations,
    problems_of,
    read_manifest,
    remove,
    step_of,
    to_prune,
)
from bfsys.errors import UserError

MB = 1e6
NOTES = """\
list    step, time, size, score, whether all files are there
verify  read every byte of every checkpoint; exit code 1 if one is damaged
show    what the newest one (or RUN/checkpoints/step_…) holds
prune   remove intact ones that are not to be kept, by --keep and the like"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s list|verify|show|prune RUN [OPTION …]", NOTES
    parser.add_argument("action", choices=("list", "verify", "show", "prune"), metavar="ACTION", help="see below")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory (runs/NAME) or a checkpoint of it")
    prune = parser.add_argument_group("options of prune")
    prune.add_argument("--keep", type=int, metavar="N", help="newest ones (default: the run's own)")
    prune.add_argument("--keep-every", type=int, metavar="STEPS", help="(default: the run's own)")
    prune.add_argument("--keep-best", type=int, metavar="N", help="(default: the run's own)")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def run(args: argparse.Namespace) -> int:
    of_prune = {"--keep": args.keep, "--keep-every": args.keep_every, "--keep-best": args.keep_best}
    given = [name for name, value in of_prune.items() if value is not None] + ["--dry-run"] * args.dry_run
    if args.action != "prune" and given:
        raise UserError(f"{', '.join(given)}: only prune takes this, got {args.action}")
    actions = {"list": show_list, "verify": verify, "show": show, "prune": remove_others}
    return actions[args.action](args)


def paths_of(run: Path) -> list[Path]:
    """The checkpoints of a run directory, or this one checkpoint; raises UserError if there is none."""
    if (run / MANIFEST).exists() or (run.name.startswith("step_") and run.is_dir()):
        return [run]
    paths = all_checkpoints(run)
    if not paths:
        known = "holds no checkpoint" if run.is_dir() else "no such directory"
        raise UserError(f"{run}: {known}; give a run directory (runs/NAME) or one of its checkpoints")
    return paths


def show_list(args: argparse.Namespace) -> int:
    paths = paths_of(args.run)
    scores = evaluations(args.run)
    print("      step  saved                    MB  evaluated")
    for path in paths:
        try:
            manifest = read_manifest(path)
        except UserError as error:
            print(f"{step_of(path):>10}  damaged: {error}")
            continue
        missing = [name for name in manifest["files"] if not (path / name).exists()]
        saved = time.strftime("%F %T", time.localtime((path / MANIFEST).stat().st_mtime))
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        score = scores.get(step_of(path))
        told = f"loss {score['loss']:.4f}  top-1 {100 * score['top1']:.2f} %" if score else ""
        told += f"  damaged: {', '.join(missing)} missing" if missing else ""
        print(f"{step_of(path):>10}  {saved}  {size / MB:>8,.1f}  {told}".rstrip())
    return 0


def verify(args: argparse.Namespace) -> int:
    damaged = 0
    for path in paths_of(args.run):
        problems = problems_of(path)
        damaged += bool(problems)
        print(f"{path}: {'damaged' if problems else 'whole'}")
        for problem in problems:
            print(f"  {problem}", file=sys.stderr)
    return int(damaged > 0)


def show(args: argparse.Namespace) -> int:
    path = paths_of(args.run)[-1]
    manifest = read_manifest(path)
    files = manifest["files"]
    print(f"{path}")
    print(f"step      {manifest['step']}, {manifest.get('updates', manifest['step'])} of which changed the weights")
    print(f"versions  {', '.join(f'{name} {value}' for name, value in manifest['versions'].items() if value)}")
    print(f"classes   {len(manifest['classes'])}: {', '.join(manifest['classes'][:8])}"
          f"{', …' if len(manifest['classes']) > 8 else ''}")  # fmt: skip
    for state in sorted({name.partition("-")[0] for name in files if name.endswith(".safetensors")}):
        parts = [entry["bytes"] for name, entry in files.items() if name.startswith(f"{state}-")]
        print(f"state     {state}: {sum(parts) / MB:,.1f} MB in {len(parts)} files")
    print(f"config    {json.dumps(manifest['config'])}")
    return 0


def remove_others(args: argparse.Namespace) -> int:
    train = read_manifest(paths_of(args.run)[-1])["config"]["train"]
    keep = RetentionPolicy(
        last=train["keep_checkpoints"] if args.keep is None else args.keep,
        every=train.get("keep_every", 0) if args.keep_every is None else args.keep_every,
        best=train.get("keep_best", 0) if args.keep_best is None else args.keep_best,
        metric=train.get("best_metric", "top1"),
    )
    if keep.last < 1 or keep.every < 0 or keep.best < 0:
        raise UserError("--keep must be at least 1, --keep-every and --keep-best at least 0")
    if (args.run / MANIFEST).exists():
        raise UserError(f"{args.run}: a checkpoint; give its run directory (runs/NAME)")
    whole = []
    for path in paths_of(args.run):
        if problems_of(path):
            print(f"damaged, left alone: {path}")
        else:
            whole.append(path)
    console.go_on_without()  # removing is the work: a reader that ends, as in `… | head`, does not end it
    for path in to_prune(args.run, whole, keep):
        if not args.dry_run:
            try:
                remove(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be removed: {error.strerror}") from None
        print(f"{'would be removed' if args.dry_run else 'removed'}: {path}")
    return 0

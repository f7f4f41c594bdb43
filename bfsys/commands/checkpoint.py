"""List, show, verify, copy and prune the checkpoints of a run."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bfsys import console
from bfsys.checkpoint.files import (
    MANIFEST,
    METRICS,
    NAME,
    Damaged,
    Unusable,
    all_checkpoints,
    checkpoint_name,
    checkpoints_dir,
    find_whole,
    new_work_dir,
    newest_manifest,
    no_checkpoint,
    problems_of,
    read_manifest,
    remove,
    step_of_name,
    take_over,
)
from bfsys.checkpoint.retention import RetentionPolicy, evaluations, evaluations_in, to_prune
from bfsys.checkpoint.store import Store
from bfsys.errors import EXIT_USER_ERROR, UserError, counted, one_line, os_errors_as, some
from bfsys.files import exists, is_dir
from bfsys.locations import URL, without_secrets
from bfsys.object_stores import as_url

MB = 1e6
PAUSES_S = (1.0, 4.0)  # before a store is retried; short, because a user waits for the result
NOTES = """\
list    show step, time, size, score, and whether all files are present
verify  read every byte; exit code 1: damaged, 2: another format, or renamed
show    show the newest checkpoint (or the one at RUN/checkpoints/step_…)
copy    copy the newest intact checkpoint to TO; either RUN or TO is a URL
prune   remove the intact checkpoints that no --keep option keeps
RUN may be a URL, such as s3://bucket/folder/NAME, except for prune."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = ("list", "verify", "show", "copy", "prune")
    parser.usage, parser.epilog = f"%(prog)s {'|'.join(actions)} RUN [TO] [OPTION …]", NOTES
    parser.add_argument("action", choices=actions, metavar="ACTION", help="see below")
    parser.add_argument("run", type=_location, metavar="RUN", help="run directory, a checkpoint of it, or a URL")
    parser.add_argument("to", type=_location, nargs="?", metavar="TO", help="target of copy: run directory or URL")
    prune = parser.add_argument_group("options of prune")
    prune.add_argument("--keep", type=int, metavar="N", help="newest checkpoints to keep (default: the run's)")
    prune.add_argument(
        "--keep-every", type=int, metavar="STEPS", help="keep one every STEPS steps (default: the run's)"
    )
    prune.add_argument("--keep-best", type=int, metavar="N", help="best checkpoints to keep (default: the run's)")
    prune.add_argument("--dry-run", action="store_true", help="only list what would be removed")


def _location(text: str) -> Path | str:
    """Return the argument as it is if it is a URL, else as a path."""
    return text if URL.match(text) else Path(text)


def run(args: argparse.Namespace) -> int:
    of_prune = {"--keep": args.keep, "--keep-every": args.keep_every, "--keep-best": args.keep_best}
    given = [name for name, value in of_prune.items() if value is not None] + ["--dry-run"] * args.dry_run
    if args.action != "prune" and given:
        raise UserError(f"{', '.join(given)}: only prune takes this, got {args.action}")
    if (args.action == "copy") != (args.to is not None):
        raise UserError(f"{args.action}: {'needs RUN and TO' if args.to is None else f'takes no TO, got {args.to}'}")
    for given in (args.run, args.to):
        if isinstance(given, Path) and not exists(given) and (url := as_url(str(given))):
            raise UserError(f"{given}: two slashes follow the colon in a URL: {url}")
    actions = {"list": show_list, "verify": verify, "show": show, "copy": copy, "prune": remove_others}
    return actions[args.action](args)


@dataclass(frozen=True)
class OnDisk:
    """A checkpoint in a run directory."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def manifest(self) -> dict:
        return read_manifest(self.path)

    def sizes(self) -> dict[str, int]:
        """Sizes in bytes of the existing files, by name."""
        sizes = {}
        for entry in os.scandir(self.path):
            with suppress(FileNotFoundError):  # a link without a target counts as missing
                sizes[entry.name] = entry.stat().st_size
        return sizes

    def saved_at(self) -> float:
        return (self.path / MANIFEST).stat().st_mtime

    def problems(self) -> list[str]:
        return problems_of(self.path)


@dataclass(frozen=True)
class InStore:
    """A copy of a checkpoint in an object store; it has the methods of `OnDisk`."""

    store: Store
    name: str

    def __str__(self) -> str:
        return f"{self.store.url}/{self.name}"

    def manifest(self) -> dict:
        return self.store.manifest_or_error(self.name)

    def sizes(self) -> dict[str, int]:
        return self.store.sizes(self.name)

    def saved_at(self) -> float:
        return self.store.saved_at(self.name)

    def problems(self) -> list[str]:
        return self.store.problems_of(self.name)


def store_at(url: str) -> Store:
    return Store(url, pauses_s=PAUSES_S, say=lambda text: print(one_line(text), file=sys.stderr, flush=True))


def checkpoints_of(run: Path | str) -> Sequence[OnDisk] | Sequence[InStore]:
    """Return the checkpoints of a run, or the given checkpoint. Raises UserError if there is none."""
    if isinstance(run, Path):
        return [OnDisk(path) for path in paths_of(run)]
    address, _, name = run.rstrip("/").rpartition("/checkpoints/")
    if address and NAME.fullmatch(name):
        return [InStore(store_at(address), name)]
    store = store_at(run)
    names = store.names()
    if not names:
        known = "holds no checkpoint, or its bucket does not exist"
        raise UserError(f"{run}: {known}; give the URL of a run (URL/NAME) or of one of its checkpoints")
    return [InStore(store, name) for name in names]


def paths_of(run: Path) -> list[Path]:
    """Return the checkpoints of a run directory, or the given checkpoint. Raises UserError if there is none."""
    if exists(run / MANIFEST) or (run.name.startswith("step_") and is_dir(run)):
        return [run]
    paths = all_checkpoints(run)
    if not paths:
        raise UserError(no_checkpoint(run))
    return paths


def scores_of(checkpoints: Sequence[OnDisk] | Sequence[InStore], run: Path | str) -> dict[int, dict]:
    """Return the scores of a run's evaluations, by step. A store has only those before its newest checkpoint."""
    if isinstance(run, Path):
        return evaluations(run)
    for checkpoint in reversed(checkpoints):
        if isinstance(checkpoint, InStore) and checkpoint.sizes().keys() >= {METRICS, MANIFEST}:
            metrics = checkpoint.store.read_file(checkpoint.name, METRICS) or b""
            return evaluations_in(metrics.split(b"\n"))
    return {}


def show_list(args: argparse.Namespace) -> int:
    checkpoints = checkpoints_of(args.run)
    scores = scores_of(checkpoints, args.run)
    print("      step  saved                    MB  evaluated")
    for checkpoint in checkpoints:
        step = step_of_name(checkpoint.name)
        try:
            manifest = checkpoint.manifest()
        except Damaged as error:
            print(one_line(f"{step:>10}  damaged: {'; '.join(error.problems)}"))
            continue
        except Unusable as error:
            print(one_line(f"{step:>10}  not read: {error}"))
            continue
        there = checkpoint.sizes()
        wrong = [f"{name} missing" for name in manifest["files"] if name not in there]
        wrong += [
            f"{name} has {there[name]:,} of {entry['bytes']:,} bytes"
            for name, entry in manifest["files"].items()
            if there.get(name, entry["bytes"]) != entry["bytes"]
        ]
        saved = time.strftime("%F %T", time.localtime(checkpoint.saved_at()))
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        score = scores.get(step)
        told = f"loss {score['loss']:.4f}  top-1 {100 * score['top1']:.2f} %" if score else ""
        told += f"  damaged: {', '.join(wrong)}" if wrong else ""
        print(f"{step:>10}  {saved}  {size / MB:>8,.1f}  {told}".rstrip())
    return 0


def verify(args: argparse.Namespace) -> int:
    console.go_on_without()  # after `… | head`, code 0 would mean that all are intact
    damaged = not_read = 0
    for checkpoint in checkpoints_of(args.run):
        try:
            problems = checkpoint.problems()
        except Unusable as error:
            not_read += 1
            print(one_line(f"not verified: {error}"))
            continue
        if problems and isinstance(checkpoint, OnDisk) and not exists(checkpoint.path):
            print(one_line(f"{checkpoint}: removed by the run in the meantime"))
            continue
        damaged += bool(problems)
        print(one_line(f"{checkpoint}: {'damaged' if problems else 'intact'}"))
        for problem in problems:
            print(one_line(f"  {problem}"), file=sys.stderr)
    if damaged:
        return 1
    return EXIT_USER_ERROR if not_read else 0


def newest_with_manifest(checkpoints: Sequence[OnDisk | InStore]) -> tuple[OnDisk | InStore, dict]:
    """The newest checkpoint whose manifest can be read, and the manifest. Raises UserError if there is none."""
    problems: list[str] = []
    for checkpoint in reversed(checkpoints):
        try:
            manifest = checkpoint.manifest()
        except Damaged as error:
            problems += error.problems
            continue
        for problem in problems:
            print(one_line(f"skipped a damaged checkpoint: {problem}"), file=sys.stderr)
        return checkpoint, manifest
    raise UserError(*problems)


def show(args: argparse.Namespace) -> int:
    checkpoint, manifest = newest_with_manifest(checkpoints_of(args.run))
    files = manifest["files"]
    print(one_line(str(checkpoint)))
    print(f"step      {manifest['step']}, {manifest.get('updates', manifest['step'])} of which changed the weights")
    print(f"versions  {', '.join(f'{name} {value}' for name, value in manifest['versions'].items() if value)}")
    print(f"classes   {len(manifest['classes'])}: {some(manifest['classes'], 8)}")
    for state in sorted({name.partition("-")[0] for name in files if name.endswith(".safetensors")}):
        parts = [entry["bytes"] for name, entry in files.items() if name.startswith(f"{state}-")]
        print(f"state     {state}: {sum(parts) / MB:,.1f} MB in {counted(len(parts), 'file')}")
    print(f"config    {json.dumps(without_secrets(manifest['config']))}")
    return 0


def copy(args: argparse.Namespace) -> int:
    """Copy a checkpoint from a run directory to a store, or from a store to a run directory."""
    if isinstance(args.run, Path) == isinstance(args.to, Path):
        what = "between folders, `cp -r` copies" if isinstance(args.run, Path) else "first copy to a folder"
        raise UserError(f"copy: one of RUN and TO must be a URL, got {args.run} and {args.to}; {what}")
    if isinstance(args.run, Path):
        path = find_whole(args.run)
        store = store_at(args.to)
        manifest = read_manifest(path)
        copied = InStore(store, checkpoint_name(manifest["step"]))  # the folder may have another name
        if store.has_manifest(copied.name) and copied.problems():
            store.disown(copied.name)
        store.put(path, manifest)
        print(one_line(f"copied {path} to {copied}"))
        return 0
    from bfsys.run_dir import hold_directory  # imports torch

    checkpoints = checkpoints_of(args.run)
    args.to.mkdir(parents=True, exist_ok=True)
    with hold_directory(args.to):  # a training in this directory may be saving
        for checkpoint in reversed(checkpoints):
            assert isinstance(checkpoint, InStore)  # the address is a URL
            problems = fetch(checkpoint, args.to)
            if not problems:
                print(one_line(f"copied {checkpoint} to {checkpoints_dir(args.to) / checkpoint.name}"))
                return 0
            for problem in problems:
                print(one_line(f"skipped a damaged copy: {problem}"), file=sys.stderr)
    raise UserError(f"{args.run}: no copy is intact")


def fetch(checkpoint: InStore, run_dir: Path) -> list[str]:
    """Fetch a checkpoint into a run directory. Returns its damage. Raises UserError if the directory has it intact."""
    final = checkpoints_dir(run_dir) / checkpoint.name
    if exists(final) and not problems_of(final):
        raise UserError(f"{final}: this checkpoint exists and is intact; give another folder")
    try:
        manifest = checkpoint.manifest()
    except Damaged as error:
        return list(error.problems)
    work = new_work_dir(final)
    try:
        problems = checkpoint.store.fetch(checkpoint.name, manifest, work)
        if not problems:
            take_over(work, final)
        return problems
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_others(args: argparse.Namespace) -> int:
    if not isinstance(args.run, Path):
        raise UserError(
            f"{args.run}: prune takes a run directory; in a store, only training removes checkpoints, by the run's "
            f"retention settings"
        )
    paths = paths_of(args.run)
    manifest = newest_manifest(paths) or read_manifest(paths[-1])  # raises, since no manifest can be read
    train = manifest["config"]["train"]
    keep = RetentionPolicy(
        last=train["keep_checkpoints"] if args.keep is None else args.keep,
        every=train.get("keep_every", 0) if args.keep_every is None else args.keep_every,
        best=train.get("keep_best", 0) if args.keep_best is None else args.keep_best,
        metric=train.get("best_metric", "top1"),
    )
    if keep.last < 1 or keep.every < 0 or keep.best < 0:
        raise UserError("--keep must be at least 1, --keep-every and --keep-best at least 0")
    if exists(args.run / MANIFEST):
        raise UserError(f"{args.run}: a checkpoint; give its run directory (runs/NAME)")
    whole = []
    for path in paths:
        problems = problems_of(path)
        if not exists(path):  # the run has removed it in the meantime
            continue
        if problems:
            print(one_line(f"damaged, not removed: {path}"))
        else:
            whole.append(path)
    console.go_on_without()  # a reader that ends, as in `… | head`, must not stop the removal
    for path in to_prune(args.run, whole, keep):
        if not args.dry_run:
            with os_errors_as(f"{path}: cannot be removed"):
                remove(path)
        print(one_line(f"{'would be removed' if args.dry_run else 'removed'}: {path}"))
    return 0

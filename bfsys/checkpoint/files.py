"""Checkpoints on disk: what counts as a checkpoint, and which one is the newest. retention.py decides which are kept.

    RUN/checkpoints/
      latest                   the name of the newest checkpoint; launchers measure progress by it. A resume takes the
                               newest intact one
      step_00001000/
        manifest.json          step, classes, config, plan, versions, the sha256 of every file and its own; written last
        weight-0-of-2.safetensors, ema-…, exp_avg-…, exp_avg_sq-…
        metrics.jsonl, quarantine.tsv, rollbacks.json    the run's history until this step

Each rank writes the part of every tensor that it holds. An entry with a parameter's name holds the whole parameter, and
NAME[first:end] holds a piece of its elements in order. A save therefore sends nothing between ranks, and any number of
ranks can load a checkpoint at any ZeRO stage. A directory without a manifest, or with a file that does not match the
manifest, is not a checkpoint.

Everything else that decides the rest of a run is a function of the step: data order, augmentation, learning rate and
decay of the average. Training draws from no random generator with a state, so no such state is saved.

Rejected alternatives: DeepSpeed's own format, which depends on world size and stage, and is neither atomic nor hashed;
torch.save, which loads a file with a flipped byte without an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from bfsys.errors import DENIED_ERRNOS, EXIT_CRASHED, EXIT_STORAGE, MISSING_ERRNOS, UserError, os_errors_as
from bfsys.files import (
    describe,
    exists,
    is_dir,
    is_named,
    read_regular,
    replace_by_copy,
    replace_file,
    sync_folder,
    try_lock,
)
from bfsys.object_stores import as_url

T = TypeVar("T")

FORMAT = 2
MANIFEST = "manifest.json"
EXPORTED = "model.json"  # in what bfsys export writes
METRICS = "metrics.jsonl"
UNFINISHED = ".unfinished"  # in a folder that a command is filling
# Prefix of the names of parameters that only training uses (model/content_head.py)
CONTENT_HEAD = "content_head."
LATEST = "latest"
PAUSES_S = (1.0, 4.0, 10.0)  # before each retry of a read
READERS = 16  # threads that read a checkpoint; they release the GIL while they hash and while they wait for a server
NAME = re.compile(r"step_(\d{8,})")
REMOVED = ".removed"  # suffix of a directory that was a checkpoint and is being deleted


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Directories with a checkpoint's name, intact or not, the oldest first.

    Raises Unreachable or OSError if they cannot be listed. `Path.glob` would return none, and the run would start over.
    """
    root = checkpoints_dir(run_dir)
    try:
        return with_retries(_named_as_checkpoints, root)
    except (FileNotFoundError, NotADirectoryError):
        if root.is_symlink():  # the disk with the checkpoints may not be mounted
            raise _dangling(root) from None
        if os.path.lexists(root):
            raise UserError(f"{root}: is not a folder; move it away", exit_code=EXIT_STORAGE) from None
        return []


def _named_as_checkpoints(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        named = sorted((e for e in entries if NAME.fullmatch(e.name)), key=lambda entry: step_of_name(entry.name))
    if named and named[-1].is_symlink() and not os.path.exists(named[-1].path):
        raise _dangling(root / named[-1].name)
    return [root / entry.name for entry in named if entry.is_dir()]


def _dangling(link: Path) -> Unreachable:
    """The error for a link whose target is missing, perhaps because the disk is not mounted."""
    return Unreachable(f"{link}: links to {os.readlink(link)}, which does not exist", exit_code=EXIT_CRASHED)


def step_of_name(name: str) -> int:
    return int(name.removeprefix("step_"))


def step_of(path: Path) -> int:
    return step_of_name(path.name)


def piece_name(parameter: str, first: int, end: int) -> str:
    """The name of the piece with elements [first, end) of a parameter."""
    return f"{parameter}[{first}:{end}]"


def parse_piece(name: str) -> tuple[str, int | None, int | None]:
    """(parameter, first element, end) of a tensor's name; both numbers are None for a whole parameter."""
    match = re.fullmatch(r"(.+)\[(\d+):(\d+)\]", name)
    return (match[1], int(match[2]), int(match[3])) if match else (name, None, None)


def cover(pieces: Iterable[str], shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether tensors of these names hold every element of every parameter exactly once."""
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in shapes}
    for piece in pieces:
        name, first, end = parse_piece(piece)
        if name not in spans:
            return False
        spans[name].append((first or 0, math.prod(shapes[name]) if end is None else end))
    for name, shape in shapes.items():
        covered = 0
        for first, end in sorted(spans[name]):
            if first != covered:
                return False
            covered = end
        if covered != math.prod(shape):
            return False
    return True


def new_work_dir(final: Path) -> Path:
    """Make an empty directory for the files of the checkpoint `final`, and remove those that killed saves left behind.
    Its name is unique, so a writer that survives from an earlier start cannot write there."""
    for left_over in (*final.parent.glob(".step_*.part"), *final.parent.glob(f".step_*{REMOVED}")):
        remove_folder(left_over)
    work = final.with_name(f".{final.name}.{os.getpid()}-{time.time_ns()}.part")
    work.mkdir(parents=True)
    return work


def commit(work: Path, final: Path, facts: dict, files: Mapping[str, dict]) -> None:
    """Write the manifest, rename the directory, and point `latest` at it.

    `files` holds the result of `describe` by file name. Earlier checkpoints are not changed before the rename.
    """
    manifest = {"format": FORMAT, **facts, "files": dict(sorted(files.items()))}
    manifest["sha256"] = fingerprint(manifest)
    replace_file(work / MANIFEST, json.dumps(manifest, indent=1))  # also flushes the names of all other files
    name_checkpoint(work, final)


def name_checkpoint(work: Path, final: Path) -> None:
    """Rename a complete, flushed checkpoint to its final name, and point `latest` at it."""
    root = final.parent
    if os.path.lexists(final):  # a damaged checkpoint of this step, or one from before a roll-back to an earlier step
        remove(final)
    os.rename(work, final)
    sync_folder(root)
    replace_file(root / LATEST, final.name + "\n")


def take_over(work: Path, final: Path) -> None:
    """Move a fetched checkpoint to its final name in a run directory; a damaged one of that name is moved aside.

    Besides tensors, a checkpoint holds files of the run directory. They only grow, so the longer version is kept.
    """
    for name in read_manifest(work)["files"]:
        live = final.parent.parent / name
        size_bytes = live.stat().st_size if exists(live) else -1
        if not name.endswith(".safetensors") and size_bytes < (work / name).stat().st_size:
            replace_by_copy(live, work / name)
    if exists(final):
        move_aside(final)
    name_checkpoint(work, final)


def remove(path: Path) -> None:
    """Remove a checkpoint. If the process is killed meanwhile, the rest does not count as a checkpoint."""
    remove_folder(retire(path))


def remove_folder(path: Path) -> None:
    """Remove a folder as far as possible: a network file system may refuse to delete an open file. Of a link to a
    folder, only the link is removed, because the target belongs to the user."""
    if path.is_symlink():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def retire(path: Path) -> Path:
    """Rename a checkpoint, so that it no longer counts. Returns its new path, which the caller should remove; otherwise
    the next save does."""
    # The name is unique, since a network file system may refuse to delete an earlier one.
    going = path.with_name(f".{path.name}.{os.getpid()}-{time.time_ns()}{REMOVED}")
    with suppress(FileNotFoundError):  # `bfsys checkpoint prune` and a run may both remove it
        os.rename(path, going)
    return going


def move_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is no longer used but can still be inspected."""
    aside = path.with_name(f"damaged_{path.name}")
    remove_folder(aside)
    if os.path.lexists(aside):
        aside = aside.with_name(f"{aside.name}-{time.time_ns()}")
    os.rename(path, aside)
    point_to_newest(path.parent)
    return aside


def point_to_newest(root: Path) -> None:
    """Point `latest` at the newest checkpoint in a folder, after some checkpoints were removed."""
    paths = all_checkpoints(root.parent)
    if paths:
        replace_file(root / LATEST, paths[-1].name + "\n")
    else:
        (root / LATEST).unlink(missing_ok=True)


def find_newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint of a run, or None, and the problems of newer ones. Reads every byte."""
    while True:
        problems: list[str] = []
        has_vanished = False
        for path in reversed(all_checkpoints(run_dir)):
            found = problems_of(path)
            if not found:
                return path, problems
            if exists(path):
                problems.extend(found)
            else:  # training has pruned it meanwhile, after a newer one was saved
                has_vanished = True
        if not has_vanished:
            return None, problems


def problem_of_place(run: Path) -> str:
    """The problem of a run directory that is given as a URL; "" if it is not a URL."""
    url = as_url(str(run))
    if not url:
        return ""
    return f"{url}: a URL; first copy it: bfsys checkpoint copy {shlex.quote(url)} {shlex.quote(run.name)}"


def find_whole(run: Path) -> Path:
    """The newest intact checkpoint of a run directory, or `run` itself if it is a checkpoint.

    Damaged newer checkpoints are reported on standard error. Raises UserError if there is no intact checkpoint.
    """
    if not is_dir(run):
        raise UserError(problem_of_place(run) or no_checkpoint(run))
    path: Path | None
    if exists(run / MANIFEST):
        path, problems = run, problems_of(run)
    else:
        path, problems = find_newest(run)
    for problem in problems if path != run else ():
        print(f"skipped a damaged checkpoint: {problem}", file=sys.stderr)
    if path is None or (path == run and problems):
        raise UserError(*problems or [no_checkpoint(run)])
    return path


def no_checkpoint(run: Path) -> str:
    """The problem of a path in which there is no checkpoint."""
    if not is_dir(run):
        what = "a file" if exists(run) else "no such directory"
        return f"{run}: {what}; give a run directory (runs/NAME) or one of its checkpoints"
    if exists(run / EXPORTED):
        return f"{run}: is an export; give the run from which it was exported"
    runs = sorted(folder.parent for folder in run.glob("*/checkpoints"))
    remedy = f"give a run in it, for example {runs[0]}" if runs else "is it a run directory (runs/NAME)?"
    return f"{run}: holds no checkpoint; {remedy}"


def problems_of(path: Path) -> list[str]:
    """The problems of a checkpoint; none if every file exists and has its sha256."""
    manifest, problems = manifest_or_problems(path)

    def problem_of(item: tuple[str, dict]) -> str:
        name, entry = item
        try:
            return "" if with_retries(describe, path / name) == entry else checksum_mismatch(path / name)
        except OSError as error:
            return f"{path / name}: {error.strerror}"

    if manifest:
        with ThreadPoolExecutor(READERS) as readers:
            problems += filter(None, readers.map(problem_of, manifest["files"].items()))
    return problems


def checksum_mismatch(file: Path) -> str:
    return f"{file}: checksum mismatch, the file is corrupt"


class Damaged(UserError):
    """A checkpoint or a copy of one is damaged or incomplete."""


class Unusable(UserError):
    """A checkpoint or a copy of one is written in a format that this version does not read, or was renamed."""


class Unreachable(UserError):
    """A file cannot be read, but for a reason that is outside it, so it is unknown whether the file is intact."""


def with_retries(read: Callable[[Path], T], path: Path) -> T:
    """The result of `read(path)`, with retries. Raises OSError at once if the file is missing, or is no regular file;
    Unreachable if access is denied, or if any other error persists."""
    pauses_s = iter(PAUSES_S)
    while True:
        try:
            return read(path)
        except OSError as error:
            if error.errno in MISSING_ERRNOS:
                raise
            if error.errno in DENIED_ERRNOS:
                raise Unreachable(
                    f"{path}: cannot be read: {error.strerror}; it is not known whether it is intact"
                ) from None
            pause_s = next(pauses_s, None)
            if pause_s is None:
                text = f"{path}: cannot be read at the moment: {error.strerror}; start again when its server is back"
                if NAME.fullmatch(path.parent.name):
                    text += (
                        f". If the disk is broken, remove {path.parent}; a start then resumes from the one before it"
                    )
                raise Unreachable(text, exit_code=EXIT_CRASHED) from None
        time.sleep(pause_s)


def manifest_or_problems(path: Path) -> tuple[dict | None, list[str]]:
    """The manifest of a checkpoint, or None and its problems. Raises Unreachable if the file cannot be read now."""
    try:
        return read_manifest(path), []
    except Damaged as error:
        return None, list(error.problems)


def newest_manifest(paths: Sequence[Path]) -> dict | None:
    """The manifest of the last of these checkpoints that has an intact one, whether or not its files are intact."""
    return next(filter(None, (manifest_or_problems(path)[0] for path in reversed(paths))), None)


def read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint. Raises Damaged if it is missing or damaged."""
    try:
        text = with_retries(read_regular, path / MANIFEST)
    except OSError as error:
        raise Damaged(f"{path}: not a checkpoint, {MANIFEST}: {error.strerror}") from None
    return parse_manifest(text, str(path))


def parse_manifest(text: bytes, path: str) -> dict:
    """Parse the manifest of the checkpoint at `path`. Raises Damaged on a checksum mismatch, and Unusable."""
    try:
        manifest = json.loads(text)
        intact = manifest.pop("sha256") == fingerprint(manifest)
        number = manifest["format"]
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise Damaged(f"{path}/{MANIFEST}: checksum mismatch, the file is corrupt")
    if number != FORMAT:
        raise Unusable(
            f"{path}: has format {number!r}, and this version of bfsys reads {FORMAT}; use the version that saved it"
        )
    name, saved_as = path.rpartition("/")[2], checkpoint_name(manifest["step"])
    if NAME.fullmatch(name) and name != saved_as:  # resumes and retention choose checkpoints by their names
        what = f"holds the checkpoint of step {manifest['step']}, so it was renamed"
        raise Unusable(f"{path}: {what}; rename it to {saved_as}, or move it to another folder")
    return manifest


def fingerprint(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Make a folder, unless it is empty, to be filled in this context. After an exception it is empty again; if the
    process is killed, the next call empties it. Raises UserError if it holds anything else or cannot be written."""
    marker, in_use = folder / UNFINISHED, f"{folder}: not empty; give a folder that is empty or does not exist"
    with os_errors_as(f"{folder}: cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        file = open(marker, "r+b" if any(folder.iterdir()) else "xb")  # noqa: SIM115 (below)
    except (FileNotFoundError, FileExistsError):
        raise UserError(in_use) from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    with file:
        if not try_lock(file) or not is_named(file, marker):
            raise UserError(in_use)
        _empty(folder)
        try:
            yield
        except BaseException:
            with suppress(OSError):
                _empty(folder)
                marker.unlink()
            raise
        marker.unlink()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if is_dir(path) and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != UNFINISHED:
            path.unlink()

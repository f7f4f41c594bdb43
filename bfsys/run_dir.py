"""The run directory: checks before a run may use it, and the data that its checkpoints record."""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

from bfsys import __version__, dist, typed_yaml
from bfsys.checkpoint.copies import Wanted, fetch_newest
from bfsys.checkpoint.files import LATEST, METRICS, checkpoints_dir, read_manifest, step_of
from bfsys.checkpoint.loading import check_same_run, newest_readable
from bfsys.checkpoint.rollbacks import FILE as ROLLBACKS
from bfsys.config import Config
from bfsys.data.streaming.quarantine import FILE as QUARANTINE
from bfsys.data.streaming.run_data import RunData
from bfsys.errors import EXIT_CRASHED, EXIT_STORAGE, EXIT_USER_ERROR, TRANSIENT_ERRNOS, UserError, code_of, counted
from bfsys.files import exists, is_dir, is_named, remove_unfinished, replace_file, try_lock
from bfsys.git_state import git_state
from bfsys.supervision.goodput import FILE as GOODPUT
from bfsys.supervision.run_end import FILE as ENDED
from bfsys.supervision.run_end import forget_end, how_it_ended, note_end
from bfsys.supervision.watchdog import HANGS

SILENT_S = 5.0  # a longer wait for the object store is reported
LOCK_WAIT_S = 20.0  # loader processes of a killed start hold the lock until they end
# A file server keeps the lock of a lost node for a while (NFSv4: 90 s). In a job, a longer wait costs little, and a run
# that ends here is not requeued. Other ranks wait for train.collective_timeout_s; rank 0 waits at most half of it.
LOCK_WAIT_IN_JOB_S = 300.0
CONFIG = "config.yaml"
REPLACED = (CONFIG, METRICS, ENDED, ROLLBACKS, QUARANTINE)  # files of a run that are replaced as a whole


def run_facts(data: RunData) -> dict:
    """The facts that make a checkpoint self-contained, and with which a resume must agree."""
    return {
        "classes": list(data.training.classes),
        "plan": data.facts,
        "input_formats": [format.to_tree() for format in data.input_formats],
        "config": typed_yaml.to_tree(data.config),
        "versions": {"bfsys": __version__}
        | {name: version(name) for name in ("torch", "deepspeed")}
        | {"git": git_state()},
    }


@dataclass(frozen=True)
class RunDirectory:
    """A run directory that this run may use, as rank 0 sees it."""

    is_new: bool
    """Whether the directory holds no checkpoint."""
    notes: list[str]
    """The changes that were made to the directory."""
    hold: BinaryIO | None
    """Rank 0's lock on the directory."""

    def check_same(self) -> None:
        """Raise UserError if the directory is gone, if another one has taken its place, for example a restored backup,
        or if a later start trains in it, too."""
        if not self.hold:
            return
        lock = Path(self.hold.name)
        where = f"run directory {lock.parent}"
        if not exists(lock.parent):  # a save would make it again
            raise UserError(
                f"{where}: was moved or deleted while this run trains; if it was moved, move it back, and run the same "
                "command to resume",
                exit_code=EXIT_STORAGE,
            )
        with suppress(FileNotFoundError):  # the lock file was deleted
            if exists(lock) and not is_named(self.hold, lock):
                raise UserError(
                    f"{where}: was replaced by another one while this run trains, so their checkpoints would be mixed; "
                    "decide which one to keep, and start the run again"
                )
            if (holder := lock.read_text(errors="replace")) != _this_process():
                raise UserError(
                    f"{where}: {holder or 'another process'} has begun to train in it, too, since its file system "
                    "does not lock files between machines; that start continues from the last checkpoint"
                )

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        if self.hold:
            self.hold.close()


def prepare_run_dir(config: Config, facts: dict, ranks: dist.Ranks) -> RunDirectory:
    """Lock the run directory, check that it contains this run or none, and write config.yaml into it; collective.

    Raises AgreedError if it contains another run, or if another process is training in it.
    """
    hold: BinaryIO | None = None

    def take_lock() -> None:
        nonlocal hold
        with _errors_of(config.run_dir):
            config.run_dir.mkdir(parents=True, exist_ok=True)
            # First, so that files that another process writes during the wait are seen.
            hold = hold_directory(config.run_dir, longest_s=config.train.collective_timeout_s / 2)

    try:
        dist.on_rank0(take_lock, ranks)
        fetched = _fetch_newer(config, facts, ranks) if config.copy_url else []
        is_new, notes = dist.on_rank0(lambda: _take_directory(config, facts, hold), ranks)
    except UserError:
        if hold:
            hold.close()
        raise
    return RunDirectory(is_new, [*fetched, *notes], hold)


def _this_process() -> str:
    """The content of the lock file, which shows a later start where the file system does not lock."""
    return f"process {os.getpid()} on {os.uname().nodename}"


@contextmanager
def noting_failed_start(config: Config, ranks: dist.Ranks) -> Iterator[None]:
    """Record an error as the run's end, unless the directory is missing, another process trains in it, or the run has
    finished."""
    try:
        yield
    except dist.AgreedError as error:
        if ranks.is_rank_zero:
            with suppress(OSError, UserError), hold_directory(config.run_dir, longest_s=0.0):
                ended = how_it_ended(config.run_dir)
                if not ended or ended["exit_code"]:
                    note_end(config.run_dir, error.exit_code, str(error))
        raise


def _fetch_newer(config: Config, facts: dict, ranks: dist.Ranks) -> list[str]:
    """Fetch the newest copy from the object store if it is newer than all checkpoints in the run directory; collective.
    Returns notes.

    Raises AgreedError if there is no checkpoint in the directory, and the store does not respond or has only damaged
    copies.
    """
    run_dir, url = config.run_dir, config.copy_url
    path = dist.on_rank0(lambda: newest_readable(run_dir)[0], ranks)
    began, said = time.monotonic(), not ranks.is_rank_zero

    def say_once() -> None:
        nonlocal said
        if not said and time.monotonic() - began > SILENT_S:
            print(f"waiting for {url}, which may hold a newer checkpoint", file=sys.stderr, flush=True)
            said = True

    fetched = fetch_newest(
        Wanted(run_dir, url, after=step_of(path) if path else -1),
        ranks,
        check=lambda work: check_same_run(work, read_manifest(work), facts, origin=url),
        wait=say_once,
    )
    if path:
        unanswered = f"{url} did not answer whether it has newer checkpoints: {fetched.problem}"
        return [*fetched.notes, *([unanswered] if fetched.problem else [])]
    if fetched.problem:
        remedy = "repair that, or leave train.checkpoint_copy out"
        raise dist.AgreedError(f"train.checkpoint_copy: {fetched.problem}; {remedy}", exit_code=fetched.exit_code)
    if fetched.notes and not fetched.name:
        raise dist.AgreedError(*fetched.notes, f"{url}: no copy is intact; to start from scratch, give another name=…")
    return fetched.notes


def newest_checkpoint(config: Config, facts: dict) -> tuple[Path | None, dict]:
    """The newest checkpoint with a manifest in the run directory, whether or not its files are intact, and the
    manifest. (None, {}) if there is no checkpoint.

    Raises UserError if it belongs to another run, or if there are only damaged manifests.
    """
    with _errors_of(config.run_dir):
        path, manifest, problems = newest_readable(config.run_dir)
    if path:
        check_same_run(path, manifest, facts)
    elif problems:
        raise UserError(
            *problems,
            f"{config.run_dir}: no intact checkpoint, see above; to start from scratch, give another name=… or move "
            "the directory away",
        )
    return path, manifest


def _take_directory(config: Config, facts: dict, hold: BinaryIO | None) -> tuple[bool, list[str]]:
    """Prepare the directory, which `hold` locks. Returns whether it has no checkpoint, and the changes to it."""
    assert hold
    run_dir, (path, manifest) = config.run_dir, newest_checkpoint(config, facts)
    with _errors_of(run_dir):
        remove_unfinished(run_dir, REPLACED)
        remove_unfinished(checkpoints_dir(run_dir), [LATEST])
        notes = [] if path else set_aside_earlier_run(run_dir)
        # If it were made at the first hang, other nodes might not see it, since NFS caches missing names.
        (run_dir / HANGS).mkdir(exist_ok=True)
        if path and step_of(path) >= config.train.steps:
            if not exists(run_dir / CONFIG):  # of a checkpoint that was fetched
                trained = typed_yaml.from_tree(Config, manifest["config"], str(path))
                replace_file(run_dir / CONFIG, typed_yaml.dump(trained))
        else:
            replace_file(run_dir / CONFIG, typed_yaml.dump(config))
        if path:
            notes = notes_on_resume(config, path, manifest)
        forget_end(run_dir)
        hold.truncate(0)  # a refused start does not get here
        hold.write(_this_process().encode())
        hold.flush()
        return path is None, notes


def notes_on_resume(config: Config, path: Path, manifest: dict) -> list[str]:
    """Notes on settings of a start that have no effect, because the run continues from the checkpoint at `path`."""
    theirs, ours = manifest["config"]["train"].get("init_from"), config.train.init_from
    notes = [
        f"train.init_from: {ours} has no effect, because the run continues from {path}; to start from it, give the run "
        "another name (name=…)"
    ]
    return [
        *(notes if ours not in (None, theirs) else []),
        *(_notes_on_finished(config, step_of(path)) if step_of(path) >= config.train.steps else []),
    ]


def _notes_on_finished(config: Config, step: int) -> list[str]:
    """A note for a start of a run that has made all of its steps: its config.yaml is not replaced."""
    file = config.run_dir / CONFIG
    with suppress(UserError):
        theirs = typed_yaml.load(Config, file)
        if replace(theirs, name=config.name, runs_dir=config.runs_dir) == config:
            return []
    return [
        f"{config.run_dir} has made {counted(step, 'step')}, and train.steps is {config.train.steps}: nothing is "
        f"left to train, so the settings of this start that differ from {file} have no effect"
    ]


@contextmanager
def _errors_of(run_dir: Path) -> Iterator[None]:
    """Turn permanent errors of the disk into a UserError about the run directory."""
    try:
        yield
    except OSError as error:
        if error.errno in TRANSIENT_ERRNOS:
            raise
        where = f"{error.filename}: " if error.filename and error.filename != str(run_dir) else ""
        problem = f"run directory {run_dir}: cannot be used: {where}{error.strerror}"
        raise UserError(problem, exit_code=code_of(error)) from None


def set_aside_earlier_run(run_dir: Path) -> list[str]:
    """Move the files of an earlier run without checkpoints into a separate folder, since its skipped steps, bad samples
    and history refer to other data. Returns a note if there were any."""
    left = [run_dir / name for name in (ROLLBACKS, QUARANTINE, METRICS, GOODPUT, "tb") if _has_content(run_dir / name)]
    if not left:
        return []
    number = next(n for n in itertools.count(1) if not exists(run_dir / f"earlier-{n}"))
    aside = run_dir / f"earlier-{number}"
    aside.mkdir()
    for path in left:
        path.rename(aside / path.name)
    names = ", ".join(path.name for path in left)
    return [f"{run_dir} has no checkpoint, so this is a new run: {names} of an earlier one are in {aside}"]


def _has_content(path: Path) -> bool:
    return any(path.iterdir()) if is_dir(path) else exists(path) and path.stat().st_size > 0


def hold_directory(run_dir: Path, name: str = ".lock", longest_s: float = math.inf) -> BinaryIO:
    """Lock the directory against other processes, until the returned file is closed or this process ends. `name` is the
    lock file.

    Raises UserError if another process holds the lock, after at most `longest_s`. Without the lock, two starts would
    overwrite each other's checkpoints.
    """
    hold = open(run_dir / name, "ab")  # noqa: SIM115 (for the life of the run)
    wait_s = min(longest_s, LOCK_WAIT_IN_JOB_S if os.environ.get("SLURM_JOB_ID") else LOCK_WAIT_S)
    deadline, said = time.monotonic() + wait_s, False
    while not try_lock(hold):
        if time.monotonic() > deadline:
            hold.close()
            # In a job, the file server may still hold the lock of a lost node, and a later start may help.
            raise UserError(
                f"run directory {run_dir}: another process is training in it; stop that one, or give this run a "
                f"name of its own (name=…)",
                exit_code=EXIT_CRASHED if os.environ.get("SLURM_JOB_ID") else EXIT_USER_ERROR,
            )
        if not said:
            text = f"run directory {run_dir}: waiting for another process to release it, for up to {wait_s:.0f} s"
            print(text, file=sys.stderr, flush=True)
            said = True
        time.sleep(0.2)
    return hold

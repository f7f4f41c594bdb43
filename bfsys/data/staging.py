"""Where a dataset is packed until it is whole: the folder .pack inside the dataset's folder.

    NAME-SPLIT-000000.tar, .npz …   finished shards, and what `packing.write_job` knows of each
    inputs                          of which inputs the dataset beside it was packed
    lock                            held by the process that packs

All names change within milliseconds, while the folder holds no dataset.json. A run that was killed in them is
completed by the same command. Refused: exchanging whole folders, which would take along what the user put into them.
"""

import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bfsys.data.shards import DESCRIPTION
from bfsys.data.tars import atomic_file
from bfsys.errors import UserError

INPUTS, LOCK = "inputs", "lock"


def folder_of(folder: Path) -> Path:
    return folder / ".pack"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else packs into the folder meanwhile; raises UserError if somebody does. The lock ends with its process.

    Where the file system has no locks, nothing is locked.
    """
    folder_of(folder).mkdir(parents=True, exist_ok=True)
    with open(folder_of(folder) / LOCK, "a") as file:
        _lock(file.fileno(), folder)
        yield


def refuse_if_locked(folder: Path) -> None:
    """Raise UserError if another process packs into the folder; changes nothing."""
    lock = folder_of(folder) / LOCK
    if lock.exists() and os.access(lock, os.W_OK):
        with open(lock, "a") as file:
            _lock(file.fileno(), folder)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{folder}: another process is packing into this folder; wait until it has ended, or choose another --name"
        ) from None
    except OSError:  # a file system without locks
        return


def start(folder: Path) -> None:
    """Take back the shards that a run had put into place when it was killed: they are as good as those still here."""
    if (folder / DESCRIPTION).exists():
        return
    for sidecar in folder_of(folder).glob("*.npz"):
        staged = sidecar.with_suffix(".tar")
        if not staged.exists() and (folder / staged.name).exists():
            os.replace(folder / staged.name, staged)


def put_into_place(folder: Path, names: Sequence[str], inputs: str) -> None:
    """Move the finished files, and dataset.json last; until then the folder is not a dataset."""
    staged = folder_of(folder)
    with atomic_file(staged / f"{INPUTS}.new") as file:
        file.write(inputs.encode())
    (folder / DESCRIPTION).unlink(missing_ok=True)
    for name in names:
        os.replace(staged / name, folder / name)
    os.replace(staged / f"{INPUTS}.new", staged / INPUTS)
    _sync(folder)
    os.replace(staged / DESCRIPTION, folder / DESCRIPTION)
    _sync(folder)


def tidy(folder: Path, ours: re.Pattern[str], wanted: Sequence[str]) -> None:
    """Remove what is `ours` by its name and not wanted, what other runs left in the staging folder, and the temporary
    files of killed runs."""
    for path in sorted(folder.iterdir()):
        is_temporary = path.name.startswith(".") and path.name.endswith(".tmp")
        if is_temporary or (ours.fullmatch(path.name) and path.name not in wanted):
            path.unlink()
    for path in folder_of(folder).iterdir():
        if path.name not in (INPUTS, LOCK):
            path.unlink()


def remove_temporary(folder: Path) -> None:
    """Of processes that were killed while they wrote into the staging folder `folder`."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The staging folder of a dataset that is being packed: the folder .pack inside the dataset's folder.

    NAME-SPLIT-000000.tar, .npz …   finished shards, and what `shard_jobs.write_job` records of each
    dataset.json                    written last: the dataset is complete and can be put into place
    inputs                          the inputs from which the dataset in the folder was packed
    lock                            held by the process that packs

All files are moved into place within milliseconds; during this time the dataset's folder holds no dataset.json. If the
process is killed in between, the next command that packs into the folder first moves the rest, whatever its own input.
Rejected alternative: exchanging whole folders, which would also move files that the user put into them.
"""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bfsys.data.storage.description import DESCRIPTION, read_description
from bfsys.errors import STOPS_COMMANDS, UserError, counted
from bfsys.files import exists, is_dir, sync_folder, try_lock
from bfsys.process import handling

INPUTS, LOCK, SKIPPED_LIST = "inputs", "lock", "skipped.txt"
NEW_INPUTS = "inputs.new"  # is renamed to INPUTS when the dataset is moved into place


def folder_of(folder: Path) -> Path:
    return folder / ".pack"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder for packing. Raises UserError if another process holds the lock. It is released when its process
    ends.

    On a file system without locks, nothing is locked.
    """
    folder_of(folder).mkdir(parents=True, exist_ok=True)
    with open(folder_of(folder) / LOCK, "ab") as file:
        if not try_lock(file):
            raise UserError(
                f"{folder}: another process is packing into this folder; wait until it has ended, or choose another "
                "--name"
            )
        yield


def recover(folder: Path) -> None:
    """Complete a run that was killed while it moved files into place.

    Raises UserError if another process is packing into the folder.
    """
    lock = folder_of(folder) / LOCK
    if exists(lock) and os.access(lock, os.W_OK):
        with locked(folder):
            if exists(folder_of(folder) / DESCRIPTION) and not exists(folder / DESCRIPTION):
                put_into_place(folder)


def skipped_files(folder: Path) -> dict[str, str]:
    """The bad files that were left out of the dataset in the folder, with the reasons; see `one_line` for the paths."""
    path = folder / SKIPPED_LIST
    lines = path.read_text(encoding="utf-8").splitlines() if exists(path) else []
    return {path: reason for path, _, reason in (line.partition("\t") for line in lines)}


def note_on_skipped(folder: Path) -> str:
    """A line on the bad files that were left out of the dataset in the folder; empty if there are none."""
    if not (count := len(skipped_files(folder))):
        return ""
    return f"left out: {counted(count, 'bad file')}, named in {folder / SKIPPED_LIST}"


def start(folder: Path) -> None:
    """Record that shards in the staging folder may be replaced from now on."""
    (folder_of(folder) / DESCRIPTION).unlink(missing_ok=True)


def put_into_place(folder: Path) -> None:
    """Move the remaining staged files, dataset.json last. Until then, the folder is not a dataset."""
    staged = folder_of(folder)
    names = [name for name in (*_files_of(staged), SKIPPED_LIST) if exists(staged / name)]
    with handling(STOPS_COMMANDS, signal.SIG_IGN):  # it takes milliseconds
        (folder / DESCRIPTION).unlink(missing_ok=True)
        for name in names:
            os.replace(staged / name, folder / name)
        if exists(staged / NEW_INPUTS):
            os.replace(staged / NEW_INPUTS, staged / INPUTS)
        sync_folder(folder)
        os.replace(staged / DESCRIPTION, folder / DESCRIPTION)
        sync_folder(folder)


def tidy(folder: Path) -> None:
    """Remove shards and index files of earlier, larger datasets, an empty list of skipped files, remains of other runs
    in the staging folder, and temporary files."""
    wanted = set(_files_of(folder))
    ours = re.compile(rf"{re.escape(folder.name)}-\w+(-\d{{6}}\.tar|\.(samples|keys)\.npy)|\..*\.tmp")
    for path in sorted(folder.iterdir()):
        is_empty_list = path.name == SKIPPED_LIST and not path.stat().st_size
        if (is_empty_list or (ours.fullmatch(path.name) and path.name not in wanted)) and not is_dir(path):
            path.unlink()
    for path in sorted(folder_of(folder).iterdir()):
        if path.name not in (INPUTS, LOCK) and not is_dir(path):  # some storage devices add folders everywhere
            path.unlink()


def _files_of(folder: Path) -> list[str]:
    """The shards and index files that a dataset.json names."""
    parts = read_description(folder)["splits"].values()
    shards = [shard["file"] for part in parts for shard in part["shards"]]
    return shards + [entry["name"] for part in parts for entry in part["index"].values()]

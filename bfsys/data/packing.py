"""Packing: cutting files into shards, writing the shards in parallel, and finishing the dataset.

Each shard is a job of its own, whose fingerprint covers all that decides its bytes. Beside a finished
shard lies a sidecar in the folder .pack with that fingerprint and the shard's part of the index. So a
killed run continues where it was, by asking of every shard whether it is there already, and the number
of workers cannot matter. Refused: a journal of what was done, which can disagree with the files.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from bfsys.data.encodings import Encoding, Fitting, library_version, parse_encoding, reencode
from bfsys.data.shards import DESCRIPTION, index_files, read_description, write_description, write_split
from bfsys.data.sources import BadFile, SourceFile
from bfsys.data.tars import Member, Shard, TarIndex, atomic_file, size_in_tar_bytes, write_shard
from bfsys.errors import UserError

VERSION = 1  # to be raised when the same input comes to give other bytes
TOOL = "tools/pack.py"
PROGRESS_FOLDER = ".pack"
SKIPPED_LIST = "skipped.txt"


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    path: Path
    split: str
    files: tuple[SourceFile, ...]
    labels: tuple[int, ...]
    encoding: str
    fitting: Fitting
    fingerprint: str

    @property
    def sidecar(self) -> Path:
        return self.path.parent / PROGRESS_FOLDER / f"{self.path.stem}.npz"


class Outcome(NamedTuple):
    job: Job
    index: TarIndex | None  # None if there are bad files and they are not to be skipped
    bad: list[BadFile]


class BadFilesError(Exception):
    """Ends the writing of a shard; the argument is the list of its bad files."""


def plan_jobs(
    folder: Path,
    files: Sequence[SourceFile],
    classes: Sequence[str],
    encoding: Encoding,
    fitting: Fitting,
    shard_bytes: int,
    seed: int,
) -> list[Job]:
    """Shuffle the files of each split and cut them into shards of like size, about `shard_bytes` at most.

    Shuffling sorts by a hash of seed and key, so that it depends on neither the order of listing nor the
    version of a random generator.
    """
    number_of = {name: label for label, name in enumerate(classes)}
    base = [VERSION, encoding.text, library_version(encoding), asdict(fitting)]
    jobs = []
    for split in sorted({file.split for file in files}):
        mixed = sorted(
            (file for file in files if file.split == split),
            key=lambda file: (xxhash.xxh3_64_intdigest(f"{seed}/{file.key}".encode()), file.key),
        )
        for number, group in enumerate(_cut(mixed, shard_bytes)):
            name = f"{folder.name}-{split}-{number:06d}.tar"
            labels = tuple(number_of[file.class_name] for file in group)
            identity = json.dumps([*base, name, labels, group]).encode()
            fingerprint = hashlib.sha256(identity).hexdigest()
            jobs.append(Job(folder / name, split, group, labels, encoding.text, fitting, fingerprint))
    return jobs


def _cut(files: list[SourceFile], shard_bytes: int) -> Iterator[tuple[SourceFile, ...]]:
    """Equal shards rather than full ones: a small last shard would serve one rank badly."""
    total = sum(size_in_tar_bytes(file.size_bytes) for file in files)
    shards = -(-total // shard_bytes)
    before = 0

    def shard_of(file: SourceFile) -> int:
        nonlocal before
        size = size_in_tar_bytes(file.size_bytes)
        before += size
        return (2 * before - size) * shards // (2 * total)  # the one that the file's middle falls in

    for _, group in itertools.groupby(files, shard_of):
        yield tuple(group)


def write_job(job: Job, skip_bad: bool) -> Outcome:
    """Write a shard and its sidecar, unless both are there and belong to the same input."""
    done = _read_sidecar(job)
    if done and (skip_bad or not done.bad):
        return done
    job.sidecar.unlink(missing_ok=True)
    bad: list[BadFile] = []
    try:
        index = write_shard(job.path, _members(job, bad, skip_bad))
    except BadFilesError:
        return Outcome(job, None, bad)
    with atomic_file(job.sidecar) as file:
        head = json.dumps([job.fingerprint, asdict(index.shard), bad])
        np.savez(file, head=head, samples=index.samples, keys=np.frombuffer(index.keys, np.uint8))
    return Outcome(job, index, bad)


def _read_sidecar(job: Job) -> Outcome | None:
    try:
        with np.load(job.sidecar) as sidecar:
            fingerprint, shard, bad = json.loads(str(sidecar["head"]))
            index = TarIndex(Shard(**shard), sidecar["samples"], sidecar["keys"].tobytes())
        if fingerprint == job.fingerprint and job.path.stat().st_size == index.shard.bytes:
            return Outcome(job, index, [BadFile(*one) for one in bad])
    except FileNotFoundError:
        pass
    return None


def _members(job: Job, bad: list[BadFile], skip_bad: bool) -> Iterator[Member]:
    encoding = parse_encoding(job.encoding)
    for file, label in zip(job.files, job.labels, strict=True):
        try:
            data = Path(file.path).read_bytes()
        except OSError as error:
            bad.append(BadFile(file.path, f"cannot be read ({error.strerror})"))
            continue
        if len(data) != file.size_bytes:
            bad.append(BadFile(file.path, f"changed during packing: {file.size_bytes:,} to {len(data):,} bytes"))
            continue
        if encoding.modality:
            try:
                data = reencode(data, encoding, job.fitting)
            except Exception as error:  # decoders raise anything when they meet a damaged file
                bad.append(BadFile(file.path, f"cannot be made {encoding.text} ({error})"))
                continue
        yield Member(file.key, encoding.extension or file.extension, data, label)
    if bad and not skip_bad:
        raise BadFilesError(bad)


def write_jobs(jobs: Sequence[Job], workers: int, skip_bad: bool) -> Iterator[Outcome]:
    """Write all shards, in no particular order.

    Workers are spawned, not forked: a fork of a process with threads (the progress bar's) may hang.
    No job waits in the pool's own queue, where it could not be called back.
    """
    if min(workers, len(jobs)) == 1:
        yield from (write_job(job, skip_bad) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_exit_with_parent)
    running = set()
    try:
        for job in jobs:
            if len(running) == workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
            # a worker that is started here inherits the mask, so that Ctrl-C meets it in its jobs only
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                running.add(pool.submit(_write_job_in_worker, job, skip_bad))
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        yield from (future.result() for future in running)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for want of memory; run the same command again, "
            "with fewer --workers: finished shards are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _exit_with_parent() -> None:
    """An orphan would write beside the next run."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _write_job_in_worker(job: Job, skip_bad: bool) -> Outcome:
    """Ctrl-C in the middle of a shard removes its temporary file; the pool hands the exception on."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        return write_job(job, skip_bad)
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def target_problems(folder: Path, splits: set[str]) -> list[str]:
    """Why `folder` must not be packed into: nothing that another command made is ever overwritten."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return [f"{folder}: cannot be written: {existing} is not a folder that this user may write to"]
    if (folder / DESCRIPTION).exists():
        try:
            description = read_description(folder)
        except UserError as error:
            return [f"{error}; or remove the folder first"]
        lost = sorted(description["splits"].keys() - splits)
        if description.get("made_by", {}).get("tool") != TOOL:
            return [f"{folder}: holds a dataset that {TOOL} did not make; choose another --name"]
        if splits and lost:
            return [
                f"{folder}: holds a dataset with split {', '.join(lost)}, which this command would remove; "
                f"pack all splits by one command (split folders or --from filelist), or choose another --name"
            ]
    elif folder.is_dir() and not (folder / PROGRESS_FOLDER).exists() and any(folder.glob("*.tar")):
        return [f"{folder}: holds tars that {TOOL} did not make; choose another --name"]
    return []


def inputs_fingerprint(jobs: Sequence[Job], arguments: dict, skipped: Sequence[BadFile]) -> str:
    """Of everything that went into a dataset. Holds times of files, so it is not part of dataset.json."""
    identity = json.dumps([VERSION, [job.fingerprint for job in jobs], arguments, skipped])
    return hashlib.sha256(identity.encode()).hexdigest()


def is_packed(folder: Path, fingerprint: str) -> bool:
    """Whether the folder holds the finished dataset of these inputs, with every file in place."""
    try:
        if (folder / PROGRESS_FOLDER / "inputs").read_text() != fingerprint:
            return False
        parts = read_description(folder)["splits"].values()
        sizes = {shard["file"]: shard["bytes"] for part in parts for shard in part["shards"]}
        index = [entry["name"] for part in parts for entry in part["index"].values()]
        return all((folder / file).stat().st_size == size for file, size in sizes.items()) and all(
            (folder / file).exists() for file in index
        )
    except (FileNotFoundError, UserError):
        return False


def start(folder: Path) -> None:
    """From here on the folder is not a dataset, until `finish`."""
    (folder / PROGRESS_FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)


def finish(
    folder: Path,
    classes: Sequence[str],
    encoding: Encoding,
    arguments: dict,
    outcomes: Sequence[Outcome],
    skipped: Sequence[BadFile],
    fingerprint: str,
) -> None:
    """Write the index, remove what other runs left, and declare the dataset whole."""
    indexes: dict[str, list[TarIndex]] = {outcome.job.split: [] for outcome in outcomes}
    for outcome in outcomes:
        if len(outcome.index.samples):  # all of a shard's files may have been skipped
            indexes[outcome.job.split].append(outcome.index)
    missing = [split for split, found in indexes.items() if not found]
    if missing:
        raise UserError(*(f"split {split}: not one of its files can be packed" for split in missing))
    skipped = sorted([*skipped, *(bad for outcome in outcomes for bad in outcome.bad)])
    splits = {
        split: write_split(folder, folder.name, split, classes, sorted(found, key=lambda i: i.shard.file))
        for split, found in sorted(indexes.items())
    }
    if skipped:
        lines = "".join(f"{path}\t{reason}\n" for path, reason in skipped)
        with atomic_file(folder / SKIPPED_LIST) as file:
            file.write(lines.encode(errors="backslashreplace"))
    else:
        (folder / SKIPPED_LIST).unlink(missing_ok=True)
    _remove_leftovers(folder, splits)
    with atomic_file(folder / PROGRESS_FOLDER / "inputs") as file:
        file.write(fingerprint.encode())
    made_by = {"tool": TOOL, "version": VERSION, "library": library_version(encoding), "arguments": arguments}
    write_description(folder, folder.name, classes, encoding.text, made_by, splits)
    for sidecar in (folder / PROGRESS_FOLDER).glob("*.npz"):
        sidecar.unlink()


def _remove_leftovers(folder: Path, splits: dict[str, dict]) -> None:
    """Temporary files of killed runs, and shards and index files of former, larger ones."""
    wanted = {shard["file"] for part in splits.values() for shard in part["shards"]}
    wanted |= {file for split in splits for file in index_files(folder.name, split)}
    ours = re.compile(rf"{re.escape(folder.name)}-\w+(-\d{{6}}\.tar|\.(samples|keys)\.npy)")
    for path in sorted(folder.iterdir()):
        left_over = ours.fullmatch(path.name) and path.name not in wanted
        if left_over or (path.name.startswith(".") and path.name.endswith(".tmp")):
            path.unlink()
    for path in (folder / PROGRESS_FOLDER).glob(".*.tmp"):
        path.unlink()

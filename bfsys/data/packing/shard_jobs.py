"""Packing: cutting files into shards, writing one shard, and finishing the dataset.

Each shard is a job (workers.py runs the jobs). The fingerprint of a job covers everything that determines its bytes. A
shard is written into the folder .pack, with a sidecar file that holds the fingerprint and the shard's part of the
index. A restarted command checks for every shard whether it is complete already, and the number of workers does not
matter. When all shards are complete, staging.py puts them into place. Until then the old dataset in the folder stays
unchanged. Rejected alternative: a journal of finished work, which can disagree with the files.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from ctypes import c_long
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import xxhash

from bfsys.data.media.encodings import Encoding, Fitting, library_version, parse_encoding, reencode
from bfsys.data.media.pictures import PECULIARITIES, peculiarities_of
from bfsys.data.packing import staging
from bfsys.data.packing.checks import UNREADABLE, why_unreadable
from bfsys.data.packing.listing import BadFile, SourceFile
from bfsys.data.storage.description import DESCRIPTION, read_description
from bfsys.data.storage.shards import PACKED_BY, write_description, write_split
from bfsys.data.storage.tars import Member, Shard, TarIndex, size_in_tar_bytes, write_shard
from bfsys.errors import UserError, one_line
from bfsys.files import exists, is_dir, open_regular, replace_file, replacing

VERSION = 2  # increase it if the same input gives other bytes
MOST_SHARDS = 100_000  # dataset.json has a few hundred bytes for each, and is read if it has at most 64 MiB
ADDRESS = re.compile(r"\s*<[^<>]* at 0x[0-9a-f]+>")  # address of a Python object in a decoder's message


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    path: Path  # in the staging folder
    split: str
    files: tuple[SourceFile, ...]
    labels: tuple[int, ...]
    encoding: str
    fitting: Fitting
    fingerprint: str

    @property
    def sidecar(self) -> Path:
        return self.path.with_suffix(".npz")


class Outcome(NamedTuple):
    job: Job
    contents: TarIndex | None  # None if there are bad files that must not be skipped
    bad: list[BadFile]
    peculiar: dict[str, list[str]]  # keys of the files with each of the PECULIARITIES


class BadFilesError(Exception):
    """Ends the writing of a shard that has bad files."""


def plan_jobs(
    folder: Path,
    files: Sequence[SourceFile],
    classes: Sequence[str],
    encoding: Encoding,
    fitting: Fitting,
    shard_bytes: int,
    seed: int,
) -> list[Job]:
    """Shuffle the files of each split and divide them into shards of similar size, about `shard_bytes` at most.

    Shuffling sorts by a hash of seed and key. So it does not depend on the order of the list or on the version of a
    random generator. Raises UserError for too many shards.
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
            path = staging.folder_of(folder) / name
            jobs.append(Job(path, split, group, labels, encoding.text, fitting, fingerprint))
    if len(jobs) > MOST_SHARDS:
        raise UserError(f"--shard-bytes: gives {len(jobs):,} shards; allowed are {MOST_SHARDS:,}; raise --shard-bytes")
    return jobs


def _cut(files: list[SourceFile], shard_bytes: int) -> Iterator[tuple[SourceFile, ...]]:
    """Divide files into shards of similar size. Full shards with a small last one would balance ranks badly."""
    total = sum(size_in_tar_bytes(file.size_bytes) for file in files)
    shards = -(-total // shard_bytes)
    before = 0

    def shard_of(file: SourceFile) -> int:
        nonlocal before
        size = size_in_tar_bytes(file.size_bytes)
        before += size
        return (2 * before - size) * shards // (2 * total)  # the shard in which the middle of the file lies

    for _, group in itertools.groupby(files, shard_of):
        yield tuple(group)


def write_job(job: Job, skip_bad: bool, fatal: Mapping[str, str], position: c_long) -> Outcome:
    """Write a shard and its sidecar, unless both exist and belong to the same input.

    `fatal` holds files that crashed a process that decoded them, with the reason. `position.value` is set to the number
    of the file that is being packed. Raises UserError if there is not enough memory for a file, or if a file server
    does not answer.
    """
    done = _read_sidecar(job)
    if done and (skip_bad or not done.bad) and not any(bad.reason.startswith(UNREADABLE) for bad in done.bad):
        return done
    job.sidecar.unlink(missing_ok=True)
    outcome = Outcome(job, None, [], {name: [] for name in PECULIARITIES})
    try:
        index = write_shard(job.path, _members(outcome, skip_bad, fatal, position))
    except BadFilesError:
        return outcome
    except MemoryError:
        path = job.files[position.value].path
        raise UserError(
            f"{path}: not enough memory to pack this file; run the same command again with fewer --workers, or "
            "leave large files out by --max-file-bytes: finished shards are kept"
        ) from None
    with replacing(job.sidecar) as file:
        about = json.dumps([job.fingerprint, asdict(index.shard), outcome.bad, outcome.peculiar])
        np.savez(file, about=about, samples=index.samples, keys=np.frombuffer(index.keys, np.uint8))
    return outcome._replace(contents=index)


def _read_sidecar(job: Job) -> Outcome | None:
    try:
        with np.load(job.sidecar) as sidecar:
            fingerprint, shard, bad, peculiar = json.loads(str(sidecar["about"]))
            index = TarIndex(Shard(**shard), sidecar["samples"], sidecar["keys"].tobytes())
        if fingerprint == job.fingerprint and job.path.stat().st_size == index.shard.bytes:
            return Outcome(job, index, [BadFile(*one) for one in bad], peculiar)
    except (OSError, ValueError, LookupError, TypeError, EOFError, BadZipFile):
        pass  # it is missing, damaged or of another version: the shard is written again
    return None


def _members(outcome: Outcome, skip_bad: bool, fatal: Mapping[str, str], position: c_long) -> Iterator[Member]:
    """The shard's samples; bad files and peculiarities go into `outcome`."""
    job, encoding = outcome.job, parse_encoding(outcome.job.encoding)
    for number, (file, label) in enumerate(zip(job.files, job.labels, strict=True)):
        position.value = number
        data = _packed_bytes(file, job, encoding, fatal, outcome)
        if isinstance(data, str):
            outcome.bad.append(BadFile(file.path, data))
        else:
            yield Member(file.key, encoding.extension or file.extension, data, label)
    if outcome.bad and not skip_bad:
        raise BadFilesError


def _packed_bytes(
    file: SourceFile, job: Job, encoding: Encoding, fatal: Mapping[str, str], outcome: Outcome
) -> bytes | str:
    """The bytes to store for a file, or the reason why it is bad."""
    if file.path in fatal:
        return fatal[file.path]
    try:
        with open_regular(file.path) as source:  # a pipe may have taken the place of the file since it was listed
            data, now_bytes = source.read(file.size_bytes + 1), os.fstat(source.fileno()).st_size
    except OSError as error:
        return why_unreadable(file.path, error)
    if len(data) != file.size_bytes:
        return f"changed during packing: {file.size_bytes:,} to {now_bytes:,} bytes"
    if not encoding.modality:
        return data
    try:
        encoded = reencode(data, encoding, job.fitting)
        for name in peculiarities_of(data, encoding.modality):
            outcome.peculiar[name].append(file.key)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise any exception on a damaged file
        return f"cannot be converted to {encoding.text} ({ADDRESS.sub('', str(error))})"
    return encoded


def target_problems(folder: Path, splits: set[str]) -> list[str]:
    """The reasons why `folder` cannot be packed into. Files of other commands are never overwritten."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not is_dir(existing) or not os.access(existing, os.W_OK | os.X_OK):
        return [f"{folder}: cannot be written: {existing} is not a folder that this user may write to"]
    if exists(folder / DESCRIPTION):
        try:
            description = read_description(folder)
        except UserError as error:
            return [f"{error}; or remove the folder first"]
        lost = sorted(description["splits"].keys() - splits)
        if description.get("made_by", {}).get("tool") != PACKED_BY:
            return [f"{folder}: holds a dataset that {PACKED_BY} did not make; choose another --name"]
        if splits and lost:
            return [
                f"{folder}: holds a dataset with split {', '.join(lost)}, which this command would remove; "
                f"pack all splits by one command (split folders or --from filelist), or choose another --name"
            ]
    elif is_dir(folder) and not exists(staging.folder_of(folder)) and any(folder.glob("*.tar")):
        return [f"{folder}: holds tars that {PACKED_BY} did not make; choose another --name"]
    return []


def inputs_fingerprint(jobs: Sequence[Job], arguments: dict, skipped: Sequence[BadFile]) -> str:
    """A fingerprint of all inputs of a dataset. It covers file times, so it is not part of dataset.json."""
    identity = json.dumps([VERSION, [job.fingerprint for job in jobs], arguments, skipped])
    return hashlib.sha256(identity.encode()).hexdigest()


def is_packed(folder: Path, fingerprint: str) -> bool:
    """Whether the folder holds the complete dataset of these inputs."""
    try:
        if (staging.folder_of(folder) / staging.INPUTS).read_text() != fingerprint:
            return False
        parts = read_description(folder)["splits"].values()
        sizes = {shard["file"]: shard["bytes"] for part in parts for shard in part["shards"]}
        index = [entry["name"] for part in parts for entry in part["index"].values()]
        return all((folder / file).stat().st_size == size for file, size in sizes.items()) and all(
            exists(folder / file) for file in index
        )
    except (FileNotFoundError, UserError):
        return False


def finish(
    folder: Path,
    classes: Sequence[str],
    encoding: Encoding,
    arguments: dict,
    outcomes: Sequence[Outcome],
    skipped: Sequence[BadFile],
    fingerprint: str,
) -> None:
    """Write the index and dataset.json, and move all files into place."""
    indexes: dict[str, list[TarIndex]] = {outcome.job.split: [] for outcome in outcomes}
    for outcome in outcomes:
        contents = outcome.contents
        assert contents is not None, "bad files that are not skipped have ended the command"
        if len(contents.samples):  # all of a shard's files may have been skipped
            indexes[outcome.job.split].append(contents)
    missing = [split for split, found in indexes.items() if not found]
    if missing:
        raise UserError(*(f"split {split}: none of its files can be packed" for split in missing))
    staged = staging.folder_of(folder)
    splits = {
        split: write_split(staged, folder.name, split, classes, sorted(found, key=lambda i: i.shard.file))
        for split, found in sorted(indexes.items())
    }
    skipped = sorted([*skipped, *(bad for outcome in outcomes for bad in outcome.bad)])
    lines = "".join(f"{one_line(path)}\t{one_line(reason)}\n" for path, reason in skipped)
    for name, text in ((staging.SKIPPED_LIST, lines), (staging.NEW_INPUTS, fingerprint)):
        replace_file(staged / name, text.encode(errors="backslashreplace"))
    made_by = {"tool": PACKED_BY, "version": VERSION, "library": library_version(encoding), "arguments": arguments}
    total = sum(len(index.samples) for found in indexes.values() for index in found)
    write_description(staged, folder.name, classes, encoding.text, made_by, splits, _notes(outcomes, total))
    staging.put_into_place(folder)


def _notes(outcomes: Sequence[Outcome], total: int) -> list[str]:
    """A sentence on each peculiarity that occurs; `total` is the number of files."""
    notes = []
    for name, text in PECULIARITIES.items():
        keys = [key for outcome in sorted(outcomes, key=lambda o: o.job.path) for key in outcome.peculiar[name]]
        if keys:
            notes.append(f"{len(keys):,} of {total:,} files have {text}; the first is {keys[0]}")
    return notes

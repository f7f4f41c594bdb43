"""Packing a source into a dataset: everything is listed and checked before anything is written.

Packing is done once and offline, so training runs do not pay for it. The same command continues after a stop or a kill.
Rejected alternative: guessing where the input is ambiguous (mixed folders, bad files). All such problems
are reported at once.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from bfsys.data.media.encodings import Encoding, Fitting
from bfsys.data.packing import shard_jobs, staging
from bfsys.data.packing.checks import check_files
from bfsys.data.packing.left_out import left_out_note
from bfsys.data.packing.listing import BadFile, Listing, list_filelist, list_speech_commands, list_tree
from bfsys.data.packing.splits import split_of_name
from bfsys.data.packing.workers import write_jobs
from bfsys.data.storage.description import seen_from
from bfsys.errors import UserError, counted, one_line, some
from bfsys.files import exists, is_dir
from bfsys.process import usable_cores

DEFAULT_VAL_SHARE = 0.1
# Extensions of files that cameras, phones and tools for labelling write beside each picture or sound
SIDECARS = {".aae", ".csv", ".json", ".thm", ".txt", ".xml", ".xmp", ".yaml", ".yml"}
SECONDS_BETWEEN_LINES = 15  # between lines of progress if there is no terminal for a progress bar


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The files to pack, and how to pack them."""

    src: Path
    folder: Path
    """Folder of the dataset; its name is the name of the dataset."""
    layout: str
    """tree, imagefolder, filelist or speech_commands: how SRC gives classes and splits."""
    subdir: str = ""
    split: str | None = None
    """The split of all files."""
    splits: str | None = None
    """The splits to pack, separated by commas."""
    val_share: float | None = None
    encoding: Encoding
    fitting: Fitting
    shard_bytes: int = 100_000_000
    max_file_bytes: int | None = None
    skip_bad: bool
    workers: int = field(default_factory=usable_cores)
    seed: int = 0
    known_bad: Mapping[str, str] = field(default_factory=dict)
    """Files to leave out, with the reasons, as `staging.skipped_files` of another encoding of them returns them."""

    @property
    def share_for_val(self) -> float:
        return DEFAULT_VAL_SHARE if self.val_share is None else self.val_share


def pack(packing: Packing, problems: Sequence[str] = ()) -> bool:
    """Write the dataset, unless it exists already. Returns whether it was written. Files left out are named on standard
    error.

    Raises UserError with the caller's `problems` and all others.
    """
    folder, problems = packing.folder, list(problems)
    staging.recover(folder)
    listing = list_source(packing)
    if packing.splits:
        keep_splits(listing, packing.splits.split(","))
    check_files(listing, packing.max_file_bytes, packing.encoding, packing.share_for_val)
    reasons = [packing.known_bad.get(one_line(file.path)) for file in listing.files]
    listing.bad += [BadFile(file.path, why) for file, why in zip(listing.files, reasons, strict=True) if why]
    listing.files = [file for file, why in zip(listing.files, reasons, strict=True) if not why]
    if left_out := left_out_note(listing.left_out):
        print(f"{packing.src}: {left_out}", file=sys.stderr)
    for note in filter(None, (note_on_splits_in_classes(packing.src, listing), note_on_sidecars(listing))):
        print(f"{packing.src}: note: {note}", file=sys.stderr)
    problems += listing.problems
    if packing.val_share is not None and listing.files and not listing.divided:
        problems.append("--val-share: has no effect here, since --split or the input gives the splits; drop it")
    splits = set() if listing.problems else {file.split for file in listing.files}
    problems += shard_jobs.target_problems(folder, splits)
    if not packing.skip_bad:
        problems += name_bad_files(listing.bad)
    if problems:
        raise UserError(*problems)
    jobs = shard_jobs.plan_jobs(
        folder, listing.files, listing.classes, packing.encoding, packing.fitting, packing.shard_bytes, packing.seed
    )
    try:
        with staging.locked(folder):
            return write(packing, jobs, listing)
    except OSError as error:  # only from writing: unreadable files are handled before
        raise UserError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}); fix this and run "
            f"the same command again; finished shards are kept"
        ) from error


def write(packing: Packing, jobs: Sequence[shard_jobs.Job], listing: Listing) -> bool:
    """Write the dataset, unless it exists already. Returns whether it was written. The folder is locked."""
    folder = packing.folder
    problems = shard_jobs.target_problems(folder, {job.split for job in jobs})  # another may have packed meanwhile
    if problems:
        raise UserError(*problems)
    given = {
        "from": packing.layout,
        "subdir": packing.subdir,
        "split": packing.split,
        "val_share": packing.share_for_val if listing.divided else None,
        **({"splits": packing.splits} if packing.splits else {}),
        **asdict(packing.fitting),
        "shard_bytes": packing.shard_bytes,
        "max_file_bytes": packing.max_file_bytes,
        "skip_bad": packing.skip_bad,
        "seed": packing.seed,
    }
    fingerprint = shard_jobs.inputs_fingerprint(jobs, given, listing.bad)
    is_new = not shard_jobs.is_packed(folder, fingerprint)
    if is_new:
        staging.start(folder)
        outcomes = write_all(jobs, packing.workers, packing.skip_bad)
        shard_jobs.finish(folder, listing.classes, packing.encoding, given, outcomes, listing.bad, fingerprint)
    staging.tidy(folder)
    return is_new


def list_source(packing: Packing) -> Listing:
    if not exists(packing.src):
        return Listing(problems=[f"{packing.src}: there is no such file or folder{seen_from(packing.src)}"])
    if packing.layout == "filelist":
        return list_filelist(packing.src, packing.split)
    if not is_dir(packing.src):
        remedy = "unpack it if it is an archive; for a list of files, give --from filelist"
        return Listing(problems=[f"{packing.src}: is not a folder; {remedy}"])
    if packing.layout == "speech_commands":
        return list_speech_commands(packing.src)
    return list_tree(packing.src, packing.subdir, packing.split, split_folders=packing.layout == "imagefolder")


def note_on_splits_in_classes(src: Path, listing: Listing) -> str:
    """A note if class folders hold split folders, which do not determine the splits; empty if there are none."""
    if not (listing.divided and is_dir(src)):
        return ""
    parts = (os.path.relpath(file.path, os.path.abspath(src)).split(os.sep, 2) for file in listing.files)
    splits = {f"{part[0]}/{part[1]}": split_of_name(part[1]) for part in parts if len(part) == 3}
    inner = sorted(name for name, split in splits.items() if split)
    if not {splits[name] for name in inner} > {"train"}:  # a folder `test` alone may hold any files
        return ""
    return (
        f"the split folders in class folders ({some(inner, 3)}) are not used as splits: packing chooses the validation "
        "files itself. To use them, put the class folders into split folders"
    )


def note_on_sidecars(listing: Listing) -> str:
    """A note if files seem to describe others, as a.json or a.jpg.json does beside a.jpg; empty if there are none."""
    parts = [os.path.splitext(file.path) for file in listing.files]
    may_describe = [(stem, extension) for stem, extension in parts if extension.lower() in SIDECARS]
    if not may_describe:
        return ""
    others = {name for stem, extension in set(parts).difference(may_describe) for name in (stem, stem + extension)}
    sidecars = sorted("/".join(stem.split(os.sep)[-2:]) + end for stem, end in may_describe if stem in others)
    if not sidecars:
        return ""
    return (
        f"{counted(len(sidecars), 'file')} may only describe others of the same name ({one_line(some(sidecars, 3))}). "
        "Each of them becomes a sample; if they are not samples, move them out"
    )


def keep_splits(listing: Listing, wanted: Sequence[str]) -> None:
    """Remove the files of other splits; the classes stay."""
    present = {file.split for file in listing.files}
    wanted = [split_of_name(split) or split for split in wanted]
    if listing.files and listing.divided:
        listing.problems.append("--splits: SRC has no splits to choose from; --split puts all files into one")
    elif listing.files:
        listing.problems += [
            f"--splits: got {split!r}, SRC has {', '.join(sorted(present))}" for split in wanted if split not in present
        ]
    listing.files = [file for file in listing.files if file.split in wanted]


def name_bad_files(bad: Sequence[BadFile]) -> list[str]:
    if not bad:
        return []
    return [
        *(f"{path}: {reason}" for path, reason in bad),
        f"{counted(len(bad), 'bad file')}: repair or remove them, or leave them out with --skip-bad",
    ]


def write_all(jobs: Sequence[shard_jobs.Job], workers: int, skip_bad: bool) -> list[shard_jobs.Outcome]:
    outcomes = []
    with progress(sum(file.size_bytes for job in jobs for file in job.files)) as advance:
        for outcome in write_jobs(jobs, workers, skip_bad):
            advance(sum(file.size_bytes for file in outcome.job.files))
            outcomes.append(outcome)
    if not skip_bad:
        bad = name_bad_files(sorted(bad for outcome in outcomes for bad in outcome.bad))
        if bad:
            raise UserError(*bad)
    return outcomes


@contextmanager
def progress(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show progress on standard error: a bar on a terminal, otherwise a line at intervals."""
    if sys.stderr.isatty():
        with Progress(console=Console(stderr=True), transient=True) as shown:
            task = shown.add_task("packing", total=total_bytes)
            yield lambda more_bytes: shown.update(task, advance=more_bytes)
        return
    done_bytes, last_line_s = 0, time.monotonic()

    def advance(more_bytes: int) -> None:
        nonlocal done_bytes, last_line_s
        done_bytes += more_bytes
        if time.monotonic() - last_line_s > SECONDS_BETWEEN_LINES:
            print(f"packed {done_bytes / total_bytes:.0%} of {total_bytes:,} bytes", file=sys.stderr)
            last_line_s = time.monotonic()

    yield advance

"""Pack files into WebDataset shards with an index, ready for training.

    python tools/pack.py photos packed --name photos
    python tools/pack.py imagenet packed --name imagenet-jpeg60 --encoding jpeg:60 --image-size 224
    python tools/pack.py speech_commands_v2 packed --name speech --from speech_commands

Packing is offline and done once: what it costs here, no training run pays again. Run it again after it
was stopped or killed, and it continues. Refused: guessing at anything that the input leaves open (mixed
folders, bad files, name clashes); all of it is named at once, before anything is written.
"""

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.progress import Progress

from bfsys.data.media.encodings import AS_STORED, Encoding, Fitting, parse_encoding
from bfsys.data.media.sounds import HIGHEST_RATE_HZ, LOWEST_RATE_HZ
from bfsys.data.packing import shard_jobs, staging
from bfsys.data.packing.left_out import left_out_note
from bfsys.data.packing.listing import (
    BadFile,
    Listing,
    check_files,
    list_filelist,
    list_speech_commands,
    list_tree,
)
from bfsys.data.packing.splits import split_of_name
from bfsys.data.packing.workers import write_jobs
from bfsys.data.storage.shards import read_description, seen_from, summarise
from bfsys.errors import UserError, run_command, summary_of

SIZE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
DEFAULT_VAL_SHARE = 0.1
SECONDS_BETWEEN_LINES = 15  # of progress, where there is no terminal to draw a bar on


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=summary_of(__doc__),
        epilog="Sizes are bytes, or 500K, 100M, 2G. Encodings: as_stored, tiff, png, jpeg[:QUALITY], fhwc, "
        "fchw, wav:uint8|int16|int32|float32, mp3, flac.",
    )
    add = parser.add_argument
    add("src", metavar="SRC", type=Path, help="folder of files by class, or a list of files")
    add("out", metavar="OUT", type=Path, help="the dataset becomes the folder OUT/NAME")
    add("--name", required=True)
    add(
        "--from",
        dest="layout",
        choices=("tree", "imagefolder", "filelist", "speech_commands"),
        default="tree",
        help="tree: SRC/[SPLIT/]CLASS/… (default); imagefolder: SRC/SPLIT/CLASS/…, other folders are left "
        "out; filelist: SRC has lines of path<TAB>class[<TAB>split]; speech_commands: the extracted archive",
    )
    add("--subdir", default="", help="class folders lie in SRC/[SPLIT/]SUBDIR")
    add("--split", help="put all files into this split")
    add("--splits", metavar="LIST", help="of the splits that SRC has, pack these only, such as val,test")
    add("--val-share", type=float, help=f"share of the files for val (default {DEFAULT_VAL_SHARE})")
    add("--encoding", default=AS_STORED, help="decode files and encode them like this (default: leave them as stored)")
    add("--image-size", type=int, metavar="N", help="resize and crop to N × N pixels before encoding")
    add("--sample-rate", type=int, metavar="HZ", help="resample before encoding")
    add("--seconds", type=float, metavar="S", help="cut or fill up to S seconds before encoding")
    add("--shard-bytes", default="100M", metavar="SIZE", help="of source files per shard (default 100M)")
    add("--max-file-bytes", metavar="SIZE", help="larger files are bad")
    add("--skip-bad", action="store_true", help="leave bad files out, and list them in skipped.txt")
    add("--workers", type=int, metavar="N", help="processes (default: one per CPU core)")
    add("--seed", type=int, default=0, help="of the order of the samples (default 0)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    started_s = time.monotonic()
    args = parse_arguments(arguments)
    folder = args.out / args.name
    problems: list[str] = []
    encoding, fitting = read_encoding(args, problems)
    args.split = (split_of_name(args.split) or args.split) if args.split else None
    shard_bytes = read_size("--shard-bytes", args.shard_bytes, problems)
    max_file_bytes = None
    if args.max_file_bytes is not None:
        max_file_bytes = read_size("--max-file-bytes", args.max_file_bytes, problems)
    problems += option_problems(args)
    staging.recover(folder)
    listing = list_source(args)
    if args.splits:
        keep_splits(listing, args.splits.split(","))
    check_files(listing, max_file_bytes, encoding, share_for_val(args))
    left_out = left_out_note(listing.left_out)
    if left_out:
        print(f"{args.src}: {left_out}", file=sys.stderr)
    problems += listing.problems
    if args.val_share is not None and listing.files and not listing.divided:
        problems.append("--val-share: has no effect here, since the splits are given otherwise; drop it")
    splits = set() if listing.problems else {file.split for file in listing.files}
    problems += shard_jobs.target_problems(folder, splits)
    if not args.skip_bad:
        problems += name_bad_files(listing.bad)
    if problems:
        raise UserError(*problems)

    given = {
        "from": args.layout,
        "subdir": args.subdir,
        "split": args.split,
        "val_share": share_for_val(args) if listing.divided else None,
        **({"splits": args.splits} if args.splits else {}),
        **asdict(fitting),
        "shard_bytes": shard_bytes,
        "max_file_bytes": max_file_bytes,
        "skip_bad": args.skip_bad,
        "seed": args.seed,
    }
    jobs = shard_jobs.plan_jobs(folder, listing.files, listing.classes, encoding, fitting, shard_bytes, args.seed)
    try:
        with staging.locked(folder):
            is_new = pack(folder, jobs, listing, encoding, given, args)
    except OSError as error:  # of writing: files that cannot be read have been sorted out
        raise UserError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}); put that right and run "
            f"the same command again: finished shards are kept"
        ) from error
    print(f"{folder}: packed in {time.monotonic() - started_s:.1f} s" if is_new else f"{folder}: already packed")
    print_summary(folder, left_out)


def pack(
    folder: Path,
    jobs: Sequence[shard_jobs.Job],
    listing: Listing,
    encoding: Encoding,
    given: dict,
    args: argparse.Namespace,
) -> bool:
    """Write the dataset, unless it is there already; whether it was written. The folder is locked."""
    problems = shard_jobs.target_problems(folder, {job.split for job in jobs})  # another may have packed meanwhile
    if problems:
        raise UserError(*problems)
    fingerprint = shard_jobs.inputs_fingerprint(jobs, given, listing.bad)
    is_new = not shard_jobs.is_packed(folder, fingerprint)
    if is_new:
        staging.start(folder)
        outcomes = write_all(jobs, args.workers or len(os.sched_getaffinity(0)), args.skip_bad)
        shard_jobs.finish(folder, listing.classes, encoding, given, outcomes, listing.bad, fingerprint)
    staging.tidy(folder)
    return is_new


def read_encoding(args: argparse.Namespace, problems: list[str]) -> tuple[Encoding, Fitting]:
    """The encoding asked for and what is to be done before it."""
    try:
        encoding = parse_encoding(args.encoding)
    except UserError as error:
        problems += [f"--encoding: {problem}" for problem in error.problems]
        return Encoding(AS_STORED), Fitting()
    for option, value, modality in (
        ("--image-size", args.image_size, "image"),
        ("--sample-rate", args.sample_rate, "audio"),
        ("--seconds", args.seconds, "audio"),
    ):
        if value is not None and not (value > 0 and math.isfinite(value)):
            problems.append(f"{option} {value}: must be a number above 0")
        if value is not None and encoding.modality != modality:
            problems.append(f"{option} {value}: needs an encoding for {modality}, got {encoding.text}")
    if args.sample_rate and not LOWEST_RATE_HZ <= args.sample_rate <= HIGHEST_RATE_HZ:
        problems.append(f"--sample-rate {args.sample_rate}: must be {LOWEST_RATE_HZ:,} to {HIGHEST_RATE_HZ:,} Hz")
    return encoding, Fitting(args.image_size, args.sample_rate, args.seconds)


def read_size(option: str, text: str, problems: list[str]) -> int:
    found = re.fullmatch(r"([0-9]+)([KMG]?)", text)
    size_bytes = int(found[1]) * SIZE_UNITS[found[2]] if found else 0
    if size_bytes == 0:
        problems.append(f"{option} {text}: must be a number of bytes above 0, such as 500000, 500K, 100M or 2G")
    return size_bytes


def option_problems(args: argparse.Namespace) -> list[str]:
    """Options that are wrong in themselves or have no effect together."""
    problems = []
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", args.name):
        problems.append(f"--name {args.name!r}: may hold letters, digits, _ - . only")
    if args.split is not None and not re.fullmatch(r"[A-Za-z0-9_]+", args.split):
        problems.append(f"--split {args.split!r}: may hold letters, digits and _ only")
    if not 0 <= share_for_val(args) < 1:
        problems.append(f"--val-share {args.val_share}: must be 0 or more, and below 1")
    if args.split and args.layout in ("imagefolder", "speech_commands"):
        problems.append(f"--split: has no effect with --from {args.layout}, which has its own splits; drop it")
    if args.subdir and args.layout in ("filelist", "speech_commands"):
        problems.append(f"--subdir: has no effect with --from {args.layout}; drop it")
    if args.workers is not None and args.workers < 1:
        problems.append(f"--workers {args.workers}: must be 1 or more")
    if Path(os.path.realpath(args.out / args.name)).is_relative_to(os.path.realpath(args.src)):
        problems.append(f"{args.out / args.name}: lies in SRC, and would be packed next time; choose another OUT")
    return problems


def share_for_val(args: argparse.Namespace) -> float:
    return DEFAULT_VAL_SHARE if args.val_share is None else args.val_share


def list_source(args: argparse.Namespace) -> Listing:
    if not args.src.exists():
        return Listing(problems=[f"{args.src}: there is no such file or folder{seen_from(args.src)}"])
    if args.layout == "filelist":
        return list_filelist(args.src, args.split)
    if not args.src.is_dir():
        return Listing(problems=[f"{args.src}: is not a folder; for a list of files say --from filelist"])
    if args.layout == "speech_commands":
        return list_speech_commands(args.src)
    return list_tree(args.src, args.subdir, args.split, split_folders=args.layout == "imagefolder")


def keep_splits(listing: Listing, wanted: Sequence[str]) -> None:
    """Leave out the files of other splits; the classes stay."""
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
        f"{len(bad):,} bad file{'s' * (len(bad) > 1)}: repair or remove, or leave out by --skip-bad",
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
    """A bar on a terminal, and now and then a line elsewhere; both on stderr."""
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


def print_summary(folder: Path, left_out: str) -> None:
    print(summarise(read_description(folder)))
    if left_out:
        print(f"  {left_out}")
    if (folder / staging.SKIPPED_LIST).exists():
        skipped = (folder / staging.SKIPPED_LIST).read_text(encoding="utf-8").count("\n")
        files = "file" if skipped == 1 else "files"
        print(f"  left out: {skipped:,} bad {files}, named in {folder / staging.SKIPPED_LIST}")
    print(f"use it by:\ndata:\n  sources:\n    - path: {folder}")


if __name__ == "__main__":
    run_command(main, output_is_optional=True)

"""Show, check or rebuild the index of a packed dataset.

Rejected alternative: a quick check of random samples. It would miss most damage, and reading everything is fast.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bfsys import console
from bfsys.errors import UserError, counted, one_line

if TYPE_CHECKING:
    from bfsys.data.storage.shards import Split

EXIT_DAMAGED = 1
NOTES = """\
Exit code 0: no problem; 1: --verify found damage; 2: wrong input."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = NOTES
    add = parser.add_argument
    add("dataset", metavar="DATASET", help="folder of a packed dataset")
    add("--split", help="this split only; with --rebuild, the split that all tars belong to")
    add("--list", type=int, default=0, metavar="N", help="show the first N samples of each split")
    add("--verify", action="store_true", help="read every byte and report all damage")
    add("--rebuild", action="store_true", help="index WebDataset tars that were made elsewhere")


def run(args: argparse.Namespace) -> int:
    try:
        return inspect(args)
    except console.OutputError:
        raise
    except OSError as error:  # exit code 1 would mean damaged data
        raise UserError(f"{error.filename or args.dataset}: {error.strerror or error}") from None


def inspect(args: argparse.Namespace) -> int:
    from bfsys.data.storage.description import summarise
    from bfsys.data.storage.shards import open_dataset
    from bfsys.locations import is_remote

    if is_remote(args.dataset):
        raise UserError(
            f"{args.dataset}: inspect takes a folder on this machine; copy the dataset into one, or give its URL as "
            "the path of a source in a config, and run bfsys train CONFIG --dry-run"
        )
    args.dataset = Path(args.dataset)
    if args.list < 0:
        raise UserError(f"--list: got {args.list}; 0 or more samples are allowed")
    if args.rebuild:
        from bfsys.data.packing.rebuild import rebuild

        rebuild(args.dataset, args.split)
    dataset = open_dataset(args.dataset)
    names = [args.split] if args.split else dataset.splits
    splits = [dataset.open(name) for name in names]
    # Before anything is printed: after `… | head -n 1`, code 0 would mean that all is intact.
    problems = [problem for split in splits if args.verify for problem in verify(split)]
    if problems:
        console.go_on_without()
    described = dataset.description["splits"]
    print(summarise({**dataset.description, "splits": {name: described[name] for name in names}}))
    if problems:
        for problem in problems:
            print(f"damage: {one_line(problem)}", file=sys.stderr)
        return EXIT_DAMAGED
    for split in splits:
        if args.list:
            list_samples(split, args.list)
        else:
            list_shards(split)
    if args.verify:
        print(f"intact: all {sum(map(len, splits)):,} samples match their checksums")
    return 0


def list_shards(split: Split) -> None:
    for shard in split.shards:
        print(f"    {shard.file}: {counted(shard.samples, 'sample')}, {shard.bytes:,} bytes")


def list_samples(split: Split, count: int) -> None:
    print(f"{split.split}: key, class, bytes, shard, offset")
    for i in range(min(count, len(split))):
        row = split.samples[i]
        place = f"{split.shards[row['shard']].file}\t{row['offset']}"
        print(f"{one_line(split.key(i))}\t{one_line(split.classes[row['label']])}\t{row['length']}\t{place}")


def verify(split: Split) -> list[str]:
    from rich.console import Console
    from rich.progress import track

    from bfsys.data.packing.verify import verify_index, verify_shard

    problems = verify_index(split)
    numbers: Iterable[int] = range(len(split.shards))
    if sys.stderr.isatty():
        numbers = track(numbers, f"verifying {split.split}", console=Console(stderr=True), transient=True)
    for number in numbers:
        problems += verify_shard(split, number)
    return problems

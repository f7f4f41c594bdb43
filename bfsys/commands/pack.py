"""Pack files into WebDataset shards with an index, ready for training."""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bfsys.commands.arguments import add_encoding, local_path, read_encoding
from bfsys.errors import one_line
from bfsys.process import usable_cores

if TYPE_CHECKING:
    from bfsys.data.packing.pack import Packing

SIZE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
NOTES = """\
LAYOUT  tree: SRC/[SPLIT/]CLASS/… (default); imagefolder: SRC/SPLIT/CLASS/…,
        other folders are left out; filelist: SRC has lines of
        path<TAB>class[<TAB>split]; speech_commands: the extracted archive
SIZE    bytes, or 500K, 100M, 2G
E       tiff, png, jpeg[:QUALITY], fhwc, fchw, wav:uint8|int16|int32|float32,
        mp3, flac, or as_stored (default)
The same command continues after a stop."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s SRC OUT --name NAME [OPTION …]", NOTES
    add = parser.add_argument
    add("src", metavar="SRC", type=local_path, help="folder of files by class, or a list of files")
    add("out", metavar="OUT", type=local_path, help="the dataset becomes the folder OUT/NAME")
    add("--name", required=True, help="name of the dataset")
    add(
        "--from",
        dest="layout",
        choices=("tree", "imagefolder", "filelist", "speech_commands"),
        default="tree",
        metavar="LAYOUT",
        help="how SRC is organised",
    )
    add("--subdir", default="", help="class folders lie in SRC/[SPLIT/]SUBDIR")
    add("--split", help="put all files into this split")
    add("--splits", metavar="LIST", help="pack only these splits of SRC, such as val,test")
    add("--val-share", type=float, metavar="X", help="share of the files for val (default 0.1)")
    add_encoding(parser)
    add("--shard-bytes", default="100M", metavar="SIZE", help="source bytes per shard (default 100M)")
    add("--max-file-bytes", metavar="SIZE", help="treat larger files as bad")
    add("--skip-bad", action="store_true", help="leave bad files out; list them in skipped.txt")
    add("--workers", type=int, metavar="N", help="processes (default: one per CPU core)")
    add("--seed", type=int, default=0, help="seed of the order of the samples (default 0)")


def run(args: argparse.Namespace) -> None:
    started_s = time.monotonic()
    from bfsys.data.packing.pack import Packing, pack
    from bfsys.data.packing.splits import split_of_name

    problems: list[str] = []
    encoding, fitting = read_encoding(args, problems)
    packing = Packing(
        src=args.src,
        folder=args.out / args.name,
        layout=args.layout,
        subdir=args.subdir,
        split=(split_of_name(args.split) or args.split) if args.split else None,
        splits=args.splits,
        val_share=args.val_share,
        encoding=encoding,
        fitting=fitting,
        shard_bytes=read_size("--shard-bytes", args.shard_bytes, problems),
        max_file_bytes=None
        if args.max_file_bytes is None
        else read_size("--max-file-bytes", args.max_file_bytes, problems),
        skip_bad=args.skip_bad,
        workers=args.workers or usable_cores(),
        seed=args.seed,
    )
    problems += option_problems(args, packing)
    is_new = pack(packing, problems)
    took = f"packed in {time.monotonic() - started_s:.1f} s" if is_new else "already packed"
    print(one_line(f"{packing.folder}: {took}"))
    print_summary(packing.folder)


def read_size(option: str, text: str, problems: list[str]) -> int:
    found = re.fullmatch(r"([0-9]+)([KMG]?)", text)
    size_bytes = int(found[1]) * SIZE_UNITS[found[2]] if found else 0
    if size_bytes == 0:
        problems.append(f"{option} {text}: must be a number of bytes above 0, such as 500000, 500K, 100M or 2G")
    return size_bytes


def option_problems(args: argparse.Namespace, packing: Packing) -> list[str]:
    """Return the problems of single options and of combinations without effect."""
    problems = []
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", args.name):
        problems.append(
            f"--name {args.name!r}: may hold letters, digits, _ - . only, and begins with a letter, a digit or _"
        )
    if packing.split is not None and not re.fullmatch(r"[A-Za-z0-9_]+", packing.split):
        problems.append(f"--split {args.split!r}: may hold letters, digits and _ only")
    if not 0 <= packing.share_for_val < 1:
        problems.append(f"--val-share {args.val_share}: must be 0 or more, and below 1")
    if args.split and args.layout in ("imagefolder", "speech_commands"):
        problems.append(f"--split: has no effect with --from {args.layout}, which has its own splits; drop it")
    if args.subdir and args.layout in ("filelist", "speech_commands"):
        problems.append(f"--subdir: has no effect with --from {args.layout}; drop it")
    if args.workers is not None and args.workers < 1:
        problems.append(f"--workers {args.workers}: must be 1 or more")
    if Path(os.path.realpath(packing.folder)).is_relative_to(os.path.realpath(args.src)):
        problems.append(f"{packing.folder}: lies in SRC, so the next run would pack it too; choose another OUT")
    return problems


def print_summary(folder: Path) -> None:
    from bfsys.data.packing import staging
    from bfsys.data.storage.description import read_description, summarise

    print(summarise(read_description(folder)))
    if note := staging.note_on_skipped(folder):
        print(f"  {note}")
    print(f"to train on it, put these lines into a config:\ndata:\n  sources:\n    - path: {one_line(str(folder))}")

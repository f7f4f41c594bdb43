"""Write files in the form that a model reads: re-encoded, and their bytes transformed."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from contextlib import nullcontext

from bfsys.commands.arguments import add_encoding, local_path, read_encoding
from bfsys.errors import UserError, collecting, counted

NOTES = """\
E: see `bfsys pack --help`; T: as in data.byte_transforms. The same command
continues after a stop. If the run has the same data.byte_transforms, use
`bfsys predict RUN OUT --transformed`. docs/privacy.md: what transforms protect.

  bfsys encode photo.jpg out --encoding tiff --image-size 224
  bfsys encode photos out --encoding fhwc --image-size 224 --transform keep:0.1
  bfsys encode photos out --transform permute:my.key"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s SRC OUT [OPTION …]", NOTES
    add = parser.add_argument
    add("src", metavar="SRC", type=local_path, help="a file, or a folder whose tree is kept in OUT")
    add("out", metavar="OUT", type=local_path, help="folder")
    add_encoding(parser)
    add("--transform", action="append", default=[], metavar="T", help="for example permute:my.key; repeatable")


def run(args: argparse.Namespace) -> None:
    from bfsys.data.media.pictures import PECULIARITIES
    from bfsys.data.streaming.byte_transforms import ByteTransform, parse_transforms
    from bfsys.encode import Notes, kept_of, locked, make, targets_of

    problems: list[str] = []
    encoding, fitting = read_encoding(args, problems)
    transforms: tuple[ByteTransform, ...] = ()
    with collecting(problems):
        transforms = parse_transforms(args.transform)
    targets = targets_of(args.src, args.out, encoding, problems)
    notes = Notes(args.out, encoding, fitting, transforms)
    with collecting(problems):
        kept = kept_of(targets, notes, problems)
    if problems:
        raise UserError(*problems)
    written = 0
    failed: list[str] = []
    peculiar: Counter[str] = Counter()
    with locked(args.out, targets.values()) if len(kept) < len(targets) else nullcontext():
        kept = kept_of(targets, notes, problems)  # another process may have made some of them meanwhile
        if problems:
            raise UserError(*problems)
        with collecting(failed):  # a file that cannot be written ends the loop
            for source, target in targets.items():
                if target not in kept:
                    problem = make(source, target, encoding, fitting, transforms, notes, peculiar)
                    failed += [problem] if problem else []
                    written += not problem
    print(f"{args.out}: {counted(written, 'file')}" + (f", and {len(kept):,} from an earlier start" if kept else ""))
    for name, count in peculiar.items():
        print(f"note: {count:,} of {counted(written, 'file')} have {PECULIARITIES[name]}", file=sys.stderr)
    if failed:
        missing = len(targets) - len(kept) - written
        raise UserError(
            *failed, f"{missing:,} of {len(targets):,} files were not written; run the same command again to continue"
        )

"""Predict the classes of any files from their bytes alone."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bfsys.commands.arguments import add_precision, add_weights
from bfsys.errors import UserError, counted, one_line

if TYPE_CHECKING:
    from bfsys.inputs import Input

STDIN = "-"
NOTES = """\
Files that cannot be classified are named at the end, with exit code 2. A note
names the first file that has none of the formats of the training files
(--encode converts it). Another note names the first file that is unlike the
run's files (out-of-distribution score above 1)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s RUN FILE… [OPTION …]", NOTES
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory (runs/NAME), one of its checkpoints, or an export")
    add("files", nargs="+", metavar="FILE", help="files, folders, or - for standard input")
    add("--top", type=int, default=3, metavar="K", help="classes to show for each file (default: 3)")
    add_weights(parser)
    add_precision(parser)
    add("--encode", action="store_true", help="convert pictures and sounds to the model's format")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--permute", metavar="KEYFILE", help="path of the key file used in training")
    key.add_argument(
        "--transformed", action="store_true", help="the run's byte_transforms are already applied to the files"
    )
    add("--json", action="store_true", help='print [{"path", "top": [{"class", …}], …}]')


def run(args: argparse.Namespace) -> int:
    if args.top < 1:
        raise UserError(f"--top: got {args.top}; at least 1 is needed")
    if args.encode and args.transformed:
        raise UserError("--encode: files that were transformed before cannot be decoded; leave out one of the options")
    from bfsys.out_of_distribution import text_of
    from bfsys.predict import load

    model = load(
        args.run, weights=args.weights, precision=args.precision, permute=args.permute, transformed=args.transformed
    )
    problems: list[str] = []
    answers = []
    inputs = named_inputs(args.files, problems)
    for path, classes, score in model.answers(inputs, problems, _note, top=args.top, encode=args.encode):
        ranked = [c.to_dict() for c in classes]
        answers.append({"path": path, "top": ranked} | ({} if score is None else {"out_of_distribution": score}))
        if not args.json:
            shown = "   ".join(f"{c.class_name} {100 * c.probability:.1f} %" for c in classes)
            unlike = f"   (out-of-distribution score: {text_of(score)})" if score is not None and score > 1 else ""
            print(one_line(f"{path}: {shown}{unlike}"), flush=True)
    if args.json:
        print(json.dumps(answers, indent=1))
    if problems:
        total = f"{counted(len(problems), 'problem')}; {counted(len(answers), 'file')} classified"
        raise UserError(*problems, *([total] if len(problems) > 1 else []))
    return 0


def named_inputs(paths: Sequence[str], problems: list[str]) -> Iterator[tuple[str, Input]]:
    """Yield files, the files of folders and standard input, each with its path."""
    from bfsys.data.packing.folders import regular_files

    for path in paths:
        if path == STDIN and sys.stdin is None:
            problems.append(f"{STDIN}: standard input is closed; give files, or pipe one in")
        elif path == STDIN:
            yield path, sys.stdin.buffer
        elif not path:
            problems.append("got an empty name; give files, or . for the current folder")
        else:
            names = regular_files(path, problems) if os.path.isdir(path) else [path]
            yield from ((name, Path(name)) for name in names)


def _note(text: str) -> None:
    print(one_line(text), file=sys.stderr, flush=True)

"""Show which bytes of a file decide its class; with --split, whether the model reads headers or lengths."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from bfsys import console
from bfsys.commands.arguments import add_weights, local_path
from bfsys.commands.predict import STDIN, named_inputs
from bfsys.errors import UserError, collecting, one_line, os_errors_as
from bfsys.explain.style import GENERATOR
from bfsys.files import LONGEST_NAME_BYTES, exists, open_regular, replace_file

if TYPE_CHECKING:
    from bfsys.predict import Model

FOLDER = Path("explain")
LIMIT = 200
MARKED = 300  # bytes at the start of a page that contain GENERATOR and the page's origin
NOTES = """\
Each FILE gets a page FOLDER/FILE.html, which needs no network. Evidence is
measured against files of the run's validation split (docs/explain.md)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s RUN FILE… | RUN --split SPLIT [OPTION …]", NOTES
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory, one of its checkpoints, or an export")
    add("files", nargs="*", default=[], metavar="FILE", help="files, folders, or - for standard input")
    add("--split", help="test for shortcuts on files of this split")
    add("--data", action="append", default=[], metavar="DATASET", help="use its files instead of the run's; repeatable")
    add("--limit", type=int, metavar="N", help=f"files of the split (default: {LIMIT})")
    add("--out", type=local_path, metavar="FOLDER", help=f"folder of pages (default: {FOLDER}; with --split: none)")
    add("--class", dest="class_name", metavar="NAME", help="class to explain (default: the likeliest)")
    add_weights(parser)
    add("--encode", action="store_true", help="convert pictures and sounds to the model's format")
    add("--permute", metavar="KEYFILE", help="path of the key file used in training")
    add("--seed", type=int, default=0, metavar="N", help="seed of the choice of reference files (default: 0)")
    add("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    if bool(args.files) == bool(args.split):
        raise UserError("give files to explain, or --split for a report on a split; not both")
    if args.split and (args.class_name or args.encode):
        raise UserError("--class and --encode are for files, and not for --split")
    if args.limit is not None and not args.split:
        raise UserError("--limit: is for --split; leave it out")
    if args.seed < 0:
        raise UserError(f"--seed: got {args.seed}; at least 0 is needed")
    if not args.json and (args.files or args.out):
        console.go_on_without()  # the pages are the result: after `… | head`, all of them are still written
    from bfsys.predict import load

    model = load(args.run, weights=args.weights, permute=args.permute)
    if args.data:
        from bfsys.data.streaming.datasets import no_such_split
        from bfsys.evaluate import with_datasets
        from bfsys.explain.references import open_split

        model.config = with_datasets(model.config, args.data, args.run)
        # Files are explained without references if there are none, but not if those that were asked for are missing.
        split = args.split or model.config.data.eval_split
        if not open_split(model.config, split, model.classes).splits:
            raise no_such_split(model.config, split)
    return _split(model, args) if args.split else _files(model, args)


def _files(model: Model, args: argparse.Namespace) -> int:
    from bfsys.explain.page import html

    if args.class_name is not None:
        model.class_index(args.class_name)
    folder = _folder(args.out or FOLDER)
    problems: list[str] = []
    results: list[dict] = []
    used: set[Path] = set()
    said: set[str] = set()
    for name, source in named_inputs(args.files, problems):
        explanation = None
        with collecting(problems), warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            explanation = model.explain(source, args.class_name, args.seed, encode=args.encode)
        for note in notes:
            text = str(note.message)
            if (what := text.removeprefix(name)) not in said:  # such as the format of all files
                said.add(what)
                print(one_line(text), file=sys.stderr, flush=True)
        if explanation is None:
            continue
        # A hash, since a page that is published should not show more of the path than the user gave.
        origin = hashlib.sha256(os.fsencode(os.path.abspath(name))).hexdigest()
        page = _page_of(name, origin, folder, used)
        _write(page, html(explanation, origin))
        results.append({**explanation.as_dict(), "page": str(page)})
        if not args.json:
            answer, one = explanation.predictions[0], explanation.explained
            scope = "" if one.index == answer.index else f"for {one.class_name} ({100 * one.probability:.1f} %), "
            shown = f"{answer.class_name} {100 * answer.probability:.1f} %; {scope}{explanation.summary()}"
            print(one_line(f"{name}: {shown}"))
            print(one_line(f"  {page}"), flush=True)
    if args.json:
        print(json.dumps(results, indent=1))
    if problems:
        raise UserError(*problems)
    return 0


def _split(model: Model, args: argparse.Namespace) -> int:
    from bfsys.explain.shortcuts_page import html, table

    folder = _folder(args.out) if args.out else None
    report = model.shortcuts(args.split, LIMIT if args.limit is None else args.limit, args.seed)
    facts = {"generator": GENERATOR, "run": str(args.run), "step": model.step, **report.as_dict()}
    text = json.dumps(facts, indent=1)
    pages = {folder / "shortcuts.html": html(report), folder / "shortcuts.json": text + "\n"} if folder else {}
    for page, content in pages.items():
        _write(page, content)
    print(text if args.json else table(report))
    if pages and not args.json:
        print("   ".join(map(str, pages)))
    return 0


def _folder(path: Path) -> Path:
    with os_errors_as(f"--out {path}: cannot be made"):
        path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"--out {path}: cannot be written; choose another folder")
    return path


def _page_of(name: str, origin: str, folder: Path, used: set[Path]) -> Path:
    """Return the path of a file's page, and add it to `used`. Files of the same name are numbered, also if an earlier
    command explained one of them."""
    # With a number and `.html`, the name must fit into the 255 bytes that file systems allow.
    stem = "standard-input" if name == STDIN else os.fsdecode(os.fsencode(Path(name).name)[:LONGEST_NAME_BYTES])
    page, number = folder / f"{stem}.html", 1
    while page in used or (GENERATOR.encode() in (head := _head(page)) and origin.encode() not in head):
        number += 1
        page = folder / f"{stem}-{number}.html"
    used.add(page)
    return page


def _head(path: Path) -> bytes:
    """The beginning of an existing page; empty if there is none."""
    try:
        with open_regular(path) as file:
            return file.read(MARKED)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; choose another --out") from None


def _write(path: Path, text: str) -> None:
    """Write or overwrite a page. Raises UserError if the file exists and is not a page of this command."""
    if GENERATOR.encode() not in _head(path) and exists(path):
        raise UserError(f"{path}: is not a page of `{GENERATOR}` and was not overwritten; choose another --out")
    with os_errors_as(f"{path}: cannot be written"):
        replace_file(path, text.encode(errors="backslashreplace"), durable=False)  # names may not be UTF-8

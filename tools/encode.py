"""Files as a model is given them: decoded and encoded again, and their bytes transformed.

    python tools/encode.py photo.jpg out --encoding tiff --image-size 224
    python tools/encode.py photos out --encoding fhwc --image-size 224 --transform keep:0.1
    python tools/encode.py photos out --transform permute:my.key

SRC is a file, or a folder whose tree is kept, so that OUT can be packed or given to bfsys.predict: as it is to a run
that was trained on such files, with --transformed to one whose data.byte_transforms are the same. Noise is drawn from
the system's entropy, another for every file and call. What transforms protect, and what not: docs/privacy.md.

The same command continues after a stop. OUT/.encoded.jsonl notes for every file, by a hash, what it was made from and
how: such a file is kept, and any other that exists is not overwritten.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from bfsys.data.media.encodings import AS_STORED, Encoding, Fitting, library_version, reencode
from bfsys.data.packing.listing import regular_files
from bfsys.data.streaming.byte_transforms import ByteTransform, apply, parse_transforms
from bfsys.errors import UserError, collecting, run_command, summary_of
from bfsys.files import replacing
from tools.pack import read_encoding

NOTES = ".encoded.jsonl"


class Notes:
    """What the files in OUT were made from, and how: a line for each, of which a later one counts more."""

    def __init__(self, out: Path, encoding: Encoding, fitting: Fitting, transforms: Sequence[ByteTransform]) -> None:
        """Raises UserError if notes are there and cannot be read."""
        self._out, self._path = out, out / NOTES
        self._how = [encoding.text, library_version(encoding), repr(fitting), *(t.identity for t in transforms)]
        self._noted: dict[str, str] = {}
        try:
            lines = self._path.read_bytes().splitlines()
        except (FileNotFoundError, NotADirectoryError):
            lines = []
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read: {error.strerror}") from None
        for line in lines:
            try:
                name, made_from = json.loads(line)
                self._noted[name] = made_from
            except (ValueError, TypeError):  # the end of a line that a full disk or a crash has cut, or other JSON
                continue

    def has(self, source: Path, target: Path) -> bool:
        """Whether a target that exists was made from the source as it is now, in the way that is asked for."""
        return self._noted.get(self._name(target)) == self.hash_of(source)

    def add(self, target: Path, made_from: str) -> None:
        """To be called before the target stands under its name: a stop in between must leave no file without a note."""
        with open(self._path, "ab") as file:
            # It begins with a line break, since the line before may have been cut
            file.write(b"\n" + json.dumps([self._name(target), made_from]).encode() + b"\n")

    def _name(self, target: Path) -> str:
        return str(target.relative_to(self._out))

    def hash_of(self, source: Path) -> str:
        """Hash of the source as it is now and of what is asked for. It tells neither to those who receive OUT."""
        status = source.stat()
        identity = [*self._how, str(source.resolve()), status.st_size, status.st_mtime_ns]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=summary_of(__doc__))
    add = parser.add_argument
    add("src", metavar="SRC", type=Path, help="a file, or a folder: all files in it")
    add("out", metavar="OUT", type=Path, help="folder")
    add("--encoding", default=AS_STORED, help="as of tools/pack.py (default: leave the bytes as they are)")
    add("--image-size", type=int, metavar="N", help="resize and crop to N × N pixels")
    add("--sample-rate", type=int, metavar="HZ", help="resample")
    add("--seconds", type=float, metavar="S", help="cut or fill up to S seconds")
    add("--transform", action="append", default=[], metavar="T", help="as in data.byte_transforms; may be repeated")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    problems: list[str] = []
    encoding, fitting = read_encoding(args, problems)
    transforms: tuple[ByteTransform, ...] = ()
    with collecting(problems):
        transforms = parse_transforms(args.transform)
    targets = targets_of(args.src, args.out, encoding, problems)
    with collecting(problems):
        notes = Notes(args.out, encoding, fitting, transforms)
        kept = kept_of(targets, notes, problems)
    if problems:
        raise UserError(*problems)
    written = 0
    failed: list[str] = []
    with collecting(failed):  # what cannot be written ends the loop
        for source, target in targets.items():
            if target not in kept:
                problem = make(source, target, encoding, fitting, transforms, notes)
                failed += [problem] if problem else []
                written += not problem
    print(f"{args.out}: {written:,} files" + (f", and {len(kept):,} that were there" if kept else ""))
    if failed:
        missing = len(targets) - len(kept) - written
        raise UserError(*failed, f"{missing:,} of {len(targets):,} files were not made; the same command continues")


def targets_of(src: Path, out: Path, encoding: Encoding, problems: list[str]) -> dict[Path, Path]:
    """Which file becomes which. Files that differ in the extension alone get it appended to the name."""
    if not src.exists():
        problems.append(f"{src}: there is no such file or folder")
        return {}
    root, sources = src.parent, [src]
    if src.is_dir():
        if out.resolve().is_relative_to(src.resolve()):
            problems.append(f"{out}: lies in {src}, whose files would grow by what is made; choose an OUT outside")
            return {}
        root, sources = src, [Path(path) for path in regular_files(str(src), problems)]
    if not encoding.extension:
        return {source: out / source.relative_to(root) for source in sources}
    alike = Counter(source.with_suffix("") for source in sources)
    targets: dict[Path, Path] = {}
    first: dict[Path, Path] = {}
    for source in sources:
        extension = source.suffix[1:].lower()
        name = f"{source.stem}-{extension}" if alike[source.with_suffix("")] > 1 and extension else source.stem
        target = out / source.relative_to(root).with_name(f"{name}.{encoding.extension}")
        if first.setdefault(target, source) is not source:
            problems.append(f"{source}: would become {target}, as {first[target]} does; rename one of them")
        targets[source] = target
    return targets


def kept_of(targets: dict[Path, Path], notes: Notes, problems: list[str]) -> set[Path]:
    """The targets that an earlier start has made; others that exist are problems."""
    existing = {source: target for source, target in targets.items() if target.exists()}
    kept = {target for source, target in existing.items() if notes.has(source, target)}
    problems += [
        f"{target}: exists and is not overwritten, since it was not made from {source} as it is now by these "
        "arguments; choose another OUT, or remove it"
        for source, target in existing.items()
        if target not in kept
    ]
    return kept


def make(
    source: Path,
    target: Path,
    encoding: Encoding,
    fitting: Fitting,
    transforms: Sequence[ByteTransform],
    notes: Notes,
) -> str | None:
    """Make one file: None, or why it cannot be made from its source. UserError if nothing can be written."""
    try:
        made_from, content = notes.hash_of(source), source.read_bytes()
        content = content if encoding.encode is None else reencode(content, encoding, fitting)
    except MemoryError:
        raise UserError(f"{source}: memory does not suffice for this file") from None
    except OSError as error:
        return f"{source}: cannot be read: {error.strerror}"
    except Exception as error:  # decoders raise anything
        return f"{source}: cannot be decoded as {encoding.modality}: {error}"
    made = apply(transforms, np.frombuffer(content, np.uint8), np.random.default_rng())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as file:
            file.write(made.tobytes())
            notes.add(target, made_from)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from None
    return None


if __name__ == "__main__":
    run_command(main, output_is_optional=True)

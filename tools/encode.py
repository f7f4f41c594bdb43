"""Files as a model is given them: decoded and encoded anew, and their bytes transformed.

    python tools/encode.py photo.jpg out --encoding tiff --image-size 224
    python tools/encode.py photos out --encoding fhwc --image-size 224 --transform keep:0.1
    python tools/encode.py photos out --transform permute:my.key

SRC is a file, or a folder whose tree is kept, so that OUT can be packed or given to bfsys.predict: as it is to a run
that was trained on such files, with --transformed to one whose data.byte_transforms are the same. Noise is drawn from
the system's entropy, another for every file and call. What transforms protect, and what not: docs/privacy.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from bfsys.data.byte_transforms import ByteTransform, apply, parse_transforms
from bfsys.data.encodings import AS_STORED, Encoding, reencode
from bfsys.data.sources import regular_files
from bfsys.errors import UserError, collecting, run_command, summary_of
from tools.pack import read_encoding


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
    if problems:
        raise UserError(*problems)
    written = 0
    for source, target in targets.items():
        try:
            content = source.read_bytes()
        except OSError as error:
            problems.append(f"{source}: cannot be read: {error.strerror}")
            continue
        try:
            content = content if encoding.encode is None else reencode(content, encoding, fitting)
        except Exception as error:  # decoders raise anything
            problems.append(f"{source}: cannot be decoded as {encoding.modality}: {error}")
            continue
        write(target, apply(transforms, np.frombuffer(content, np.uint8), np.random.default_rng()))
        written += 1
    print(f"{args.out}: {written:,} files")
    if problems:
        raise UserError(*problems)


def targets_of(src: Path, out: Path, encoding: Encoding, problems: list[str]) -> dict[Path, Path]:
    """Which file becomes which. Nothing is overwritten."""
    if not src.exists():
        problems.append(f"{src}: there is no such file or folder")
        return {}
    root, sources = src.parent, [src]
    if src.is_dir():
        root, sources = src, [Path(path) for path in regular_files(str(src), problems)]
    targets: dict[Path, Path] = {}
    taken: set[Path] = set()
    for source in sources:
        target = out / source.relative_to(root)
        if encoding.extension:
            target = target.with_suffix(f".{encoding.extension}")
        if target.exists():
            problems.append(f"{target}: exists and is not overwritten; choose another OUT")
        elif target in taken:
            problems.append(f"{source}: would become {target}, as another file does; rename one of them")
        targets[source] = target
        taken.add(target)
    return targets


def write(path: Path, content: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.tobytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    run_command(main)

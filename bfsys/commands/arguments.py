"""Arguments that several commands take."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from bfsys.errors import UserError
from bfsys.locations import is_remote

if TYPE_CHECKING:
    from bfsys.data.media.encodings import Encoding, Fitting


def local_path(text: str) -> Path:
    """The type of an argument that is a path on this machine. `Path` would take a URL for a folder `https:`, and
    an empty text, such as that of an unset shell variable, for the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("got an empty path; write . for the current folder")
    if is_remote(text):
        raise argparse.ArgumentTypeError(f"got {text!r}; a path on this machine is needed, not a URL")
    return Path(text)


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file; bfsys/config.py explains every key")
    # Without a default, argparse lists it as a required argument in its errors.
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="for example optim.lr=3e-4"
    )


def add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sweep", "--array", action="append", default=[], metavar="KEY=A,B",
                        help="a run for each value; repeatable: each combination")  # fmt: skip


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        choices=("ema", "last"),
        default="ema",
        help="averaged weights (default), or those of the last step",
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    choices = ("fp32", "tf32", "bf16")
    parser.add_argument(
        "--precision", choices=choices, default="fp32", metavar="P", help="fp32 (default), or faster: tf32, bf16"
    )


def add_encoding(parser: argparse.ArgumentParser) -> None:
    """Add the options that change files before they are stored."""
    add = parser.add_argument
    add("--encoding", default="as_stored", metavar="E", help="decode files and encode them as E")
    add("--image-size", type=int, metavar="N", help="resize and crop pictures to N × N pixels first")
    add("--sample-rate", type=int, metavar="HZ", help="resample sounds to HZ first")
    add("--seconds", type=float, metavar="S", help="cut or pad sounds to S seconds first")


def read_encoding(args: argparse.Namespace, problems: list[str]) -> tuple[Encoding, Fitting]:
    """Parse the options of `add_encoding`. Invalid values are added to `problems`."""
    import numpy as np

    from bfsys.data.media.encodings import AS_STORED, Encoding, Fitting, WrongRateError, parse_encoding
    from bfsys.data.media.sounds import HIGHEST_RATE_HZ, LOWEST_RATE_HZ, Clip

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
    elif args.sample_rate and encoding.modality == "audio":
        try:
            encoding.file_of(Clip(np.zeros(1, np.float32), args.sample_rate))
        except WrongRateError as error:
            problems.append(f"--sample-rate {args.sample_rate}: {error}")
    return encoding, Fitting(args.image_size, args.sample_rate, args.seconds)

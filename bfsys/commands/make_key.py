"""Make a key file for the byte transform permute:KEYFILE: a random order of the 256 byte values."""

from __future__ import annotations

import argparse

from bfsys.commands.arguments import local_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Only its owner can read the file; an existing one is never overwritten."
    parser.add_argument("file", metavar="KEYFILE", type=local_path)


def run(args: argparse.Namespace) -> None:
    from bfsys.data.streaming.byte_transforms import write_key

    write_key(args.file)
    print(f"{args.file}: a new key; keep a copy: files that are transformed with it cannot be read without it")

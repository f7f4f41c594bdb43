"""Make a key file for the byte transform `permute:KEYFILE`: a random order of the 256 byte values.

    python tools/make_key.py my.key

Only its owner can read it, and an existing file is never overwritten. What it protects from: docs/privacy.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bfsys.data.streaming.byte_transforms import write_key
from bfsys.errors import run_command, summary_of


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=summary_of(__doc__))
    parser.add_argument("file", metavar="KEYFILE", type=Path)
    path = parser.parse_args(arguments).file
    write_key(path)
    print(f"{path}: a new key; keep a copy, since no file made with it can be read without it")


if __name__ == "__main__":
    run_command(main, output_is_optional=True)

"""Encode files in the form that a model reads: `python tools/encode.py SRC OUT`, as `bfsys encode`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from bfsys.start import main

    main("encode", "tools/encode.py")

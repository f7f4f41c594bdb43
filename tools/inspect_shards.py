"""Inspect a packed dataset: `python tools/inspect_shards.py DATASET`, as `bfsys inspect`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from bfsys.start import main

    main("inspect", "tools/inspect_shards.py")

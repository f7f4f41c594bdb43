"""Get the published datasets: `python tools/fetch.py DATASET OUT`, as `bfsys fetch`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from bfsys.start import main

    main("fetch", "tools/fetch.py")

"""Pack files into shards: `python tools/pack.py SRC OUT --name NAME`, as `bfsys pack`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from bfsys.start import main

    main("pack", "tools/pack.py")

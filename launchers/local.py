"""Train on this machine: `python launchers/local.py CONFIG`, as `bfsys launch`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from bfsys.start import main

    main("launch", "launchers/local.py")

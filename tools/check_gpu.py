"""Check a machine or a cluster before training on it: `python tools/check_gpu.py`, as `bfsys check-gpu`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from bfsys.start import main

    main("check-gpu", "tools/check_gpu.py")

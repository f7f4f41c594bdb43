"""Estimate what a run will need: `python tools/plan_run.py CONFIG`, as `bfsys plan`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from bfsys.start import main

    main("plan", "tools/plan_run.py")

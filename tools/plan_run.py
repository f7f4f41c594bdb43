"""What a run will do: `python tools/plan_run.py CONFIG`. The code is in bfsys/plan_run.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from bfsys.errors import run_command
    from bfsys.plan_run import main

    run_command(main)

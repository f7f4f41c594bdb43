"""Train on a SLURM cluster: `python launchers/slurm.py --nodes 8 CONFIG`. The code is in bfsys/launch/slurm.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from bfsys.errors import run_command
    from bfsys.launch.slurm import main

    run_command(main)

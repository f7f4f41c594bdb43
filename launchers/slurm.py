"""Train on a SLURM cluster: `python launchers/slurm.py --nodes 8 CONFIG`, as `bfsys slurm`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from bfsys.start import main

    main("slurm", "launchers/slurm.py")

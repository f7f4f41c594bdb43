"""Train on this machine: `python launchers/local.py CONFIG`. The code is in bfsys/launch/local.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from bfsys.errors import run_command
    from bfsys.launch.local import main

    run_command(main, output_is_optional=True)

"""One rank that trains several runs in one process: `worker.py CONFIG "override override" "override …" …`.

Starting a rank takes seconds, most of them imports; tests that compare runs start their ranks once.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bfsys import dist
from bfsys.config import load_config
from bfsys.train import train

if __name__ == "__main__":
    ranks = dist.ranks_from_environment()
    dist.start(ranks, timeout_s=60)
    for overrides in sys.argv[2:]:
        code = train(load_config(sys.argv[1], overrides.split()), ranks)
        assert code == 0, code
    dist.stop()
    dist.leave(0)

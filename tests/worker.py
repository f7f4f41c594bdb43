"""One rank that trains several runs in one process: `worker.py [--rehearse] CONFIG "override override" "override …" …`.

Starting a rank takes seconds, most of them imports; tests that compare runs start their ranks once. With --rehearse,
each run tries its largest micro-batch before its first step, which training does by itself on GPUs only.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bfsys import dist, train
from bfsys.config import load_config
from bfsys.data.streaming.run_data import RunData
from bfsys.engine import Engine
from bfsys.ranks import ranks_from_environment
from bfsys.rehearsal import rehearse
from bfsys.supervision.supervisor import Supervisor


def rehearse_first(data: RunData, engine: Engine, supervisor: Supervisor, step: int) -> int:
    gradients = rehearse(engine, data, supervisor.ranks)
    assert engine.stage == 3 or any(g is not None and g.any() for g in gradients)
    return run_steps(data, engine, supervisor, step)


run_steps = train.run_steps

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[0] == "--rehearse":
        arguments.pop(0)
        train.run_steps = rehearse_first
    ranks = ranks_from_environment()
    dist.start(ranks, timeout_s=900)
    for overrides in arguments[1:]:
        code = train.train(load_config(arguments[0], overrides.split()), ranks)
        assert code == 0, code
    dist.stop()
    dist.hard_exit(0)

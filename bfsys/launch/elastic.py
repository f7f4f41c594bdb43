"""Elastic runs: on which numbers of nodes or ranks, out of a range, a run can train, and when a job can grow.

The lanes of a run are shared evenly, so a number of ranks fits if it divides them. A start takes the largest number
that fits and is available. The samples and the global batch do not depend on this number (plan.py).

A job grows by being requeued, because SLURM cannot add nodes to a running job. Rejected alternative: a second job for
the added nodes, which would wait, be cancelled and run out of time separately.

Importing this module is quick.
"""

from __future__ import annotations

import datetime
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from bfsys.files import read_regular, replace_file
from bfsys.launch.restart_policy import newest_step
from bfsys.launch.slurm_commands import ask, outside_a_job

FILE = "growth.json"  # the number of nodes from which a start was ended to grow
ASK_EVERY_S = 60.0  # many users share the controller
MOST = 100_000  # nodes or ranks
SOON_S = 30.0  # a start that SLURM expects within this time does not wait for another job to end


def parse_range(text: str) -> range | None:
    """Parse "N" or "MIN-MAX". Returns None for other text, for numbers below 1 or above MOST, and if MIN is above
    MAX."""
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text, re.ASCII)
    if not match:
        return None
    first, last = int(match[1]), int(match[2] or match[1])
    return range(first, last + 1) if 1 <= first <= last <= MOST else None


def describe(numbers: range) -> str:
    return str(numbers.start) if len(numbers) == 1 else f"{numbers.start} to {numbers.stop - 1}"


def fitting(lanes: int, numbers: range, ranks_each: int = 1) -> list[int]:
    """Return the numbers of nodes, ascending, that share the lanes evenly with `ranks_each` ranks on each node."""
    return [
        n for n in range(numbers.start, min(numbers.stop, lanes // ranks_each + 1)) if lanes % (n * ranks_each) == 0
    ]


class Growth:
    """Decides when a running job is requeued because nodes for the next larger number that fits are free."""

    def __init__(self, run_dir: Path, used: int, larger: int, every_s: float) -> None:
        """The job uses `used` nodes; `larger` is the next number that fits. `every_s` is the shortest time between two
        starts, in seconds."""
        self.run_dir, self.used, self.missing, self.every_s = run_dir, used, larger - used, every_s
        self.began, self.asked = time.monotonic(), -math.inf
        self.first_step = newest_step(run_dir)

    def is_due(self, facts: Callable[[], dict[str, str]]) -> bool:
        """Ask SLURM at most once a minute whether the nodes are free. `facts()` returns SLURM's fields of the job. A
        start without a new checkpoint does not grow, so that each start makes progress."""
        now = time.monotonic()
        if now - self.began < self.every_s or now - self.asked < min(ASK_EVERY_S, self.every_s):
            return False
        if newest_step(self.run_dir) == self.first_step:
            return False
        self.asked = now
        if not can_start(self.missing, facts()):
            return False
        with suppress(OSError):
            replace_file(self.run_dir / FILE, f"{self.used}\n", durable=False)
        return True


def has_grown_in_vain(run_dir: Path, used: int) -> bool:
    """Whether the last start was ended to grow and this one uses no more nodes. `sbatch --test-only` does not see all
    limits of an account or QOS, so this could happen again and again."""
    try:
        before = int(read_regular(run_dir / FILE))
        (run_dir / FILE).unlink()
    except (OSError, ValueError):
        return False
    return used <= before


def can_start(nodes: int, job: dict[str, str]) -> bool:
    """Whether SLURM would start a job like this one on `nodes` other nodes at once, while no other job of its partition
    waits for nodes. SLURM checks constraints, GPUs, reservations and exclusions."""
    if not (job.get("Command") and job.get("Partition")):
        return False
    waiting = ask("squeue", "--noheader", "--states=PENDING", f"--partition={job['Partition']}", "--format=%r")
    if not waiting.is_good or {"Resources", "Priority"} & set(waiting.output.split()):
        return False
    # Jobs may share nodes, so SLURM could start the tested job on the nodes that this job has. The requeued job would
    # come back on the same number of nodes, again and again.
    exclude = ",".join(job[key] for key in ("NodeList", "ExcNodeList") if job.get(key, "(null)") != "(null)")
    command = ("sbatch", "--test-only", "--dependency=", f"--nodes={nodes}", f"--exclude={exclude}", job["Command"])
    answer = ask(*command, env=outside_a_job(os.environ))
    starts = re.search(r"to start at (\S+)", answer.output + answer.errors)
    if not answer.is_good or not starts:
        return False
    try:
        return (datetime.datetime.fromisoformat(starts[1]) - datetime.datetime.now()).total_seconds() < SOON_S
    except ValueError:  # not a time
        return False


def use_nodes(fit: Sequence[int]) -> int:
    """Return the largest number of nodes that fits and that this job has. The job releases its other nodes; they stay
    idle if SLURM refuses."""
    got = int(os.environ["SLURM_JOB_NUM_NODES"])
    used = max(n for n in fit if n <= got)
    line = (
        f"nodes: the job has {got}, training takes {used} (of {', '.join(map(str, fit))}, which share the lanes evenly)"
    )
    if used < got:
        job = os.environ["SLURM_JOB_ID"]
        released = ask("scontrol", "update", f"JobId={job}", f"NumNodes={used}").is_good
        for shell in ("sh", "csh"):  # scontrol writes scripts that would update the variables of an interactive shell
            with suppress(OSError):
                Path(f"slurm_job_{job}_resize.{shell}").unlink()
        line += f"; {got - used} {'released' if released else 'idle: SLURM refused to release them'}"
    print(line, flush=True)
    return used

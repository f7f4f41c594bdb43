"""What must hold before the first step: data that fit the config, and a run directory that holds this run or none."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

from bfsys import dist, typed_yaml
from bfsys.checkpoint.files import replace_durably
from bfsys.checkpoint.loading import check_same_run, newest_readable
from bfsys.config import Config
from bfsys.data.datasets import Sources, content_facts, index_problems, make_plan, open_evaluation, open_training
from bfsys.data.plan import Plan, lanes_of_rank
from bfsys.errors import EXIT_STORAGE, EXIT_USER_ERROR, PASSING, UserError
from bfsys.evaluate import short_files
from bfsys.faults import forget_end

GIT_STATE = "git-state.txt"  # in a copy of the code that a launcher made
LOCK_WAIT_S = 20.0  # a start that was killed may have loader processes that take a moment to notice
# After a node was lost, a file server keeps its lock for a while (NFSv4: 90 s). In a job nobody is kept waiting, and
# ending would be for good. Less than the other ranks wait (train.collective_timeout_s).
LOCK_WAIT_IN_JOB_S = 300.0


def open_data(config: Config, ranks: dist.Ranks) -> tuple[Sources, Sources | None, Plan]:
    """Training sources, validation sources (None if no source has that split) and the plan."""
    training = open_training(config)
    validation = open_evaluation(config, config.data.eval_split, training.classes)
    lanes_of_rank(config.data.lanes, ranks.rank, ranks.world_size)
    problems = [p for part in (training, validation) for p in short_files(config, part)]
    problems += [p for part in (training, validation) for p in index_problems(part, ranks.rank, ranks.world_size)]
    if problems:
        raise UserError(*problems)
    return training, validation if validation.splits else None, make_plan(config, training)


def run_facts(config: Config, training: Sources, plan: Plan) -> dict:
    """What makes a checkpoint self-contained, and what a resume must agree with."""
    return {
        "classes": list(training.classes),
        "plan": {**plan.facts, **content_facts(config, training)},
        "config": typed_yaml.to_tree(config),
        "versions": {name: version(name) for name in ("bfsys", "torch", "deepspeed")} | {"git": git_state()},
    }


def git_state() -> str | None:
    """The commit of this code, with a + if files were changed since; None if it is no repository."""
    here = Path(__file__).resolve().parents[1]
    with suppress(OSError):
        return (here / GIT_STATE).read_text() or None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def prepare_run_dir(config: Config, facts: dict, ranks: dist.Ranks) -> tuple[bool, BinaryIO | None]:
    """Whether the run is new, decided by rank 0; and rank 0's hold of the directory, to be closed at the end.

    Writes the run directory's config.yaml. Raises AgreedError if the directory holds another run, or another process
    is training there.
    """

    def look() -> tuple[bool, BinaryIO | None]:
        if not ranks.is_first:
            return False, None
        path, problems = newest_readable(config.run_dir)
        if path is None and problems:
            raise UserError(
                *problems,
                f"{config.run_dir}: no checkpoint is whole, see above; to begin anew, give another name=… "
                f"or move the directory away",
            )
        if path:
            check_same_run(path, facts)
        try:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            hold = hold_directory(config.run_dir)
            replace_durably(config.run_dir / "config.yaml", typed_yaml.dump(config))
            forget_end(config.run_dir)
        except OSError as error:
            if error.errno in PASSING:
                raise
            code = EXIT_STORAGE if error.errno in (errno.ENOSPC, errno.EDQUOT) else EXIT_USER_ERROR
            raise UserError(
                f"run directory {config.run_dir}: cannot be written: {error.strerror}", exit_code=code
            ) from None
        return path is None, hold

    is_new, hold = dist.same_errors_on_all(look)
    return dist.from_first_rank(is_new), hold


def hold_directory(run_dir: Path) -> BinaryIO:
    """Keep other processes from training in the directory until this is closed, or this process ends.

    Raises UserError if another one does and goes on doing it. Two starts would write over each other's checkpoints.
    """
    hold = open(run_dir / ".lock", "wb")  # noqa: SIM115 (for the life of the run)
    deadline = time.monotonic() + (LOCK_WAIT_IN_JOB_S if os.environ.get("SLURM_JOB_ID") else LOCK_WAIT_S)
    while True:
        try:
            fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                hold.close()
                raise UserError(
                    f"run directory {run_dir}: another process is training in it; stop that one, or give this run a "
                    f"name of its own (name=…)"
                ) from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return hold
        else:
            return hold

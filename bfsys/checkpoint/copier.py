"""The process that copies checkpoints to an object store, and fetches a checkpoint from there.

copies.py starts it for each checkpoint, as a separate program. It reads its task as JSON from standard input. It writes
to standard output, as JSON, what it did or why it failed. The libraries of the store, their threads and their errors
therefore stay out of the training process, which forks loader processes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bfsys.checkpoint.files import (
    Damaged,
    Unusable,
    checkpoint_name,
    checkpoints_dir,
    new_work_dir,
    read_manifest,
    step_of_name,
)
from bfsys.checkpoint.retention import RetentionPolicy, comparable, evaluations
from bfsys.checkpoint.rollbacks import is_after_bad_steps, read_rollbacks, was_rolled_back
from bfsys.checkpoint.store import Store
from bfsys.checkpoint.writer import read_task
from bfsys.errors import EXIT_CRASHED, EXIT_STORAGE, TRANSIENT_ERRNOS, UserError

MOST_PROBLEMS = 20  # per answer, which must fit into a pipe: it is read only after this process has ended
STALL_S = 120.0  # a copy is abandoned after this time without progress
WATCH_S = 1.0


def main() -> None:
    task = read_task()
    # The output of libraries is discarded; the answer goes to a duplicate of standard output.
    descriptor = os.dup(sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())

    def answer(what: dict) -> None:
        os.write(descriptor, json.dumps(what).encode())
        os._exit(0)  # does not wait for threads that are blocked on the store

    def watch(store: Store) -> None:
        threading.Thread(target=_watch, args=(store, answer), daemon=True).start()

    answer(outcome(task, watch))


def outcome(task: dict, watch: Callable[[Store], None] = lambda store: None) -> dict:
    """Do the task. Returns the result, or why it failed. `watch` is called with the opened store."""
    try:
        store = Store(task["url"])
        watch(store)
        return copy(store, task) if task["action"] == "copy" else fetch(store, task)
    except Damaged as error:
        return {"damaged": "\n".join(first_of(list(error.problems)))}
    except UserError as error:
        return {"problem": str(error), "exit_code": error.exit_code}
    except OSError as error:
        code = EXIT_CRASHED if error.errno in TRANSIENT_ERRNOS else EXIT_STORAGE
        return {"problem": f"{error.filename or task['run_dir']}: {error.strerror}", "exit_code": code}
    except Exception as error:  # standard error is closed, so a traceback would be lost
        return {"problem": f"the copying process failed: {error!r}"[:1000], "exit_code": EXIT_CRASHED}


def _watch(store: Store, answer) -> None:
    """Abandon the copy after STALL_S without progress. Time for which this process was stopped does not count."""
    silent_s, moved = 0.0, store.moved
    while silent_s < STALL_S:
        time.sleep(WATCH_S)
        silent_s, moved = silent_s + WATCH_S if store.moved == moved else 0.0, store.moved
    answer({"problem": f"{store.url}: has not answered for {silent_s:.0f} s", "exit_code": EXIT_CRASHED})


def copy(store: Store, task: dict) -> dict:
    """Copy a checkpoint, and remove the copies that the retention policy does not keep."""
    path, run_dir = Path(task["path"]), Path(task["run_dir"])
    manifest = read_manifest(path)
    if is_after_bad_steps(manifest) and manifest["step"] < manifest["config"]["train"]["steps"]:
        return {"left_out": "it was saved after a bad step, so the run may have to roll back further"}
    store.put(path, manifest)
    try:
        disown_rolled_back(store, run_dir)
        store.prune(RetentionPolicy(**task["keep"]), comparable(evaluations(run_dir)))
    except (UserError, OSError) as error:
        return {"note": str(error)}  # the copy itself succeeded
    return {}


def disown_rolled_back(store: Store, run_dir: Path) -> None:
    """Delete the manifests of copies whose updates a roll-back has undone, so that a start without the run's disk does
    not use these copies."""
    rollbacks = read_rollbacks(run_dir)
    undone = {step for rollback in rollbacks for step in range(rollback["to"] + 1, max(rollback["steps"]) + 1)}
    for name in store.names() if rollbacks else ():
        if step_of_name(name) not in undone:
            continue
        with suppress(Damaged, Unusable):
            if (manifest := store.manifest(name)) and was_rolled_back(manifest, rollbacks):
                store.disown(name)


def fetch(store: Store, task: dict) -> dict:
    """Fetch the newest intact copy of a step after `task["after"]` into a folder beside the run's checkpoints. If there
    is none, a new run checks that it can write to the store."""
    skipped: list[str] = []
    unusable: list[str] = []
    damaged: list[str] = []
    found: dict[str, str | int] = {}
    is_alone = task["after"] < 0  # the disk holds no intact checkpoint
    root, rollbacks = checkpoints_dir(Path(task["run_dir"])), read_rollbacks(Path(task["run_dir"]))
    for name in reversed(store.names()):
        if task["until"] is not None and step_of_name(name) > task["until"]:
            continue
        if step_of_name(name) <= task["after"]:
            break
        try:
            manifest = store.manifest(name)
        except Damaged as error:
            skipped += error.problems
            continue
        except Unusable as error:  # it may be the newest copy, so a run without a checkpoint must not start over
            if is_alone:
                raise
            unusable += error.problems
            continue
        if manifest is None or was_rolled_back(manifest, rollbacks):  # the first are incomplete
            continue
        work = new_work_dir(root / checkpoint_name(manifest["step"]))
        try:
            problems = store.fetch(name, manifest, work)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        if not problems:
            found = {"work": str(work), "step": manifest["step"]}
            break
        shutil.rmtree(work, ignore_errors=True)
        skipped += problems
        damaged.append(name)
    if found or not is_alone:  # without any manifest, the next start of a run without checkpoints would begin a new run
        for name in damaged:  # so that retention ignores them and no start fetches them again
            store.disown(name)
    elif not skipped and task["until"] is None:
        store.probe()
    return {**found, "skipped": first_of(skipped), "unusable": first_of(unusable)}


def first_of(problems: list[str]) -> list[str]:
    """The first MOST_PROBLEMS problems, and the number of the others."""
    rest = len(problems) - MOST_PROBLEMS
    return problems[:MOST_PROBLEMS] + ([f"and {rest:,} more damaged files"] if rest > 0 else [])


if __name__ == "__main__":
    main()

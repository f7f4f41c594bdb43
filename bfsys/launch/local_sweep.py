"""A sweep on this machine: its runs train one after the other, or several at a time.

Each run is trained by a separate process, which does what `bfsys launch` does: it restarts the run after a crash, and
on a signal it stops the run with a checkpoint. These processes are forked from this one, which has imported everything,
so they start quickly. Concurrent runs have equal shares of the GPUs, or of the cores.

The configs are read once, when the sweep starts, and each run is trained from a copy in its own directory. An edit of
the config file does not change runs that start later. The copy is not the run's config.yaml: only the run itself writes
that file, after it has checked that no other process trains it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bfsys import typed_yaml
from bfsys.compare import CONFIG, influential_settings
from bfsys.config import Config, load_config
from bfsys.errors import EXIT_CRASHED, UserError, collecting, counted, run_command
from bfsys.files import exists, replace_file
from bfsys.launch.local import POLL_S, choose_ranks, launch, share_of
from bfsys.launch.preflight import Checked, check_run
from bfsys.launch.processes import Forked, import_what_ranks_need
from bfsys.launch.restart_policy import newest_step
from bfsys.process import end_of, handling
from bfsys.ranks import gpu_count
from bfsys.supervision.run_end import how_it_ended
from bfsys.supervision.signals import EXIT_CODES, stop_signals

CONSOLE = Path("log", "console.log")  # output of a run if several train at a time
COPY = Path("log", "sweep.yaml")  # the config that the sweep trains a run from


def check_sweep(configs: Sequence[Config], ranks: range | None, at_once: int) -> list[str]:
    """Check the runs, and return notes about them.

    Raises UserError with everything that would end a run in its first minute, or resume a run with other settings.
    """
    found = Checked([], [])
    for config in configs:
        with collecting(found.problems):
            chosen = choose_ranks(config.data.lanes, ranks, at_once)
            found.add(check_run(config, chosen, on_gpu=gpu_count() > 0))
        with collecting(found.problems):
            found.problems.extend(_other_settings(config))
    if found.problems:
        raise UserError(*dict.fromkeys(found.problems))
    return list(dict.fromkeys(found.notes))


def _other_settings(config: Config) -> list[str]:
    """Return the settings that differ from an existing run of the same name, as a problem."""
    path = config.run_dir / CONFIG
    if not newest_step(config.run_dir) or not exists(path):
        return []
    old, new = influential_settings(load_config(path)), influential_settings(config)
    changes = [f"{key} was {old.get(key)!r}, is now {new.get(key)!r}"
               for key in {**old, **new} if old.get(key) != new.get(key)]  # fmt: skip
    if not changes:
        return []
    return [f"run directory {config.run_dir}: was trained with other settings: {'; '.join(changes)}; "
            "give the sweep another name (name=…), or restore them"]  # fmt: skip


def is_finished(config: Config) -> bool:
    ended = how_it_ended(config.run_dir)
    return bool(ended and ended["exit_code"] == 0 and newest_step(config.run_dir) >= config.train.steps)


def state_of(config: Config) -> str:
    """The sweep's plan for a run."""
    step = newest_step(config.run_dir)
    if is_finished(config):
        return "is finished"
    steps = config.train.steps
    return f"resumes after step {step} of {steps}" if step else f"trains {counted(steps, 'step')}"


def train_sweep(configs: Sequence[Config], ranks: range | None, at_once: int) -> int:
    """Train the unfinished runs, `at_once` at a time, each on `ranks` ranks. Returns the exit code.

    A run that fails does not stop the others. The code is 1 if a run failed. If a signal stopped the sweep, it is the
    code of the signal (EXIT_CODES).
    """
    waiting = [config for config in configs if not is_finished(config)]
    print(f"sweep: {counted(len(configs), 'run')}, {len(configs) - len(waiting)} of them finished already", flush=True)
    for config in waiting if at_once > 1 else ():
        (config.run_dir / CONSOLE).parent.mkdir(parents=True, exist_ok=True)
    received: list[int] = []
    with handling(stop_signals(), lambda number, _: received.append(number)):
        codes, stop_code = _train_all(waiting, ranks, at_once, received)
    failed = [str(run_dir) for run_dir, code in codes.items() if code not in (0, stop_code)]
    if failed:
        print(f"error: {len(failed)} of {len(configs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    if stop_code:
        print("the sweep was stopped; the same command resumes it", file=sys.stderr)
    return stop_code or (EXIT_CRASHED if failed else 0)


def _train_all(
    waiting: list[Config], ranks: range | None, at_once: int, received: list[int]
) -> tuple[dict[Path, int], int]:
    """Exit codes by run directory, and the code of the signal that stopped the sweep, or 0. `received` gets signals."""
    running: dict[int, tuple[Config, Forked]] = {}  # runs by slot; the slot determines the GPUs or cores
    codes: dict[Path, int] = {}
    stop_code = 0
    try:
        if waiting and not gpu_count():
            import_what_ranks_need()
        while running or (waiting and not stop_code):
            while received:
                number = received.pop(0)
                stop_code = stop_code or EXIT_CODES[number]
                for _, process in running.values():
                    process.send_signal(number)
            for slot in range(at_once):
                if waiting and not stop_code and slot not in running:
                    config = waiting.pop(0)
                    running[slot] = config, _start(config, ranks, slot, at_once)
            time.sleep(POLL_S)
            for slot, (config, process) in list(running.items()):
                code = process.poll()
                if code is not None:
                    del running[slot]
                    code = 128 - code if code < 0 else code
                    # Before a run installs its handlers, a signal ends it; there is nothing to save.
                    codes[config.run_dir] = EXIT_CODES.get(code - 128, code)
                    _report(config, codes[config.run_dir])
    finally:
        for _, process in running.values():
            process.send_signal(signal.SIGKILL)
            process.wait()
    return codes, stop_code


def _start(config: Config, ranks: range | None, slot: int, at_once: int) -> Forked:
    log = config.run_dir / CONSOLE if at_once > 1 else None
    print(f"{config.run_dir}: starts" + (f"; its output goes to {log}" if log else ""), flush=True)
    return Forked(lambda: _train(config, ranks, slot, at_once), "bfsys launch", log)


def _train(config: Config, ranks: range | None, slot: int, at_once: int) -> None:
    """Train one run in this process, and exit."""
    if at_once > 1:
        if gpus := gpu_count():
            names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(share_of(names, slot, at_once))
        else:
            os.sched_setaffinity(0, share_of(sorted(os.sched_getaffinity(0)), slot, at_once))

    def act() -> int:
        copy = config.run_dir / COPY
        copy.parent.mkdir(parents=True, exist_ok=True)
        replace_file(copy, typed_yaml.dump(config))
        return launch(config, copy, (), ranks, is_dry_run=False)

    run_command(act, output_is_optional=True)


def _report(config: Config, code: int) -> None:
    if code == 0:
        print(f"{config.run_dir}: finished", flush=True)
        return
    ended = how_it_ended(config.run_dir)
    reason = f": {ended['reason'].partition(chr(10))[0]}" if ended and ended["exit_code"] == code else ""
    print(f"{config.run_dir}: {end_of(code)}{reason}", file=sys.stderr, flush=True)

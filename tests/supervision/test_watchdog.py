"""Hangs are found, named and ended; pauses, evaluations and saves do not count as hangs."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from bfsys.errors import EXIT_HUNG
from bfsys.supervision.run_end import how_it_ended
from bfsys.supervision.watchdog import FACTOR, LEAST_S, Watchdog, least_limit_s
from tests.chaos.ranks import Ranks
from tests.forked import Forked, run_python
from tests.plain_training import ALONE
from tests.test_train import lines

BEGIN = """
import os, sys, time
from pathlib import Path
from bfsys.dist import Ranks
from bfsys.supervision import watchdog
folder, rank, ranks, limit_s = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
(folder / f"started-{rank}").touch()
while len(list(folder.glob("started-*"))) < ranks:
    time.sleep(0.02)
if ranks == 2:
    watchdog.GRACE_S = 90.0  # both ranks answer, however busy the machine is
dog = watchdog.Watchdog(folder, Ranks(rank, 2), limit_s=limit_s, patience_s=90.0)
dog._incident = folder / "hangs" / "this"  # as ranks that can talk to each other agree on
dog.beat("first")
dog.times_are_known()
"""


def start(folder: Path, rank: int, script: str, ranks: int = 1, limit_s: float = 1.0) -> Forked:
    """Start one of two ranks with a watchdog. With `ranks` of 2, it waits until the other one has started."""
    return Forked(run_python, ["-c", BEGIN + script, str(folder), str(rank), str(ranks), str(limit_s)], {})


def test_the_rank_that_is_behind_is_named_and_all_stacks_are_written(tmp_path: Path) -> None:
    hang = "def stuck_here():\n    time.sleep(900)\nstuck_here()"
    behind = start(tmp_path, 1, f'dog.beat("fetch")\n{hang}', ranks=2)
    waiting = start(tmp_path, 0, 'dog.beat("fetch")\ndog.beat("forward")\ntime.sleep(900)', ranks=2)
    for process in (behind, waiting):
        _, errors = process.communicate(timeout=900)
        assert process.returncode == EXIT_HUNG, errors
        assert "rank 1 is stuck at: fetch" in errors
    stacks = {path.stem: path.read_text() for path in tmp_path.glob("hangs/*/rank-*.txt")}
    assert stacks.keys() == {"rank-0", "rank-1"}
    assert "in stuck_here" in stacks["rank-1"]
    ended = how_it_ended(tmp_path)
    assert ended["exit_code"] == EXIT_HUNG
    assert "rank 1" in ended["reason"]


def test_a_hang_after_an_evaluation_names_it_once(tmp_path: Path) -> None:
    script = "with dog.patient('step 120: evaluation'): pass\ndog.times_are_known()\ntime.sleep(900)"
    process = start(tmp_path, 0, script)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == EXIT_HUNG, errors
    assert "; the last report was 'after step 120: evaluation'" in errors


def test_on_gpus_the_flight_record_is_stored_beside_the_stacks(tmp_path: Path) -> None:
    """All ranks reach the same place in the code, since kernels are queued. The record shows which rank is behind."""
    record = 'Ranks.device = property(lambda ranks: torch.device("cuda", 0))\nimport torch\n'
    process = start(tmp_path, 0, f"{record}time.sleep(900)")
    _, errors = process.communicate(timeout=900)
    assert process.returncode == EXIT_HUNG, errors
    assert "version" in json.loads((tmp_path / "hangs" / "this" / "rank-0.nccl.json").read_text())


def test_without_a_console_a_hang_is_ended_too(tmp_path: Path) -> None:
    close = "from bfsys import console\nos.close(2)\nsys.stderr = None\nconsole.prepare()\n"
    process = start(tmp_path, 0, f"{close}time.sleep(900)")
    process.communicate(timeout=900)
    assert process.returncode == EXIT_HUNG
    assert (tmp_path / "hangs" / "this" / "rank-0.txt").exists()


def test_a_rank_that_does_not_answer_is_named(tmp_path: Path) -> None:
    process = start(tmp_path, 1, "time.sleep(900)")
    _, errors = process.communicate(timeout=900)
    assert process.returncode == EXIT_HUNG
    assert "rank 0 does not answer" in errors


@pytest.mark.parametrize(
    "script",
    [
        'with dog.patient("evaluation"): time.sleep(6)',
        'for _ in range(14):\n    time.sleep(0.4)\n    dog.beat("step")',
    ],
    ids=["patient", "beats"],
)
def test_the_watchdog_does_not_end_runs_that_do_not_hang(tmp_path: Path, script: str) -> None:
    process = start(tmp_path, 0, f"{script}\ndog.close()\nprint('alive', file=sys.stderr)", limit_s=5.0)
    _, errors = process.communicate(timeout=900)
    assert (process.returncode, errors.strip()) == (0, "alive")


def test_a_process_that_was_paused_itself_does_not_hang(tmp_path: Path) -> None:
    process = start(tmp_path, 0, "(Path(sys.argv[1]) / 'ready').touch()\nfor _ in range(40):\n"
                    "    time.sleep(0.1)\n    dog.beat('step')\ndog.close()", limit_s=5.0)  # fmt: skip
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors


def test_the_limit_is_learned(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, ALONE, limit_s=0, patience_s=600)
    try:
        assert dog.limit_s == 600
        dog.beat("step 1")
        dog.times_are_known()
        assert dog.limit_s == LEAST_S
        dog._last -= 30  # simulates a step of 30 s
        dog.beat("step 2")
        longest_s = dog._longest_s
        assert longest_s >= 30
        assert dog.limit_s == FACTOR * longest_s
        with dog.patient("a save"):
            assert dog.limit_s == 600
            dog._last -= 100
        assert dog.limit_s == FACTOR * longest_s
    finally:
        dog.close()


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_model_that_is_compiled_again_does_not_hang(is_remote: bool, tmp_path: Path) -> None:
    """This also holds if `patience_s` is shorter."""
    dog = Watchdog(
        tmp_path, ALONE, limit_s=0, patience_s=90, least_s=least_limit_s(90, is_remote=is_remote, is_compiled=True)
    )
    try:
        dog.times_are_known()
        assert dog.limit_s == 300
    finally:
        dog.close()
    assert least_limit_s(600, is_remote=is_remote, is_compiled=True) == 600
    assert least_limit_s(90, is_remote=is_remote, is_compiled=False) == (90 if is_remote else LEAST_S)


def test_a_stopped_rank_is_found(config_file: Path, tmp_path: Path) -> None:
    overrides = ["train.steps=100000", "train.save_every=50", "train.hang_timeout_s=10"]
    ranks = Ranks(2, config_file, overrides, tmp_path / "log")
    run = tmp_path / "runs" / "tiny"
    try:
        deadline = time.monotonic() + 900
        while not (run / "metrics.jsonl").exists() or len(lines(run)) < 10:
            assert time.monotonic() < deadline, ranks.said()
            assert ranks.are_running, ranks.said()
            time.sleep(0.05)
        os.kill(ranks.processes[1].pid, signal.SIGSTOP)
        ranks.processes[0].communicate(900)
        assert ranks.processes[0].returncode == EXIT_HUNG, ranks.said()
        assert "rank 1 does not answer" in ranks.said()
        assert json.loads((run / "ended.json").read_text())["exit_code"] == EXIT_HUNG
    finally:
        ranks.kill()

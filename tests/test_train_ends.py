"""How training ends without a console, after an error of one rank, a full GPU, or a signal of the kernel."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bfsys import train
from bfsys.cli import call
from bfsys.config import Config, Data, Source
from bfsys.errors import EXIT_CRASHED, EXIT_USER_ERROR, UserError, run_command
from bfsys.ranks import Ranks
from bfsys.supervision.run_end import how_it_ended
from tests.forked import run_python, start_ranks

WITHOUT_A_CONSOLE = """
import os, runpy, sys
reader, writer = os.pipe()
os.dup2(writer, 1)
os.close(reader)  # as after `… | head`
os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
runpy.run_path("bfsys/train.py", run_name="__main__")
"""


def test_training_without_a_console_loses_nothing(config_file: Path, tmp_path: Path, run_ranks) -> None:
    (result,) = run_ranks(1, ["-c", WITHOUT_A_CONSOLE, str(config_file), "train.eval_every=5"])
    run = tmp_path / "runs" / "tiny"
    assert result.returncode == 0, (run / "log" / "rank-0.log").read_text()
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 11))
    assert how_it_ended(run)["exit_code"] == 0
    log = (run / "log" / "rank-0.log").read_text()
    assert log.count("step  5/10") == log.count("evaluation:") / 2 == 1
    assert "finished: 10 steps" in log


RANK_1_FAILS = """
import os, sys, time
from bfsys import dist, train
from bfsys.engine import Engine
from bfsys.config import load_config
from bfsys.errors import exit_code_of
from bfsys.ranks import ranks_from_environment

really_step = Engine.step

def step(self, *arguments):
    if os.environ["RANK"] == "1" and self.updates == 2:
        raise MemoryError("the GPU is full")
    return really_step(self, *arguments)

Engine.step = step
dist.stop = lambda: time.sleep(600)  # as NCCL does while others wait in a collective
dist.hard_exit(exit_code_of(lambda: train.train_rank(load_config(sys.argv[1], sys.argv[2:]), ranks_from_environment())))
"""


def test_a_rank_that_fails_alone_says_why_and_ends_at_once(config_file: Path, tmp_path: Path) -> None:
    ranks = start_ranks(2, run_python, ["-c", RANK_1_FAILS, str(config_file)])
    try:
        outputs = [rank.communicate(timeout=900)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "MemoryError: the GPU is full" in outputs[1].partition("Traceback")[2]
    said = outputs[0].splitlines()[-1]
    assert said.startswith("error: rank 0: the connection to another rank was lost (")
    assert said.endswith("; the first error in the other ranks' logs says why")
    ended = how_it_ended(tmp_path / "runs" / "tiny")  # recorded by the rank that failed, not by the others
    assert ended["exit_code"] == 1
    assert ended["reason"] == "rank 1: MemoryError: the GPU is full"


@pytest.fixture
def rank_without_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Runs a rank that fails at its start, because its GPU is full."""

    def fail(*_: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(train, "train", fail)
    monkeypatch.setattr("bfsys.dist.start", lambda *_: None)
    monkeypatch.setattr("bfsys.console.go_on_without", lambda *_: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")  # so that it is restored
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    config = Config(data=Data(sources=(Source("none"),)), runs_dir=tmp_path)
    return lambda: train.train_rank(config, Ranks())


ANOTHER_START_BEGINS = """
import pathlib, runpy, shutil
from bfsys.checkpoint.saving import Saver

really_start = Saver.start

def start(self, source, facts):
    really_start(self, source, facts)
    if facts["step"] == 4:  # its first save removes unfinished ones, as if they were of a killed start
        (self.run_dir / ".lock").write_text("process 1 on another")
        shutil.rmtree(self._work, ignore_errors=True)

Saver.start = start
runpy.run_path("bfsys/train.py", run_name="__main__")
"""


def test_a_run_that_was_started_elsewhere_without_locks_ends_and_notes_nothing(
    config_file: Path, tmp_path: Path, run_ranks
) -> None:
    """A note of its end would be taken for that of the later start."""
    for result in run_ranks(2, ["-c", ANOTHER_START_BEGINS, str(config_file)]):
        assert result.returncode == EXIT_USER_ERROR, result.stderr
        assert "process 1 on another has begun to train in it, too" in result.stderr or not result.stderr
    assert how_it_ended(tmp_path / "runs" / "tiny") is None


def test_a_gpu_without_enough_memory_is_one_line_and_may_be_restarted(rank_without_memory: Callable[[], int]) -> None:
    with pytest.raises(UserError) as raised:
        rank_without_memory()
    assert raised.value.exit_code == EXIT_CRASHED
    (said,) = raised.value.problems
    assert said.startswith("rank 0: not enough memory on cpu: CUDA out of memory. Tried to allocate 2.00 GiB. Set a")


def test_a_loader_without_enough_memory_keeps_its_traceback(
    rank_without_memory: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback\ncan't allocate memory")

    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(RuntimeError, match="Traceback"):
        rank_without_memory()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
    ],
)
def test_the_allocator_is_set_unless_the_user_has_set_it(
    given: dict[str, str],
    expected: dict[str, str],
    rank_without_memory: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError):
        rank_without_memory()
    assert {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")} == expected


INDEX_IS_CUT_SHORT = """
import sys
from bfsys import train
from bfsys.cli import call
from bfsys.config import load_config
from bfsys.ranks import ranks_from_environment

run_steps = train.run_steps

def cut_short(data, *arguments):
    open(data.training.splits[0].samples.filename, "wb").close()
    return run_steps(data, *arguments)

train.run_steps = cut_short
train.train_rank(load_config(sys.argv[1], sys.argv[2:]), ranks_from_environment())
"""


def test_a_rank_that_sigbus_ends_shows_where(datasets: Path, config_file: Path, tmp_path: Path, run_ranks) -> None:
    shutil.copytree(datasets / "a", tmp_path / "a")
    (rank,) = run_ranks(1, ["-c", INDEX_IS_CUT_SHORT, str(config_file), f"data.sources.0.path={tmp_path}/a"])
    assert rank.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in rank.stderr
    assert "bfsys/data/streaming/reader.py" in rank.stderr.partition("Bus error")[2]


def test_a_stop_signal_kills_a_rank_that_has_not_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A rank that waits in C++ for the others would not notice a handler in Python."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    seen: list = []

    def see(*_: object) -> Config:
        seen.extend(map(signal.getsignal, before))
        raise UserError("seen")

    monkeypatch.setattr("bfsys.config.load_config", see)
    try:
        with pytest.raises(SystemExit):
            run_command(lambda: call("train", [str(tmp_path / "tiny.yaml")]))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == [signal.SIG_DFL, signal.SIG_DFL]

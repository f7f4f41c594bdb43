"""The loader makes the same batches for any ranks and workers, and refuses bad settings."""

from __future__ import annotations

import _multiprocessing
import errno
import gc
import importlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from bfsys.batch import ByteBatch
from bfsys.config import load_config
from bfsys.data.streaming import loader
from bfsys.data.streaming.datasets import long_files, make_plan, open_evaluation, open_training
from bfsys.data.streaming.loader import LoaderCrashed, _running, evaluation_rounds, training_batches
from bfsys.data.streaming.plan import evaluation_batches
from bfsys.data.streaming.quarantine import Quarantine
from bfsys.data.streaming.run_data import open_run_data
from bfsys.errors import UserError
from tests.data.packed import rank


def test_global_batches_do_not_depend_on_ranks_or_workers(config_file: Path) -> None:
    config = load_config(config_file)
    sources = open_training(config)

    def steps(world_size: int, workers: int, first_step: int) -> list[list[tuple]]:
        changed = load_config(config_file, [f"data.workers={workers}", "train.steps=6"])
        plan = make_plan(changed, sources)
        per_rank = [
            list(training_batches(changed, sources, plan, rank(r, world_size), first_step=first_step))
            for r in range(world_size)
        ]
        lanes = changed.data.lanes // world_size
        return [
            [
                (b.sources.tolist(), b.samples.tolist(), b.data.tolist())
                for batches in per_rank
                for b in batches[lanes * step : lanes * (step + 1)]
            ]
            for step in range(6 - first_step)
        ]

    alone = steps(1, 0, 0)
    assert steps(2, 0, 0) == alone
    assert steps(4, 0, 0) == alone
    assert steps(2, 2, 0) == alone
    assert steps(1, 0, 4) == alone[4:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_lanes_are_laid_together_in_their_order(micro_batches: int, workers: int, config_file: Path) -> None:
    config = load_config(config_file, [f"data.workers={workers}", "train.steps=5"])
    sources = open_training(config)
    apart, together = (
        list(training_batches(config, sources, make_plan(config, sources), rank(0, 1), first_step=2, micro_batches=n))
        for n in (4, micro_batches)
    )
    assert [len(apart), len(together)] == [3 * 4, 3 * micro_batches]
    groups = [[0, 1, 2, 3]] if micro_batches == 1 else [[0], [1], [2, 3]]
    for step in range(3):
        for group, batch in zip(groups, together[step * micro_batches :], strict=False):
            lanes = [apart[4 * step + lane] for lane in group]
            for name in ("data", "labels", "sources", "samples", "lengths"):
                assert torch.equal(getattr(batch, name), torch.cat([getattr(lane, name) for lane in lanes])), name


def test_a_request_to_stop_the_job_does_not_end_loader_processes(config_file: Path) -> None:
    """The signal reaches all processes of a job, and training needs batches until it has saved."""
    config = load_config(config_file, ["data.workers=2"])
    sources = open_training(config)
    batches = training_batches(config, sources, make_plan(config, sources), rank(0, 1), first_step=0)
    others = psutil.Process().children()
    first = next(batches)
    workers = [process for process in psutil.Process().children() if process not in others]
    subprocess.run(["kill", *(str(worker.pid) for worker in workers)], check=True)
    time.sleep(0.5)
    assert len(first.labels) + sum(len(batch.labels) for batch in batches) == config.train.steps * 8
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=900)[1]


def test_a_request_to_stop_the_job_does_not_end_a_loader_process_that_begins(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_begin = loader._begin_worker

    def begin(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        really_begin(*arguments)

    monkeypatch.setattr(loader, "_begin_worker", begin)
    config = load_config(config_file, ["data.workers=1"])
    sources = open_training(config)
    batches = training_batches(config, sources, make_plan(config, sources), rank(0, 1), first_step=0)
    assert sum(len(batch.labels) for batch in batches) == config.train.steps * 8
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


class Aborting:
    """An augmentation whose codec kills the process on one file."""

    mixes, compresses, least_bytes = False, True, 1

    def __init__(self, file: bytes) -> None:
        self.file = file

    def __call__(self, data: bytes, rng: np.random.Generator, second: None) -> tuple[bytes, float]:
        if data == self.file:
            os._exit(134)
        return data, 0.0


def test_a_loader_process_that_dies_names_the_file_that_it_was_at(config_file: Path, datasets: Path) -> None:
    config = load_config(config_file, ["data.workers=2", "train.steps=100"])
    sources = open_training(config)
    key = sources.splits[0].key(5)
    file = (datasets / "trees" / "a" / "train" / f"{key}.bin").read_bytes()
    first, second = sources.opened
    sources = replace(sources, opened=(replace(first, augmentation=Aborting(file)), second))
    batches = training_batches(config, sources, make_plan(config, sources), rank(0, 1), first_step=0)
    with pytest.raises(
        LoaderCrashed, match=rf"exited unexpectedly.*; it was reading .*/a, a-train-0000.*: sample '{key}'"
    ):
        list(batches)


def started(config_file: Path) -> tuple[Generator[ByteBatch, None, None], psutil.Process]:
    """A loader that has given a batch, and its worker."""
    config = load_config(config_file, ["data.workers=1", "train.steps=100", "data.byte_transforms=[reverse]"])
    sources, others = open_training(config), psutil.Process().children()
    batches = training_batches(config, sources, make_plan(config, sources), rank(0, 1), first_step=0)
    next(batches)
    (worker,) = (process for process in psutil.Process().children() if process not in others)
    return batches, worker


@pytest.mark.parametrize("when", ["it is the only one", "another one began before", "another one has ended since"])
def test_a_killed_loader_process_names_its_file_if_training_does_not_wait_for_it(config_file: Path, when: str) -> None:
    """PyTorch reports the end of a process wherever training is at that moment."""
    other = started(config_file)[0] if when != "it is the only one" else None
    batches, worker = started(config_file)
    if other and when == "another one has ended since":
        other.close()

    def train() -> None:
        worker.kill()
        time.sleep(60)  # until the signal comes

    with pytest.raises(LoaderCrashed, match=r"killed by signal: Killed; it was reading .*: sample '"):
        train()
    batches.close()
    if other:
        other.close()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_loader_may_begin_and_end_in_another_thread(config_file: Path) -> None:
    before = {*_running}
    batches, worker = started(config_file)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(batches.close).result()
        psutil.wait_procs([worker], timeout=900)
        other, worker = pool.submit(started, config_file).result()

        def train() -> None:
            worker.kill()
            pool.submit(list, other).result()

        with pytest.raises(LoaderCrashed, match=r"it was reading .*: sample '"):  # in one of the threads
            train()
    assert {*_running} == before


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # of an incomplete iterator
@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EAGAIN, "(ulimit -u"), (errno.ENOSPC, "/dev/shm must exist, be writable")]
)
def test_processes_that_cannot_be_started_are_an_error_of_one_line(
    number: int, remedy: str, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    config = load_config(config_file, ["data.workers=1"])
    sources = open_training(config)
    batches = training_batches(config, sources, make_plan(config, sources), rank(0, 1), first_step=0)
    importlib.import_module("multiprocessing.synchronize")  # it reads a constant of SemLock
    monkeypatch.setattr(*((os, "fork") if number == errno.EAGAIN else (_multiprocessing, "SemLock")), fail)
    with pytest.raises(UserError, match=r"that reads data \(data.workers=1\) cannot be started") as error:
        next(batches)
    assert remedy in str(error.value)
    del error
    gc.collect()  # deletes the iterator


def test_evaluation_gives_each_file_once_in_equal_rounds(config_file: Path) -> None:
    config = load_config(config_file)
    sources = open_evaluation(config, "val", ("a0", "a1", "a2", "b0", "b1"))
    least_bytes = config.model.architecture().rounding_bytes
    total = len(evaluation_batches(sources.splits, config.data.eval_batch_bytes, least_bytes))
    assert total % 3, "the last round should be incomplete for this test to say something"
    per_rank = [list(evaluation_rounds(config, sources, rank(r, 3), Quarantine(), 0)) for r in range(3)]
    assert len({len(rounds) for rounds in per_rank}) == 1
    seen = [
        (s, i)
        for rounds in per_rank
        for batch, counts in rounds
        if counts
        for s, i in zip(batch.sources.tolist(), batch.samples.tolist(), strict=True)
    ]
    assert sorted(seen) == [(s, i) for s, split in enumerate(sources.splits) for i in range(len(split))]


def test_evaluation_of_many_classes_takes_fewer_small_files_at_once(config_file: Path) -> None:
    """Each file has a probability of each class."""
    config = load_config(config_file)
    classes = ("a0", "a1", "a2", "b0", "b1", *map(str, range(config.data.eval_batch_bytes // 2 - 5)))
    sources = open_evaluation(config, "val", classes)
    rounds = evaluation_rounds(config, sources, rank(0, 1), Quarantine(), 0)
    assert max(len(batch.labels) for batch, _ in rounds) == 2


def test_classes_of_equal_name_are_one(config_file: Path, datasets: Path) -> None:
    config = load_config(config_file)
    assert open_training(config).classes == ("a0", "a1", "a2", "b0", "b1")
    sources = open_evaluation(config, "train", ("b1", "a2", "a1", "a0", "b0"))
    assert [source.label_map.tolist() for source in sources.opened] == [[3, 2, 1], [4, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data.train_split=test"], "test"),
        (["data.sources.0.path=/nowhere"], "/nowhere"),
    ],
)
def test_unfit_data_is_refused(config_file: Path, change: list[str], message: str) -> None:
    config = load_config(config_file, change)
    with pytest.raises(UserError, match=message):
        open_run_data(config, rank(0, 1))


def test_files_with_more_tokens_than_positions_are_noted(config_file: Path) -> None:
    config = load_config(config_file, ["model.max_tokens=2"])
    notes = long_files(config, open_training(config))
    assert re.search(
        r"a: \d+ of 120 files in train are longer than the 8 bytes .* model.max_tokens=\d+ would", notes[0]
    )
    (wanted,) = re.findall(r"model.max_tokens=(\d+)", notes[0])
    config = load_config(config_file, [f"model.max_tokens={wanted}"])
    assert not [note for note in long_files(config, open_training(config)) if note.startswith(notes[0].split(":")[0])]


def test_a_byte_budget_that_cannot_be_kept_names_the_lanes(config_file: Path) -> None:
    config = load_config(config_file, ["data.micro_batch_bytes=60"])
    with pytest.raises(UserError, match=r"over the budget of 60; \d+ or more lanes would fit"):
        make_plan(config, open_training(config))


def test_a_source_without_the_evaluation_split_is_left_out(config_file: Path) -> None:
    config = load_config(config_file, ["data.eval_split=nothing"])
    assert not open_run_data(config, rank(0, 1)).validation.splits

"""The number of micro-batches of a step."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from bfsys import dist
from bfsys.config import Config, Data, Model, Train, load_config
from bfsys.data.streaming.plan import lane_groups
from bfsys.data.streaming.run_data import open_run_data
from bfsys.micro_batches import (
    BYTES_PER_NUMBER,
    MEMORY_SHARE,
    agree_on_micro_batches,
    largest_micro_batch,
    micro_batches_of,
)
from bfsys.model.layout import token_counts
from bfsys.ranks import Ranks

TIFF_TOKENS = 9_417


@pytest.mark.parametrize(
    ("lanes", "lane_tokens", "budget", "count"),
    [
        (8, 100, 1, 8),  # a lane may exceed the budget
        (8, 100, 199, 8),
        (8, 100, 200, 4),
        (8, 100, 399, 3),  # micro-batches of 2, 3 and 3 lanes
        (8, 100, 10**6, 1),
        (1, 100, 10**6, 1),
    ],
)
def test_as_many_lanes_as_the_budget_allows(lanes: int, lane_tokens: int, budget: int, count: int) -> None:
    config = Config(data=Data(sources=()), train=Train(micro_batch_tokens=budget))
    for on_gpu in (True, False):
        assert micro_batches_of(lanes, lane_tokens, config, on_gpu=on_gpu) == count
    groups = lane_groups(range(lanes, 2 * lanes), count)
    assert [lane for group in groups for lane in group] == list(range(lanes, 2 * lanes))
    assert max(map(len, groups)) == -(-lanes // count)
    assert min(map(len, groups)) == lanes // count
    assert max(map(len, groups)) * lane_tokens <= max(budget, lane_tokens)


@pytest.mark.parametrize(("size", "on_gpus"), [("tiny", 2), ("small", 3), ("base", 8)])
def test_by_default_gpus_take_several_lanes_and_cpus_one(size: str, on_gpus: int) -> None:
    """With the published ImageNet recipe, each of 8 GPUs has 8 lanes of 12 TIFFs."""
    config = Config(data=Data(sources=()), model=Model(size=size))
    assert micro_batches_of(8, 12 * TIFF_TOKENS, config, on_gpu=True) == on_gpus
    assert micro_batches_of(8, 12 * TIFF_TOKENS, config, on_gpu=False) == 8


@pytest.mark.parametrize(
    ("precision", "gigabytes", "micro_batches"),
    [
        ("bf16", 141, 2),
        ("bf16", 24, 2),
        ("bf16", 12, 3),
        ("bf16", 8, 4),
        ("bf16", 4, 8),
        ("fp32", 80, 2),
        ("fp32", 24, 3),
    ],
)
def test_by_default_activations_take_at_most_half_of_a_small_gpu(
    precision: Literal["bf16", "fp32"], gigabytes: int, micro_batches: int
) -> None:
    """With the published ImageNet recipe and `tiny`, as above."""
    config = Config(data=Data(sources=()), model=Model(size="tiny"), train=Train(precision=precision))
    memory = gigabytes * 10**9
    assert micro_batches_of(8, 12 * TIFF_TOKENS, config, on_gpu=True, gpu_bytes=memory) == micro_batches


def test_the_smallest_gpu_of_the_ranks_decides(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_run_data(load_config(config_file), Ranks())
    dim = data.config.model.architecture().dim
    lane_tokens = largest_micro_batch(data, Ranks(), data.plan.lanes)[1]
    two_lanes = math.ceil(2 * lane_tokens * dim * BYTES_PER_NUMBER[data.config.train.precision] / MEMORY_SHARE)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=10 * two_lanes))
    monkeypatch.setattr(Ranks, "device", torch.device("cuda"))
    monkeypatch.setattr(dist, "agree_on_max", lambda *values: tuple(map(max, values, (0, -two_lanes))))
    count, _ = agree_on_micro_batches(data, Ranks())
    assert count == data.plan.lanes // 2


def test_the_largest_micro_batch_is_of_all_its_lanes(config_file: Path) -> None:
    data = open_run_data(load_config(config_file), Ranks())
    architecture = data.config.model.architecture()
    for rank, lanes in ((0, (0, 1)), (1, (2, 3))):
        lengths, tokens = largest_micro_batch(data, Ranks(rank, 2), 1)
        of_steps = [token_counts(data.lengths_of(step, lanes), architecture, "masked").sum() for step in range(10)]
        assert tokens == max(of_steps) == token_counts(lengths, architecture, "masked").sum()


def test_ranks_are_told_how_many_there_are(config_file: Path) -> None:
    data = open_run_data(load_config(config_file), Ranks())
    count, note = agree_on_micro_batches(data, Ranks())
    assert count == 4
    assert "each step has 4 micro-batches of up to" in note
    train = replace(data.config.train, micro_batch_tokens=10**6)
    count, note = agree_on_micro_batches(replace(data, config=replace(data.config, train=train)), Ranks())
    assert count == 1
    assert note.endswith("from 4 lanes")

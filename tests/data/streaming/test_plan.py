"""The plan's promises: every sample once, the same batches for any world size, any step at once, even lanes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfsys.data.streaming.plan import Plan, deal_evenly, evaluation_batches, lanes_of_rank
from bfsys.errors import UserError
from tests.data.make import split_in_memory

shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


@st.composite
def plans(draw) -> Plan:
    sources = draw(st.lists(shard_sizes, min_size=1, max_size=3))
    lanes = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return Plan(
        [split_in_memory(s, rng.integers(1, 1000, sum(s)), f"s{i}") for i, s in enumerate(sources)],
        [draw(st.floats(0.1, 10)) for _ in sources],
        batch_samples=draw(st.integers(lanes, 20)),
        lanes=lanes,
        shuffle_block=draw(st.integers(1, 12)),
        seed=draw(st.integers(0, 3)),
    )


def step_samples(plan: Plan, step: int) -> list[tuple[int, int, int]]:
    """(source, epoch, sample) of a whole step."""
    batches = [plan.micro_batch(step, lane) for lane in range(plan.lanes)]
    return [t for b in batches for t in zip(b.source.tolist(), b.epoch.tolist(), b.sample.tolist(), strict=True)]


@given(plans(), st.integers(1, 12))
def test_every_sample_once_per_epoch(plan: Plan, steps: int) -> None:
    drawn = [t for step in range(steps) for t in step_samples(plan, step)]
    assert len(drawn) == steps * plan.batch_samples
    assert len(set(drawn)) == len(drawn), "a sample came twice in one epoch"
    for s, split in enumerate(plan.splits):
        epochs = {}
        for source, epoch, sample in drawn:
            if source == s:
                epochs.setdefault(epoch, set()).add(sample)
        for epoch in sorted(epochs)[:-1]:  # an epoch is complete before the second next one begins
            if epoch + 1 < max(epochs):
                assert epochs[epoch] == set(range(len(split)))


@given(plans(), st.integers(0, 5))
def test_epochs_are_consecutive_draws(plan: Plan, step: int) -> None:
    """The epoch numbers of a source follow from its number of draws, after any number of steps."""
    for s, split in enumerate(plan.splits):
        before, after = plan.mixture.counts(np.array([step, step + 1]) * plan.batch_samples)[:, s]
        expected = sorted((np.arange(before, after) // len(split)).tolist())
        assert sorted(e for source, e, _ in step_samples(plan, step) if source == s) == expected


@given(plans(), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_any_step_in_any_order(plan: Plan, steps: list[int]) -> None:
    """A plan that starts at a step agrees with one that made all steps before it."""
    walked = {step: step_samples(plan, step) for step in range(max(steps) + 1)}
    for step in steps:
        fresh = Plan(
            plan.splits,
            plan.mixture.shares,
            batch_samples=plan.batch_samples,
            lanes=plan.lanes,
            shuffle_block=plan.facts["shuffle_block"],
            seed=plan.facts["seed"],
        )
        assert step_samples(fresh, step) == walked[step]


@given(plans(), st.integers(0, 20))
def test_lanes_share_a_step_evenly(plan: Plan, step: int) -> None:
    sizes = [len(plan.micro_batch(step, lane)) for lane in range(plan.lanes)]
    assert sum(sizes) == plan.batch_samples
    assert max(sizes) - min(sizes) <= len(plan.splits)
    if plan.batch_samples >= plan.lanes * len(plan.splits):  # a config must guarantee this
        assert min(sizes) >= 1


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, first: int) -> list:
        plan = Plan([split_in_memory([50, 50])], [1], batch_samples=10, lanes=2, shuffle_block=25, seed=seed)
        return [sample for step in range(first, first + 10) for _, _, sample in step_samples(plan, step)]

    assert order(0, 0) != order(0, 10)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) == order(0, 0)


def test_a_lane_touches_few_shards() -> None:
    plan = Plan([split_in_memory([100] * 64)], [1], batch_samples=64, lanes=16, shuffle_block=50, seed=0)
    samples = np.concatenate([plan.micro_batch(step, 3).sample for step in range(100)])  # an epoch of the lane
    assert len(np.unique(samples // 100)) <= 5


def test_lanes_ask_for_their_next_blocks_at_different_times() -> None:
    """All lanes begin a block in the same step. A server must not get the requests of all nodes in that step."""
    lanes, block_steps = 64, 32
    splits = [split_in_memory([10] * 1024)]
    plan = Plan(splits, [1], batch_samples=lanes, lanes=lanes, shuffle_block=block_steps, seed=0)
    asked: Counter[int] = Counter()
    for lane in range(lanes):
        known: set[tuple[int, int]] = set()
        for step in range(3 * block_steps):
            shards = plan.shards_ahead(step, lane)
            assert set(shards) >= {(0, i // 10) for i in plan.micro_batch(step, lane).sample.tolist()}
            if step >= block_steps and not known >= set(shards):
                asked[step % block_steps] += 1
            known |= set(shards)
    assert sum(asked.values()) >= 2 * lanes * 0.9
    assert max(asked) <= block_steps / 2
    assert max(asked.values()) <= 2 * sum(asked.values()) / (block_steps / 2)


def test_shards_are_permuted_once_per_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the end of an epoch every lane asks for shards of two epochs in each step. Permuting 100,000 shards takes
    several milliseconds."""
    permuted: Counter[int] = Counter()
    make_rng = np.random.default_rng

    def counting(seed: list[int]) -> np.random.Generator:
        if seed[1] == 0:  # the stream that permutes shards
            permuted[seed[3]] += 1
        return make_rng(seed)

    monkeypatch.setattr(np.random, "default_rng", counting)
    plan = Plan([split_in_memory([10] * 64)], [1], batch_samples=16, lanes=8, shuffle_block=40, seed=0)
    for step in range(100):  # 2.5 epochs
        for lane in range(plan.lanes):
            plan.shards_ahead(step, lane)
            plan.micro_batch(step, lane)
    assert permuted == {0: 1, 1: 1, 2: 1}


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=10),
    st.randoms(use_true_random=False),
)
def test_dealing_keeps_every_item_and_size(sizes: list[int], random) -> None:
    costs = np.array([random.randint(0, 1000) for _ in range(sum(sizes))])
    order = deal_evenly(costs, np.array(sizes))
    assert sorted(order.tolist()) == list(range(sum(sizes)))


def test_dealing_is_even_on_long_tails() -> None:
    costs = np.random.default_rng(0).lognormal(np.log(12_000), 0.7, 4096).astype(np.int64)
    groups = costs[deal_evenly(costs, np.full(256, 16))].reshape(256, 16).sum(1)
    assert groups.max() / groups.mean() < 1.05
    assert costs.reshape(256, 16).sum(1).max() / groups.mean() > 1.3, "the data would have been even undealt"


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_divide_the_lanes(world_size: int) -> None:
    lanes = [lane for rank in range(world_size) for lane in lanes_of_rank(8, rank, world_size)]
    assert lanes == list(range(8))


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(UserError, match="no samples"):
        Plan([split_in_memory([0])], [1], batch_samples=1, lanes=1, shuffle_block=1, seed=0)


@given(st.lists(shard_sizes, min_size=1, max_size=3), st.integers(1, 3000), st.integers(1, 1500))
@settings(max_examples=50)
def test_evaluation_takes_every_sample_once_within_the_budget(
    sources: list[list[int]], budget: int, least: int
) -> None:
    rng = np.random.default_rng(0)
    splits = [split_in_memory(s, rng.integers(1, 1000, sum(s))) for s in sources]
    batches = evaluation_batches(splits, budget, least)
    seen = [t for b in batches for t in zip(b.source.tolist(), b.sample.tolist(), strict=True)]
    assert sorted(seen) == [(s, i) for s, split in enumerate(splits) for i in range(len(split))]
    for b in batches:
        lengths = [splits[s].samples["length"][i] for s, i in zip(b.source, b.sample, strict=True)]
        assert sum(max(int(n), least) for n in lengths) <= budget or len(b) == 1

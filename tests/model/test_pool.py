"""bfsys/model/pool.py: the mean of a file's tokens, and the weighted one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bfsys.batch import ByteBatch, Sample
from bfsys.model.byteformer import ByteFormer
from bfsys.model.dense import DenseByteFormer
from bfsys.model.pool import AttentionPool, MeanPool
from bfsys.model.sizes import Architecture

DIM = 6
SHAPE = {"dim": 8, "layers": 2, "heads": 2, "kernel": 4, "window": 8, "shifts": (0, 4), "merge_after": (0,)}


def tokens_of(counts: list[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(sum(counts), DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def attention_pool(scale: float = 1.0, dtype: torch.dtype = torch.float64) -> AttentionPool:
    pool = AttentionPool(DIM).to(dtype)
    with torch.no_grad():
        pool.query.copy_(scale * torch.linspace(-2, 3, DIM))
    return pool


def reference(x: Tensor, counts: list[int], query: Tensor) -> Tensor:
    """Compute the formula file by file."""
    return torch.stack([(file @ query).softmax(0) @ file for file in x.split(counts)])


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_tokens_are_weighted_by_the_softmax_of_their_scores(counts: list[int], seed: int) -> None:
    x, pool = tokens_of(counts, seed).requires_grad_(), attention_pool()
    got, want = pool(x, torch.tensor(counts)), reference(x, counts, pool.query)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    seeds = torch.randn(got.shape, generator=torch.Generator().manual_seed(seed), dtype=got.dtype)
    for ours, theirs in zip(
        torch.autograd.grad(got, (x, pool.query), seeds), torch.autograd.grad(want, (x, pool.query), seeds), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_it_begins_as_the_mean_and_learns_from_there() -> None:
    counts = [1, 7, 300]
    x, pool = tokens_of(counts, 0, torch.float32), AttentionPool(DIM)
    pooled = pool(x, torch.tensor(counts))
    assert torch.equal(pooled, MeanPool()(x, torch.tensor(counts)))
    pooled.square().sum().backward()
    assert pool.query.grad is not None
    assert pool.query.grad.abs().min() > 0


def test_one_token_of_thousands_can_decide() -> None:
    x = torch.zeros(5000, DIM)
    x[0] = 1.0  # a header
    pool = AttentionPool(DIM)
    with torch.no_grad():
        pool.query.fill_(3.0)
    counts = torch.tensor([5000])
    assert MeanPool()(x, counts).max() < 1e-3
    assert pool(x, counts).min() > 0.99


@pytest.mark.parametrize("scale", [1e3, -1e3])
def test_large_scores_do_not_overflow(scale: float) -> None:
    counts = [3, 50]
    x, pool = tokens_of(counts, 1, torch.float32).requires_grad_(), attention_pool(scale, torch.float32)
    pooled = pool(x, torch.tensor(counts))
    pooled.sum().backward()
    assert torch.isfinite(pooled).all()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_scores_are_computed_in_float32(autocast: bool) -> None:
    """In bfloat16, scores near 100 would be off by up to a quarter, and weights by as much."""
    counts = [400, 1000]
    x = tokens_of(counts, 2, torch.float32).to(torch.bfloat16)
    pool = attention_pool(10, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = pool(x, torch.tensor(counts))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), reference(x.double(), counts, pool.query.double()), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_the_dense_form_pools_alike(pool: str) -> None:
    torch.manual_seed(0)
    model = ByteFormer(Architecture(**SHAPE, max_tokens=64, pool=pool), 5).eval()
    if isinstance(model.pool, AttentionPool):
        with torch.no_grad():
            model.pool.query.normal_(std=2)
    dense = DenseByteFormer(model)
    for length in (1, 2, 9, 100):
        data = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8)
        with torch.no_grad():
            want = model(ByteBatch.from_samples([Sample("", data)]))[0].softmax(0)
            torch.testing.assert_close(dense(torch.from_numpy(data)), want, rtol=0, atol=1e-6)


def test_only_attention_has_a_parameter() -> None:
    names = {
        pool: set(ByteFormer(Architecture(**SHAPE, max_tokens=64, pool=pool), 5).state_dict())
        for pool in ("mean", "attention")
    }
    assert names["attention"] - names["mean"] == {"pool.query"}
    assert names["mean"] <= names["attention"]

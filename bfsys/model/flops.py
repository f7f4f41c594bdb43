"""Exact counts of the floating-point operations of a step, in bfsys and in the published implementation.

A multiply-add counts as two. Matrix products and the stem's additions count. Norms (0.2 % of the published count),
activations, softmax and the optimizer do not. A backward pass takes two products for each product of the forward pass,
one per operand. Operations that activation checkpointing or fused attention repeat do not count, because the result
does not need them.

`flops_per_step` counts real tokens only: ceil(length / stride) per file, halved and rounded up by each merging, and in
attention only pairs of tokens in the same window. The model itself computes a little more: it rounds each file up to
2^merges tokens, and where it uses windows of one width, it computes blank slots. The count is thus what the answer
needs. Divided by time and by the machine's peak, it is a utilisation that padding cannot inflate. It equals what is
computed if every file has a multiple of 2^merges tokens and fills whole windows at each level.

`published_flops` counts everything that the published implementation computes: every file padded to the longest of the
batch, sequences padded to whole windows at each layer, and the convolution, which bfsys does not have. It is not used
for the utilisation of bfsys, because that would credit operations that bfsys saves.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from bfsys.model.layout import MASKED, token_counts
from bfsys.model.precision import product_dtype
from bfsys.model.sizes import BYTE_VALUES, MLP_RATIO, Architecture

BACKWARD = 2  # matrix products of the backward pass for each one of the forward pass


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations by part, of all layers.

    stem      bfsys: the table, embedding times kernel, once per micro-batch; published: the convolution
    lookups   additions of table rows; none in the published implementation
    scores    queries times keys
    values    attention times values
    """

    stem: int
    lookups: int
    qkv: int
    scores: int
    values: int
    proj: int
    mlp: int
    merges: int
    head: int

    @property
    def matrix(self) -> int:
        """The operations in matrix products, which a profiler counts too."""
        return self.total - self.lookups

    @property
    def total(self) -> int:
        return (
            self.stem
            + self.lookups
            + self.qkv
            + self.scores
            + self.values
            + self.proj
            + self.mlp
            + self.merges
            + self.head
        )


def flops_per_step(lengths: np.ndarray, architecture: Architecture, num_classes: int, backward: bool = True) -> Flops:
    """Operations of one micro-batch of files of `lengths` bytes (int64 [B]) in bfsys' model (masked), real tokens only.

    A call takes 30 us for 16 files, so it may be made for every micro-batch.
    """
    a = architecture
    levels, shifts, merge_levels = _layers(a)
    # Rounding up at each merging equals rounding up once: ceil(ceil(n / 2) / 2) = ceil(n / 4).
    tokens = token_counts(np.asarray(lengths, np.int64), a, MASKED)
    in_layer = -(-tokens >> levels)  # [layers, B]
    lead = np.minimum(in_layer, shifts)  # a shifted layer's first window
    rest = in_layer - lead
    last = rest % a.window
    pairs = int((lead * lead + (rest - last) * a.window + last * last).sum())
    merged = int((-(-tokens >> merge_levels)).sum()) if len(merge_levels) else 0
    return _flops(
        a,
        stem=2 * BYTE_VALUES * a.kernel * a.dim**2,
        lookups=int(tokens.sum()) * a.kernel * a.dim,
        rows=int(in_layer.sum()),
        pairs=pairs,
        merged=merged,
        head=2 * len(tokens) * a.dim * num_classes,
        backward=backward,
    )


def published_flops(lengths: np.ndarray, architecture: Architecture, num_classes: int, backward: bool = True) -> Flops:
    """Operations of the same micro-batch in the published implementation, including those on padding."""
    a = architecture
    files, longest = len(lengths), int(np.max(lengths))
    levels, _, merge_levels = _layers(a)
    tokens = max(1, (longest - a.kernel) // a.stride + 1)
    in_layer = -(-tokens >> levels)  # [layers, 1]
    rows = files * int((-(-in_layer // a.window) * a.window).sum())
    return _flops(
        a,
        stem=2 * files * tokens * a.kernel * a.dim**2,
        lookups=0,
        rows=rows,
        pairs=rows * a.window,
        merged=files * int((-(-tokens >> merge_levels)).sum()),
        head=2 * files * a.dim * num_classes,
        backward=backward,
    )


def matrix_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of the fastest of several large matrix products, measured now. (peaks.py has the figures of data sheets.)

    Ranks that share a CPU measure at the same time, so each measures its share of the CPU.
    """
    dtype, n = product_dtype(dtype, device.type), 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, dtype=dtype, device=device, generator=generator) for _ in range(2))
    out, best, until = torch.empty_like(a), float("inf"), time.perf_counter() + seconds
    for done in itertools.count():
        if time.perf_counter() > until and done > 3:
            break
        best = min(best, seconds_of(lambda: torch.mm(a, b, out=out), device))
    if device.type == "cuda":  # the measurement must not appear in a run's memory statistics
        del a, b, out
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * n**3 / best


def synchronize(device: torch.device) -> None:
    """Wait for the work of a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(act: Callable[[], object], device: torch.device) -> float:
    """The time of `act()`, including its work on a GPU."""
    synchronize(device)
    began = time.perf_counter()
    act()
    synchronize(device)
    return time.perf_counter() - began


@lru_cache
def _layers(architecture: Architecture) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per layer, how many token merges precede it and its shift (int64 [layers, 1]); per merge, the level after it."""
    merges = np.asarray(architecture.merge_after, np.int64)
    levels = np.searchsorted(merges, np.arange(architecture.layers))[:, None]
    shifts = np.asarray(architecture.shifts, np.int64)[:, None] % architecture.window
    return levels, shifts, np.arange(1, len(merges) + 1)[:, None]


def _flops(
    a: Architecture, *, stem: int, lookups: int, rows: int, pairs: int, merged: int, head: int, backward: bool
) -> Flops:
    """`rows` and `pairs`: tokens and query-key pairs of all layers; `merged`: tokens that token merges produce."""
    times, twice = (1 + BACKWARD, 2) if backward else (1, 1)
    square = 2 * rows * a.dim**2  # the product of every token with one [D, D] matrix
    return Flops(
        stem=times * stem,
        lookups=twice * lookups,  # the backward pass adds a gradient to each row that was summed
        qkv=times * 3 * square,
        scores=times * 2 * pairs * a.dim,
        values=times * 2 * pairs * a.dim,
        proj=times * square,
        mlp=times * 2 * MLP_RATIO * square,
        merges=times * 2 * merged * 2 * a.dim**2,
        head=times * head,
    )

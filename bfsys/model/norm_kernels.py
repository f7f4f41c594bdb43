"""LayerNorm on NVIDIA GPUs, with the residual addition before it, as Triton kernels.

PyTorch's LayerNorm gives each row a block of 128 threads, of which 48 have work at 192 channels. It took more than a
third of a GPU's time for tiny (docs/performance.md). Here a program processes as many rows as fill its registers.
Statistics are float32. The backward pass computes them again, because it reads the rows in any case. Sums over rows
have a fixed order: each program adds up its own rows, and these sums are added afterwards.

Shapes: M rows, D dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 2048  # channels: one row per program
# Numbers in a program's tile: 16 for each thread of 4 warps. The backward kernel holds two sums and two inputs of that
# size. It then takes at most 128 registers per thread, so four programs fit on a multiprocessor.
TILE = 2048
PROGRAMS_PER_PROCESSOR = 4  # programs of the backward, which all run at the same time


@triton.jit
def _normed(value, inside, EPS: tl.constexpr, D: tl.constexpr):
    """The rows with mean 0 and variance 1 (zero outside), and the factor of each row."""
    centred = tl.where(inside, value - (tl.sum(value, 1) / D)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / D + EPS)
    return centred * scale[:, None], scale


@triton.jit(do_not_specialize=["rows"])
def _norm_forward(
    x, added, weight, bias, total, out, rows,
    EPS: tl.constexpr, ADDS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (n < rows)[:, None] & (d < D)
    place = n[:, None] * D + d
    value = tl.load(x + place, mask=inside, other=0).to(tl.float32)
    if ADDS:
        value += tl.load(added + place, mask=inside, other=0).to(tl.float32)
        stored = value.to(total.dtype.element_ty)
        tl.store(total + place, stored, mask=inside)
        value = stored.to(tl.float32)
    normed, _ = _normed(value, inside, EPS, D)
    w = tl.load(weight + d, mask=d < D, other=0).to(tl.float32)
    b = tl.load(bias + d, mask=d < D, other=0).to(tl.float32)
    tl.store(out + place, (normed * w + b).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _norm_backward(
    total, grad, total_grad, weight, out, partial, rows,
    EPS: tl.constexpr, ADDS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)[None, :]
    w = tl.load(weight + d, mask=d < D, other=0).to(tl.float32)
    weight_grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    bias_grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in tl.range(tl.program_id(0) * BLOCK_N, rows, tl.num_programs(0) * BLOCK_N):
        n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (n < rows)[:, None] & (d < D)
        place = n[:, None] * D + d
        value = tl.load(total + place, mask=inside, other=0).to(tl.float32)
        g = tl.load(grad + place, mask=inside, other=0).to(tl.float32)
        normed, scale = _normed(value, inside, EPS, D)
        weight_grad += g * normed
        bias_grad += g
        g *= w
        of_mean = (tl.sum(g, 1) / D)[:, None]
        of_scale = (tl.sum(g * normed, 1) / D)[:, None]
        x_grad = (g - of_mean - normed * of_scale) * scale[:, None]
        if ADDS:
            x_grad += tl.load(total_grad + place, mask=inside, other=0).to(tl.float32)
        tl.store(out + place, x_grad.to(out.dtype.element_ty), mask=inside)
    partial += tl.program_id(0) * 2 * D + tl.arange(0, BLOCK_D)
    tl.store(partial, tl.sum(weight_grad, 0), mask=tl.arange(0, BLOCK_D) < D)
    tl.store(partial + D, tl.sum(bias_grad, 0), mask=tl.arange(0, BLOCK_D) < D)


def supports_norm(dim: int) -> bool:
    return dim <= WIDEST


def _tiles(dim: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(dim)
    return {"D": dim, "BLOCK_D": block_d, "BLOCK_N": max(1, TILE // block_d), "num_warps": 4}


def norm_forward(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:  # [M, D] each
    """(x + added, its LayerNorm), in the dtype of `x`; the first is x itself if `added` is None. weight and bias [D]
    may have another dtype."""
    rows, dim = x.shape
    x, out, tiles = x.contiguous(), x.new_empty(rows, dim), _tiles(dim)
    total = x if added is None else torch.empty_like(x)
    with torch.cuda.device_of(x):
        _norm_forward[(triton.cdiv(rows, tiles["BLOCK_N"]),)](
            x, x if added is None else added.contiguous(), weight, bias, total, out, rows,
            EPS=eps, ADDS=added is not None, **tiles,
        )  # fmt: skip
    return total, out


def norm_backward(
    total: Tensor, grad: Tensor, total_grad: Tensor | None, weight: Tensor, eps: float, processors: int
) -> tuple[Tensor, Tensor, Tensor]:  # [M, D], [D], [D]
    """Gradients of the rows `total` that were normed, in their dtype, and of weight and bias, in float32.

    grad [M, D] is the gradient of the normed rows, and total_grad [M, D] that of `total` itself, if it has one.
    `processors`: number of multiprocessors of the GPU. It determines the order of the sums.
    """
    rows, dim = total.shape
    tiles = _tiles(dim)
    programs = max(1, min(triton.cdiv(rows, tiles["BLOCK_N"]), PROGRAMS_PER_PROCESSOR * processors))
    out, partial = torch.empty_like(total), total.new_empty(programs, 2, dim, dtype=torch.float32)
    grad = grad.contiguous()
    with torch.cuda.device_of(total):
        _norm_backward[(programs,)](
            total, grad, grad if total_grad is None else total_grad.contiguous(), weight, out, partial, rows,
            EPS=eps, ADDS=total_grad is not None, **tiles,
        )  # fmt: skip
    weight_grad, bias_grad = partial.sum(0)
    return out, weight_grad, bias_grad

"""Operations on bfloat16 on a CPU, a chunk of tokens at a time.

Intermediate results of a chunk stay in the processor's cache, and each operation keeps little besides its input for the
backward pass. Attention and the MLP in this form are for processors with instructions for bfloat16 (precision.py),
where PyTorch's fused attention is slower than batched products (docs/performance.md).

Shapes: N tokens, D dim, H heads, E = D / H, W windows of `width` slots.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bfsys.model.layout import Windows

CHUNK_TOKENS = 4096


class ChunkedNorm(torch.autograd.Function):
    """The layer norm of rows in float32: [N, D] -> [N, D] in the dtype of its input.

    PyTorch computes it in bfloat16, and sums the gradients of its weights over all tokens in bfloat16. With 40,000
    tokens, their error is half of their norm (torch 2.12.1). If the whole input were converted, a float32 copy of it
    would be saved.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, moments = torch.empty_like(x), x.new_empty(2, len(x), 1, dtype=torch.float32)
        for rows in _chunks_of(x):
            out[rows], moments[0, rows], moments[1, rows] = torch.native_layer_norm(
                x[rows].float(), x.shape[1:], weight.float(), bias.float(), eps
            )
        ctx.save_for_backward(x, moments, weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, moments, weight, bias = ctx.saved_tensors
        x_grad = torch.empty_like(x)
        weight_grad = bias_grad = x.new_zeros((), dtype=torch.float32)
        for rows in _chunks_of(x):
            x_grad[rows], of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
                grad[rows].float(), x[rows].float(), x.shape[1:], *moments[:, rows], weight.float(), bias.float(),
                [True, True, True],
            )  # fmt: skip
            weight_grad, bias_grad = weight_grad + of_weight, bias_grad + of_bias
        return x_grad, weight_grad.to(weight.dtype), bias_grad.to(bias.dtype), None


class ChunkedMLP(torch.autograd.Function):
    """fc2(gelu(fc1(x))), [N, D] -> [N, D]; all arguments have one dtype. Gradients of weights are summed over chunks in
    float32."""

    @staticmethod
    def forward(ctx, x: Tensor, fc1: Tensor, bias1: Tensor, fc2: Tensor, bias2: Tensor) -> Tensor:
        hidden, out = x.new_empty(len(x), len(fc1)), torch.empty_like(x)
        for rows in _chunks_of(x):
            torch.addmm(bias1, x[rows], fc1.t(), out=hidden[rows])
            torch.addmm(bias2, F.gelu(hidden[rows]), fc2.t(), out=out[rows])
        ctx.save_for_backward(x, hidden, fc1, fc2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        x, hidden, fc1, fc2 = ctx.saved_tensors
        x_grad = torch.empty_like(x)
        shapes = (fc1.shape, fc1.shape[:1], fc2.shape, fc2.shape[:1])
        sums = [x.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32)) for shape in shapes]
        for rows in _chunks_of(x):
            hidden_grad = torch.ops.aten.gelu_backward(grad[rows] @ fc2, hidden[rows])
            torch.mm(hidden_grad, fc1, out=x_grad[rows])
            sums[0] += hidden_grad.t() @ x[rows]
            sums[1] += hidden_grad.sum(0)
            sums[2] += grad[rows].t() @ F.gelu(hidden[rows])
            sums[3] += grad[rows].sum(0)
        return x_grad, *(total.to(x.dtype) for total in sums)


class ChunkedAttention(torch.autograd.Function):
    """Attention inside windows: qkv [N, 3D] -> [N, D]. Only qkv is saved; the backward pass recomputes the scores. The
    softmax is computed in float32 and rounded."""

    @staticmethod
    def forward(ctx, qkv: Tensor, chunks: tuple[Windows, ...], heads: int) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.chunks, ctx.heads = chunks, heads
        out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        for rows, w in rows_of(chunks):
            q, k, v = _by_head(_into_slots(qkv[rows], w), w.width, heads, 3)
            answers = torch.bmm(_shares(q, k, w), v)  # [W * H, width, E]
            _from_slots(answers.unflatten(0, (-1, heads)).transpose(1, 2), w, out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (qkv,), heads = ctx.saved_tensors, ctx.heads
        qkv_grad = torch.empty_like(qkv)
        for rows, w in rows_of(ctx.chunks):
            q, k, v = _by_head(_into_slots(qkv[rows], w), w.width, heads, 3)
            (answers_grad,) = _by_head(_into_slots(grad[rows], w), w.width, heads, 1)
            shares = _shares(q, k, w)
            shares_grad = torch.bmm(answers_grad, v.transpose(1, 2))
            scores_grad = torch._softmax_backward_data(shares_grad, shares, -1, shares.dtype) * q.shape[2] ** -0.5
            grads = q.new_empty(3, *q.shape)
            torch.bmm(scores_grad, k, out=grads[0])
            torch.bmm(scores_grad.transpose(1, 2), q, out=grads[1])
            torch.bmm(shares.transpose(1, 2), answers_grad, out=grads[2])
            of_heads = grads.unflatten(1, (-1, heads))  # [3, W, H, width, E]
            _from_slots(of_heads.permute(1, 3, 0, 2, 4), w, qkv_grad[rows])
        return qkv_grad, None, None


def rows_of(chunks: tuple[Windows, ...]) -> Iterator[tuple[slice, Windows]]:
    """Yield the token range of each chunk of a level, and the chunk."""
    first = 0
    for chunk in chunks:
        yield slice(first, first + chunk.tokens), chunk
        first += chunk.tokens


def _chunks_of(x: Tensor) -> Iterator[slice]:
    return (slice(first, first + CHUNK_TOKENS) for first in range(0, len(x), CHUNK_TOKENS))


def _into_slots(rows: Tensor, w: Windows) -> Tensor:
    """[N, C] -> [W * width, C], zero where a slot is blank."""
    return rows.index_select(0, w.index).index_fill_(0, w.blank, 0)


def _from_slots(slots: Tensor, w: Windows, out: Tensor) -> None:
    """Write slots [W, width, …] to their tokens in `out` [N, C], and zeros to tokens outside all windows."""
    torch.index_select(slots.reshape(-1, out.shape[1]), 0, w.inverse, out=out).index_fill_(0, w.outside, 0)


def _by_head(slots: Tensor, width: int, heads: int, parts: int) -> Tensor:
    """[W * width, parts * D] -> [parts, W * H, width, E]"""
    split = slots.unflatten(0, (-1, width)).unflatten(2, (parts, heads, -1))  # [W, width, parts, H, E]
    return split.permute(2, 0, 3, 1, 4).flatten(1, 2)


def _shares(q: Tensor, k: Tensor, w: Windows) -> Tensor:
    """The attention weights of each query over the keys, [W * H, width, width]."""
    scale, k = q.shape[2] ** -0.5, k.transpose(1, 2)
    if w.added is None:
        return torch.baddbmm(q.new_empty(1, 1, 1), q, k, beta=0, alpha=scale).softmax(-1)
    added = w.added[:, 0].to(q.dtype).repeat_interleave(len(q) // len(w.added), 0)  # [W * H, 1, width]
    return torch.baddbmm(added, q, k, alpha=scale).softmax(-1)

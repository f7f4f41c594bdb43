"""Attention inside windows of a ragged batch.

`attend` is the one place that knows how windows are computed: rows are gathered into windows, attended and
gathered back. A token sits in exactly one window, so each gather's backward is a gather as well: no scatter,
no atomics, the same bits every time.

Shapes: N tokens, W windows of `width` slots, H heads, D dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bfsys.model.layout import Windows

# Scores at a time on a CPU: 4 windows of 128 tokens and 3 heads, 0.8 MB in float32. 2 to 16 windows are as fast.
CHUNK_SCORES = 4 * 3 * 128**2


class Rearrange(torch.autograd.Function):
    """out[i] = rows[index[i]], zero where i is in `blank`; its backward is the inverse rearrangement."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, blank: Tensor, inverse: Tensor, outside: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, outside)
        return rows.index_select(0, index).index_fill_(0, blank, 0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        inverse, outside = ctx.saved_tensors
        return grad.index_select(0, inverse).index_fill_(0, outside, 0), None, None, None, None


class WindowAttention(torch.autograd.Function):
    """Attention in windows on a CPU in bfloat16, a few windows at a time, so that scores stay in the cache; the
    backward computes them again, and nothing but qkv is kept.

    Scores and their products are matrix products in the precision of qkv, the softmax is float32, as published.
    A whole training step (tiny, one core, 2026-11-21) takes 0.80 of the time that it takes with
    `scaled_dot_product_attention`, whose backward is slow in bfloat16. In float32 it is about as fast, and faster for
    short windows.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, windows: Windows, heads: int) -> Tensor:  # [N, 3D] -> [N, D]
        ctx.windows, ctx.heads = windows, heads
        ctx.save_for_backward(qkv)
        out = qkv.new_zeros(len(qkv), qkv.shape[1] // 3)
        for rows, mask in _chunks(windows, heads):
            q, k, v = _to_heads(qkv.index_select(0, rows), windows.width, heads, 3)
            p = _probabilities(q, k, mask, heads).to(v.dtype)
            _put(out, rows, mask, _from_heads([torch.bmm(p, v)], heads))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # [N, D] -> [N, 3D]
        (qkv,) = ctx.saved_tensors
        windows, heads = ctx.windows, ctx.heads
        qkv_grad = torch.zeros_like(qkv)
        for rows, mask in _chunks(windows, heads):
            q, k, v = _to_heads(qkv.index_select(0, rows), windows.width, heads, 3)
            out_grad = grad.index_select(0, rows)
            if mask is not None:
                out_grad.masked_fill_(~mask.view(-1, 1), 0)
            (out_grad,) = _to_heads(out_grad, windows.width, heads, 1)
            p = _probabilities(q, k, mask, heads)
            v_grad = torch.bmm(p.to(v.dtype).transpose(1, 2), out_grad)
            p_grad = torch.bmm(out_grad, v.transpose(1, 2)).to(p.dtype)
            s_grad = torch._softmax_backward_data(p_grad, p, -1, p.dtype).mul_(q.shape[2] ** -0.5).to(q.dtype)
            q_grad, k_grad = torch.bmm(s_grad, k), torch.bmm(s_grad.transpose(1, 2), q)
            _put(qkv_grad, rows, mask, _from_heads([q_grad, k_grad, v_grad], heads))
        return qkv_grad, None, None


def _chunks(windows: Windows, heads: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Rows [C * width] of the tokens of some windows at a time, and which slots [C, width] hold one; None: all do."""
    step = max(1, CHUNK_SCORES // (heads * windows.width**2)) * windows.width
    for start in range(0, len(windows.index), step):
        rows = windows.index[start : start + step]
        mask = None if windows.mask is None else windows.mask.view(-1)[start : start + step].view(-1, windows.width)
        yield rows, None if mask is None or mask.all() else mask


def _to_heads(rows: Tensor, width: int, heads: int, parts: int) -> Tensor:
    """[C * width, parts * D] -> [parts, C * H, width, D / H], contiguous."""
    split = rows.view(-1, width, parts, heads, rows.shape[1] // (parts * heads)).permute(2, 0, 3, 1, 4)
    return split.reshape(parts, -1, width, split.shape[-1])


def _from_heads(parts: list[Tensor], heads: int) -> Tensor:
    """Tensors [C * H, width, D / H] -> [C * width, parts * D]"""
    _, width, head_dim = parts[0].shape
    out = parts[0].new_empty(len(parts[0]) // heads, width, len(parts), heads, head_dim)
    for i, part in enumerate(parts):
        out[:, :, i] = part.view(-1, heads, width, head_dim).transpose(1, 2)
    return out.view(-1, len(parts) * heads * head_dim)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """[C * H, width, D / H] twice -> [C * H, width, width] in float32 at least"""
    scores = torch.bmm(q, k.transpose(1, 2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(q.shape[2] ** -0.5)
    if mask is not None:
        scores.masked_fill_(~mask.repeat_interleave(heads, 0)[:, None], -math.inf)
    return torch.softmax(scores, -1)


def _put(out: Tensor, rows: Tensor, mask: Tensor | None, values: Tensor) -> None:
    if mask is not None:  # a blank slot names some token, which is not its own
        rows, values = rows[mask.view(-1)], values[mask.view(-1)]
    out.index_copy_(0, rows, values)


def attend(qkv: Tensor, windows: Windows, heads: int, blank_qkv: Tensor | None = None) -> Tensor:
    """Attention of every token to the tokens of its window: [N, 3D] -> [N, D].

    `blank_qkv` [3D] stands in the slots that hold no token, where these take part (as_released); otherwise
    `windows.mask` keeps them out.
    """
    if blank_qkv is None and qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16:
        return WindowAttention.apply(qkv, windows, heads)
    return attend_by_sdpa(qkv, windows, heads, blank_qkv)


def attend_by_sdpa(qkv: Tensor, windows: Windows, heads: int, blank_qkv: Tensor | None = None) -> Tensor:
    """The same with PyTorch's own attention."""
    dim = qkv.shape[1] // 3
    w = windows
    slots = Rearrange.apply(qkv, w.index, w.blank, w.inverse, w.outside)  # [W * width, 3D]
    if blank_qkv is not None and len(w.blank):
        slots = slots.index_add(0, w.blank, blank_qkv.expand(len(w.blank), -1))
    q, k, v = slots.view(-1, w.width, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)  # [W, H, width, D / H]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=w.mask)
    out = out.transpose(1, 2).reshape(-1, dim)  # [W * width, D]
    return Rearrange.apply(out, w.inverse, w.outside, w.index, w.blank)


def segment_mean(rows: Tensor, counts: Tensor) -> Tensor:
    """Mean of each run of `counts` rows: [N, D] -> [B, D]; summed in float32 at least, which bfloat16 sums need."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    mean = torch.segment_reduce(wide, "mean", lengths=counts, axis=0, unsafe=True)  # unsafe: counts are checked
    return mean.to(rows.dtype)

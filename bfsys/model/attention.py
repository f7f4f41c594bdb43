"""Attention inside windows of a ragged batch.

`attend` is the one place that knows how windows are computed: rows are gathered into windows, attended and
gathered back. A token sits in exactly one window, so each gather's backward is a gather as well: no scatter,
no atomics, the same bits every time.

Shapes: N tokens, W windows of `width` slots, H heads, D dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bfsys.model.layout import Windows


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


def attend(qkv: Tensor, windows: Windows, heads: int, blank_qkv: Tensor | None = None) -> Tensor:
    """Attention of every token to the tokens of its window: [N, 3D] -> [N, D].

    `blank_qkv` [3D] stands in the slots that hold no token, where these take part (as_released); otherwise
    `windows.mask` keeps them out.
    """
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

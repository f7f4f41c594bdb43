"""Attention inside segments of a ragged batch.

`attend` is the one place that chooses how, for everything that autograd sees: a kernel of ours on a GPU
(kernels.py), or PyTorch's attention on windows, into which rows are gathered, and back. A token sits in exactly one
window, so each gather's backward is a gather as well: no scatter, no atomics, the same bits every time.

`attention` and `attention_backward` are the same without autograd, for a few windows at a time: what chunks.py computes
on a CPU.

Shapes: N tokens, W windows of `width` slots, H heads, D dim, E = D / H.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from bfsys.model.layout import Segments, Windows


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


class SegmentAttention(torch.autograd.Function):
    """Attention of a GPU: one kernel forward, one backward, and nothing but qkv is kept."""

    @staticmethod
    def forward(ctx, qkv: Tensor, segments: Segments, heads: int) -> Tensor:
        ctx.segments, ctx.heads = segments, heads
        ctx.save_for_backward(qkv)
        s = segments
        return _kernels_of(qkv).attention_forward(qkv, s.start, s.length, s.width, heads, s.outside)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (qkv,), s = ctx.saved_tensors, ctx.segments
        backward = _kernels_of(qkv).attention_backward
        return backward(qkv, grad, s.start, s.length, s.width, ctx.heads, s.outside), None, None


def kernels_for(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Our kernels for a GPU; None for other devices and float64."""
    return _kernels(device) if device.type == "cuda" and dtype != torch.float64 else None


def _kernels_of(qkv: Tensor) -> ModuleType:
    kernels = kernels_for(qkv.device, qkv.dtype)
    assert kernels is not None, "SegmentAttention is for what has a kernel"
    return kernels


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    """None for GPUs that they are not made for, and where PyTorch comes without Triton."""
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from bfsys.model import kernels
    except ImportError:
        return None
    return kernels


def attend(qkv: Tensor, where: Segments | Windows, heads: int, blank_qkv: Tensor | None = None) -> Tensor:
    """Attention of every token to the tokens of its segment, or window: [N, 3D] -> [N, D].

    `blank_qkv` [3D] stands in the slots of windows that hold no token, where these take part (as_released).
    """
    if isinstance(where, Segments):
        if _has_kernel(qkv, where, heads):
            return SegmentAttention.apply(qkv, where, heads)
        where = where.windows
    return attend_by_sdpa(qkv, where, heads, blank_qkv)


def attend_by_sdpa(qkv: Tensor, windows: Windows, heads: int, blank_qkv: Tensor | None = None) -> Tensor:
    """The same with PyTorch's own attention."""
    dim = qkv.shape[1] // 3
    w = windows
    slots = Rearrange.apply(qkv, w.index, w.blank, w.inverse, w.outside)  # [W * width, 3D]
    if blank_qkv is not None and len(w.blank):
        slots = slots.index_add(0, w.blank, blank_qkv.expand(len(w.blank), -1))
    q, k, v = slots.view(-1, w.width, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)  # [W, H, width, E]
    added = None if w.added is None else w.added.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
    out = out.transpose(1, 2).reshape(-1, dim)  # [W * width, D]
    return Rearrange.apply(out, w.inverse, w.outside, w.index, w.blank)


def _has_kernel(qkv: Tensor, segments: Segments, heads: int) -> bool:
    kernels = kernels_for(qkv.device, qkv.dtype)
    return kernels is not None and kernels.supports_attention(qkv.dtype, segments.width, qkv.shape[1] // 3, heads)


def attention(qkv: Tensor, windows: Windows, heads: int) -> tuple[Tensor, Tensor]:
    """[N, 3D] -> [N, D], zero outside the windows, and the normalizers of the softmax [W, H, width]; on a CPU.

    PyTorch's own operation, called by its name so that it computes nothing twice. In float32 at least: it is faster
    there than in bfloat16, and than products of our own for all windows (by a third, 2026-11-21).
    """
    q, k, v = _heads(_to_slots(qkv, windows), windows.width, heads, 3)
    out, normalizers = _attention(q, k, v, attn_mask=_added(windows, q))
    return _from_slots(out.transpose(1, 2).reshape(-1, qkv.shape[1] // 3), windows).to(qkv.dtype), normalizers


def attention_backward(
    qkv: Tensor, grad: Tensor, answer: Tensor, normalizers: Tensor, windows: Windows, heads: int
) -> Tensor:
    """The gradient of qkv [N, 3D], from that of the answer [N, D]; `answer` and `normalizers` as `attention` gave."""
    w = windows
    q, k, v = _heads(_to_slots(qkv, w), w.width, heads, 3)
    (out,), (out_grad,) = (_heads(_to_slots(rows, w), w.width, heads, 1) for rows in (answer, grad))
    grads = _attention_backward(out_grad, q, k, v, out, normalizers, 0.0, False, attn_mask=_added(w, q))
    qkv_grad = torch.stack([part.transpose(1, 2) for part in grads], dim=2)  # [W, width, 3, H, E]
    return _from_slots(qkv_grad.view(-1, qkv.shape[1]), w).to(qkv.dtype)


_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _to_slots(rows: Tensor, windows: Windows) -> Tensor:
    """[N, X] -> [W * width, X], zero in blank slots; in float32 at least."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows if windows.plain else rows.index_select(0, windows.index).index_fill_(0, windows.blank, 0)


def _from_slots(slots: Tensor, windows: Windows) -> Tensor:
    """[W * width, X] -> [N, X], zero for tokens outside."""
    return slots if windows.plain else slots.index_select(0, windows.inverse).index_fill_(0, windows.outside, 0)


def _heads(slots: Tensor, width: int, heads: int, parts: int) -> Tensor:
    """A view: [W * width, parts * D] -> [parts, W, H, width, E]."""
    return slots.view(-1, width, parts, heads, slots.shape[1] // (parts * heads)).permute(2, 0, 3, 1, 4)


def _added(windows: Windows, q: Tensor) -> Tensor | None:
    """What is added to scores: [W, 1, width, width]."""
    return None if windows.added is None else windows.added.to(q.dtype).expand(-1, 1, windows.width, -1)


def segment_mean(rows: Tensor, counts: Tensor) -> Tensor:
    """Mean of each run of `counts` rows: [N, D] -> [B, D]; summed in float32 at least, which bfloat16 sums need."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    mean = torch.segment_reduce(wide, "mean", lengths=counts, axis=0, unsafe=True)  # unsafe: counts are checked
    return mean.to(rows.dtype)

"""Attention inside segments of a ragged batch.

`attend` is the only place that chooses the implementation, for everything that autograd sees. The choices are a Triton
kernel of bfsys on a GPU (kernels.py); batched products in chunks for bfloat16 on a CPU with instructions for it
(chunked.py); or PyTorch's attention on windows, with rows gathered into windows and back. A token is in exactly one
window, so the backward of each gather is a gather as well, without scatter or atomics. The kernels of bfsys and CPUs
give the same bits every time. PyTorch's attention on a GPU may not: with a mask it takes its memory-efficient form,
whose backward pass may add in another order each time.

Shapes: N tokens, W windows of `width` slots, H heads, D dim, E = D / H.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from bfsys.errors import UserError
from bfsys.model.chunked import CHUNK_TOKENS, ChunkedAttention
from bfsys.model.layout import Segments, Windows
from bfsys.model.precision import is_native_bfloat16


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
    """Attention on a GPU: one kernel for the forward pass, one for the backward. Only qkv is saved."""

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
    """The kernels of bfsys for a GPU; None for other devices and float64."""
    return _kernels(device) if device.type == "cuda" and dtype != torch.float64 else None


def processors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU, among which kernels divide their work; for interpreted kernels, a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _kernels_of(qkv: Tensor) -> ModuleType:
    kernels = kernels_for(qkv.device, qkv.dtype)
    assert kernels is not None, "SegmentAttention is for what has a kernel"
    return kernels


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The kernels; None for unsupported GPUs and for PyTorch without Triton. Raises UserError if Triton cannot
    compile."""
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from bfsys.model import kernels
    except ImportError:
        return None
    try:
        kernels.try_compiler(device)
    except Exception as error:  # Triton passes on errors of its compiler, its driver and the linker
        raise UserError(
            f"the GPU kernels cannot be compiled ({error}): Triton needs a C compiler and the headers of Python; "
            "install gcc and python3-dev, or load your cluster's modules with them; `bfsys check-gpu` tests them"
        ) from None
    return kernels


def attend(qkv: Tensor, where: Segments | Windows, heads: int, blank_qkv: Tensor | None = None) -> Tensor:
    """Attention of every token to the tokens of its segment, or window: [N, 3D] -> [N, D].

    `blank_qkv` [3D] fills the slots of windows that hold no token, if these are attended to (as_released).
    """
    if isinstance(where, Segments):
        if _has_kernel(qkv, where, heads):
            return SegmentAttention.apply(qkv, where, heads)
        if is_native_bfloat16(qkv):
            return ChunkedAttention.apply(qkv, where.in_chunks(CHUNK_TOKENS), heads)
        where = where.windows
    elif is_native_bfloat16(qkv) and blank_qkv is None:
        return ChunkedAttention.apply(qkv, (where,), heads)
    return attend_by_sdpa(qkv, where, heads, blank_qkv)


def attend_by_sdpa(qkv: Tensor, windows: Windows, heads: int, blank_qkv: Tensor | None = None) -> Tensor:
    """The same with PyTorch's own attention. On a CPU it uses at least float32, since bfloat16 is slower there
    (docs/performance.md)."""
    dim = qkv.shape[1] // 3
    w = windows
    slots = Rearrange.apply(qkv, w.index, w.blank, w.inverse, w.outside)  # [W * width, 3D]
    if slots.device.type == "cpu":
        slots = slots.to(torch.promote_types(slots.dtype, torch.float32))
    if blank_qkv is not None and len(w.blank):
        slots = slots.index_add(0, w.blank, blank_qkv.to(slots.dtype).expand(len(w.blank), -1))
    q, k, v = slots.view(-1, w.width, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)  # [W, H, width, E]
    added = None if w.added is None else w.added.to(q.dtype)
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
    out = out.transpose(1, 2).reshape(-1, dim).to(qkv.dtype)  # [W * width, D]
    return Rearrange.apply(out, w.inverse, w.outside, w.index, w.blank)


def _has_kernel(qkv: Tensor, segments: Segments, heads: int) -> bool:
    kernels = kernels_for(qkv.device, qkv.dtype)
    return kernels is not None and kernels.supports_attention(qkv.dtype, segments.width, qkv.shape[1] // 3, heads)


def segment_mean(rows: Tensor, counts: Tensor) -> Tensor:
    """Mean of each run of `counts` rows: [N, D] -> [B, D]; summed in at least float32."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    mean = torch.segment_reduce(wide, "mean", lengths=counts, axis=0, unsafe=True)  # counts are valid, so no check
    return mean.to(rows.dtype)

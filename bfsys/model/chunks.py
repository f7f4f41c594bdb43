"""Blocks and mergings on a CPU, two thousand tokens at a time.

A block runs from its first norm to its last sum on one chunk of tokens after the other, so that what lies between its
matrix products stays in the cache, and what it keeps for its backward comes in small pieces that the allocator has at
hand: tensors of the whole batch would be new pages of memory in every step. The backward is written out, and so knows
what it needs: a block keeps qkv, the answer of attention, the sum between its halves and the hidden rows of the MLP,
and computes the norms and the activation again. With `keep_little`, activation checkpointing, it keeps its input only.

Products are in the precision that precision.py says, so that a CPU without instructions for bfloat16 stores bfloat16
and multiplies float32. Norms, attention and sums of gradients are float32 at least.

Refused: autograd by chunk, with all computed twice (a fifth slower); a compiler at start (Inductor fuses what lies
between products, too, but takes minutes and cannot keep a chunk in the cache over them).

Shapes: N tokens of the batch, C of a chunk, D dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bfsys.model.attention import attention, attention_backward
from bfsys.model.layout import Segments, Windows
from bfsys.model.precision import product_dtype

if TYPE_CHECKING:
    from bfsys.model.byteformer import Block, Merge

# 16 windows of 128. From 512 to whole batches all sizes take the same time within 15 % (2 CPU cores, 2026-11-21);
# smaller ones hold less, larger ones are fewer operations to start.
CHUNK_TOKENS = 2048


class _Linear:
    """A linear layer in the precision of products, and the sums of its gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.wide = torch.promote_types(dtype, torch.float32)
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self.weight_grad: Tensor | None = None
        self.bias_grad: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:  # [C, in] -> [C, out]
        return F.linear(x, self.weight, self.bias)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:  # [C, out], [C, in] -> [C, in]
        if self.weight_grad is not None and self.wide == grad.dtype:
            self.weight_grad.addmm_(grad.T, x)
        else:
            self.weight_grad = _plus(self.weight_grad, (grad.T @ x).to(self.wide))
        if self.bias is not None:
            self.bias_grad = _plus(self.bias_grad, grad.sum(0, dtype=self.wide))
        return grad @ self.weight

    @property
    def grads(self) -> tuple[Tensor, ...]:
        return _summed(self.weight_grad) if self.bias is None else _summed(self.weight_grad, self.bias_grad)


class _Norm:
    """A LayerNorm in float32 at least, and the sums of its gradients."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> None:
        self.dtype, self.wide, self.eps = dtype, torch.promote_types(dtype, torch.float32), eps
        self.weight, self.bias = weight.to(self.wide), bias.to(self.wide)
        self.weight_grad: Tensor | None = None
        self.bias_grad: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:  # [C, D] -> [C, D] in the precision of products
        return self.with_moments(x)[0]

    def with_moments(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The same, and what `backward` wants to know of each row."""
        normed, mean, rstd = torch.native_layer_norm(
            x.to(self.wide), self.weight.shape, self.weight, self.bias, self.eps
        )
        return normed.to(self.dtype), (mean, rstd)

    def backward(self, grad: Tensor, x: Tensor, moments: tuple[Tensor, Tensor]) -> Tensor:
        x_grad, weight_grad, bias_grad = torch.ops.aten.native_layer_norm_backward(
            grad.to(self.wide), x.to(self.wide), self.weight.shape, *moments, self.weight, self.bias, [True] * 3
        )
        self.weight_grad, self.bias_grad = _plus(self.weight_grad, weight_grad), _plus(self.bias_grad, bias_grad)
        return x_grad

    @property
    def grads(self) -> tuple[Tensor, ...]:
        return _summed(self.weight_grad, self.bias_grad)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _summed(*totals: Tensor | None) -> tuple[Tensor, ...]:
    """Sums that are complete."""
    sums = tuple(total for total in totals if total is not None)
    assert len(sums) == len(totals), "no chunk has had its backward"
    return sums


class _Kept(NamedTuple):
    """Of one chunk, for the backward."""

    qkv: Tensor  # [C, 3D]
    attended: Tensor  # [C, D]
    normalizers: Tensor  # of the softmax, as `attention` gives them
    middle: Tensor  # [C, D], the sum after attention
    hidden: Tensor  # [C, 4D], before the activation

    def to(self, dtype: torch.dtype) -> _Kept:
        return _Kept(*(t if name == "normalizers" else t.to(dtype) for name, t in self._asdict().items()))


class _Block:
    """A block's layers, on one chunk at a time, in the precision of products."""

    def __init__(self, parameters: tuple[Tensor, ...], heads: int, eps: float, dtype: torch.dtype) -> None:
        p = iter(parameters)
        self.heads, self.dtype = heads, dtype
        self.norm1, self.qkv = _Norm(next(p), next(p), eps, dtype), _Linear(next(p), next(p), dtype)
        self.proj = _Linear(next(p), next(p), dtype)
        self.norm2, self.fc1 = _Norm(next(p), next(p), eps, dtype), _Linear(next(p), next(p), dtype)
        self.fc2 = _Linear(next(p), next(p), dtype)

    def to_hidden(self, x: Tensor, windows: Windows) -> _Kept:
        """[C, D] -> all but the last product."""
        qkv = self.qkv(self.norm1(x))
        attended, normalizers = attention(qkv, windows, self.heads)
        middle = self.proj(attended).add_(x)
        return _Kept(qkv, attended, normalizers, middle, self.fc1(self.norm2(middle)))

    def from_hidden(self, kept: _Kept, out: Tensor) -> None:
        torch.add(self.fc2(F.gelu(kept.hidden)), kept.middle, out=out)

    def backward(self, grad: Tensor, x: Tensor, kept: _Kept, windows: Windows, x_grad: Tensor) -> None:
        """The gradient [C, D] of the block's answer -> that of its input, into `x_grad`."""
        hidden_grad = self.fc2.backward(grad, F.gelu(kept.hidden))
        hidden_grad = torch.ops.aten.gelu_backward(hidden_grad, kept.hidden)
        normed, moments = self.norm2.with_moments(kept.middle)
        grad = self.norm2.backward(self.fc1.backward(hidden_grad, normed), kept.middle, moments).add_(grad)
        attended_grad = self.proj.backward(grad.to(self.dtype), kept.attended)
        qkv_grad = attention_backward(kept.qkv, attended_grad, kept.attended, kept.normalizers, windows, self.heads)
        normed, moments = self.norm1.with_moments(x)
        torch.add(self.norm1.backward(self.qkv.backward(qkv_grad, normed), x, moments), grad, out=x_grad)

    @property
    def grads(self) -> tuple[Tensor, ...]:
        layers: tuple[_Norm | _Linear, ...] = (self.norm1, self.qkv, self.proj, self.norm2, self.fc1, self.fc2)
        return tuple(grad for layer in layers for grad in layer.grads)


class _BlockInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, chunks, heads: int, eps: float, keep_little: bool, *parameters: Tensor) -> Tensor:
        ctx.chunks, ctx.options = chunks, (heads, eps, product_dtype(x.dtype, "cpu"))
        ctx.save_for_backward(x, *parameters)
        ctx.kept = None if keep_little else []
        out = torch.empty_like(x)
        with torch.autocast("cpu", enabled=False):
            block = _Block(parameters, *ctx.options)
            for w in chunks:
                rows = slice(w.first, w.end)
                kept = block.to_hidden(x[rows].to(block.dtype), w)
                block.from_hidden(kept, out[rows])
                if ctx.kept is not None:
                    ctx.kept.append(kept.to(x.dtype))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, *parameters = ctx.saved_tensors
        assert ctx.kept is None or len(ctx.kept) == len(ctx.chunks), "a second backward through the same answer"
        x_grad = torch.empty_like(x)
        with torch.autocast("cpu", enabled=False):
            block = _Block(tuple(parameters), *ctx.options)
            for w in reversed(ctx.chunks):
                rows = slice(w.first, w.end)
                of_chunk = x[rows].to(block.dtype)
                kept = block.to_hidden(of_chunk, w) if ctx.kept is None else ctx.kept.pop().to(block.dtype)
                block.backward(grad[rows].to(block.dtype), of_chunk, kept, w, x_grad[rows])
        return x_grad, None, None, None, None, *(g.to(p.dtype) for g, p in zip(block.grads, parameters, strict=True))


class _MergeInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rounding: Tensor, eps: float, *parameters: Tensor) -> Tensor:
        ctx.eps, ctx.dtype = eps, product_dtype(x.dtype, "cpu")
        ctx.save_for_backward(x, rounding, *parameters)
        out = x.new_empty(len(x) // 2, x.shape[1])
        with torch.autocast("cpu", enabled=False):
            reduction, norm = _merge_layers(parameters, eps, ctx.dtype)
            for first, pairs in _pairs(x, rounding, ctx.dtype):
                out[first : first + len(pairs)] = norm(reduction(pairs))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, rounding, *parameters = ctx.saved_tensors
        x_grad = torch.empty_like(x)
        with torch.autocast("cpu", enabled=False):
            reduction, norm = _merge_layers(parameters, ctx.eps, ctx.dtype)
            for first, pairs in _pairs(x, rounding, ctx.dtype):
                rows = slice(first, first + len(pairs))
                reduced = reduction(pairs)
                reduced_grad = norm.backward(grad[rows], reduced, norm.with_moments(reduced)[1]).to(ctx.dtype)
                x_grad.view(len(x) // 2, -1)[rows] = reduction.backward(reduced_grad, pairs)
        x_grad.index_fill_(0, rounding, 0)
        grads = (*reduction.grads, *norm.grads)
        return x_grad, None, None, *(g.to(p.dtype) for g, p in zip(grads, parameters, strict=True))


def _merge_layers(parameters, eps: float, dtype: torch.dtype) -> tuple[_Linear, _Norm]:
    weight, norm_weight, norm_bias = parameters
    return _Linear(weight, None, dtype), _Norm(norm_weight, norm_bias, eps, dtype)


def _pairs(x: Tensor, rounding: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Pairs of tokens side by side, [C / 2, 2D] and the number of the first; what is rounding is zero."""
    edges = range(0, len(x), CHUNK_TOKENS)
    in_chunk = torch.searchsorted(rounding, torch.tensor([*edges, len(x)])).tolist()
    for first, begin, end in zip(edges, in_chunk, in_chunk[1:], strict=False):
        rows = x[first : first + CHUNK_TOKENS].to(dtype)
        if begin < end:
            rows = rows.index_fill(0, rounding[begin:end] - first, 0)
        yield first // 2, rows.view(len(rows) // 2, -1)


def block_in_chunks(block: Block, x: Tensor, segments: Segments, keep_little: bool) -> Tensor:
    """What `Block.compute` computes, [N, D] -> [N, D]; rows outside the segments hold anything."""
    layers: tuple[nn.LayerNorm | nn.Linear, ...] = (
        block.norm1, block.qkv, block.proj, block.norm2, block.fc1, block.fc2,
    )  # fmt: skip
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    chunks = segments.in_chunks(CHUNK_TOKENS)
    keep_little = keep_little or not torch.is_grad_enabled()  # which a Function cannot ask inside
    return _BlockInChunks.apply(x, chunks, block.heads, block.norm1.eps, keep_little, *parameters)


def merge_in_chunks(merge: Merge, x: Tensor, rounding: Tensor) -> Tensor:
    """What `Merge.compute` computes, [N, D] -> [N / 2, D]."""
    parameters = (merge.reduction.weight, merge.norm.weight, merge.norm.bias)
    return _MergeInChunks.apply(x, rounding, merge.norm.eps, *parameters)

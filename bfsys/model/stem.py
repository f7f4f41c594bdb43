"""Bytes to tokens: embedding and strided convolution, computed as table lookups.

The published stem embeds every byte (257 x D) and runs a convolution of kernel K and stride K/2. Both are
linear in one-hot bytes, so  token[t] = sum_j table[j, byte[t * stride + j]]  with
table[j, v] = embedding[v] @ kernel[:, :, j].T, computed once per step. The largest tensor of the published
form, [bytes, D], never exists, and the convolution (half of the published FLOPs at K = 32) becomes K row
additions per token. Parameters stay the embedding and the kernel, so published weights fit.

Shapes: N tokens, K bytes per token, D dim, V = 257 byte values (256 is "no byte").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bfsys.model.layout import Layout
from bfsys.model.sizes import BYTE_VALUES, PAD_BYTE, Architecture

# Tokens per pass of the backward: the gradient rows of a pass stay in the cache while all K byte positions
# read them (2,048 is fastest of 512 to 16,384 on two CPU cores, by 2 to 10 %; 2026-11-21).
BACKWARD_CHUNK_TOKENS = 2048


class LookupSum(torch.autograd.Function):
    """tokens[n] = sum_j table[index[n, j]]; exact in both directions.

    The table's gradient is accumulated in float32 (float64 for float64 tables): a row collects thousands of
    bfloat16 gradients, which would drown in each other.
    """

    @staticmethod
    def forward(ctx, table: Tensor, index: Tensor) -> Tensor:  # [K * V, D], int32 [N, K] -> [N, D]
        ctx.save_for_backward(index)
        ctx.rows, ctx.dtype = table.shape[0], table.dtype
        return F.embedding_bag(index, table, mode="sum", padding_idx=PAD_BYTE)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # [N, D]
        (index,) = ctx.saved_tensors
        accumulate = torch.float64 if grad.dtype == torch.float64 else torch.float32
        table_grad = grad.new_zeros(ctx.rows, grad.shape[1], dtype=accumulate)
        for start in range(0, len(index), BACKWARD_CHUNK_TOKENS):
            chunk = slice(start, start + BACKWARD_CHUNK_TOKENS)
            rows = grad[chunk].to(accumulate)
            for j in range(index.shape[1]):
                table_grad.index_add_(0, index[chunk, j], rows)
        table_grad[PAD_BYTE] = 0
        return table_grad.to(ctx.dtype), None


class Stem(nn.Module):
    """Bytes [total] and their layout -> tokens [N, D], positions added (published: after the convolution)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        dim = architecture.dim
        self.stride = architecture.stride
        self.embedding = nn.Parameter(torch.empty(BYTE_VALUES + 1, dim))
        self.kernel = nn.Parameter(torch.empty(dim, dim, architecture.kernel))  # [out, in, K]
        self.positions = nn.Parameter(torch.empty(architecture.max_tokens, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        dim, _, kernel = self.kernel.shape
        nn.init.trunc_normal_(self.embedding, std=dim**-0.5)
        nn.init.trunc_normal_(self.positions, std=dim**-0.5)
        nn.init.uniform_(self.kernel, -((dim * kernel) ** -0.5), (dim * kernel) ** -0.5)
        with torch.no_grad():
            self.embedding[PAD_BYTE].zero_()

    def forward(self, data: Tensor, layout: Layout) -> Tensor:
        table = torch.einsum("vi,oik->kvo", self.embedding, self.kernel).flatten(0, 1)  # [K * V, D]
        tokens = LookupSum.apply(table, self._table_rows(data, layout))
        return tokens + F.embedding(layout.position, self.positions)

    @torch.no_grad()
    def _table_rows(self, data: Tensor, layout: Layout) -> Tensor:
        """The table row of each byte that each token sees; PAD_BYTE past the end of its file. int32 [N, K]"""
        offset = torch.arange(self.kernel.shape[2], device=data.device)  # [K]
        place = layout.first_byte[:, None] + offset  # [N, K]
        inside = place < layout.end_byte[:, None]
        value = data[place.clamp_(max=len(data) - 1)].to(torch.int32)
        row = value + (offset * (BYTE_VALUES + 1)).to(torch.int32)
        return row.masked_fill_(~inside, PAD_BYTE)

"""Bytes to tokens: embedding and strided convolution, computed as table lookups.

The published stem embeds every byte (257 x D) and runs a convolution of kernel K and stride K/2. Both are linear in
one-hot bytes, so  token[t] = sum_j table[j, byte[t * stride + j]]  with table[j, v] = embedding[v] @ kernel[:, :, j].T,
computed once per micro-batch. The largest tensor of the published implementation, [bytes, D], is never created, and
the convolution (half of the published FLOPs at K = 32) becomes K row additions per token. The parameters are still the
embedding and the kernel, so published weights fit.

A learned position is added to each token. If a file has more tokens than there are positions, the second half of the
table is repeated. Tokens early in a file, above all its headers, therefore keep their positions for every length,
tokens of a window keep their order, and no position is used that training has not used. Rejected alternatives: an
error; stretching the table, because one token beyond the limit would then move the positions of all tokens; repeating
the last row, because all tokens of a window would then have the same position.

Shapes: N tokens, K bytes per token, D dim, V = 257 byte values (256 is "no byte"), P rows of positions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bfsys.model.attention import kernels_for
from bfsys.model.layout import Files
from bfsys.model.precision import product_dtype, stored_dtype
from bfsys.model.sizes import BYTE_VALUES, PAD_BYTE, Architecture

# Tokens per chunk on a CPU, so that their rows of the table and of the gradient stay in the cache.
CHUNK_TOKENS = 8192
# Length of the RBF kernel in byte values, and share of the variance that is independent for each value
# (docs/experiments.md).
SMOOTH_LENGTH, WHITE_SHARE = 16, 0.1


class Tokens(torch.autograd.Function):
    """tokens[n] = sum_j table[row[n, j]] + positions[place[n]], zero for those that only round a sequence up.

    table [K * V, D], positions [P, D] -> [N, D] in the table's precision; exact in both directions. Gradients are
    summed in float32 (float64 for float64 tables). A row sums thousands of gradients, and a sum in bfloat16 would lose
    most of them.
    """

    @staticmethod
    def forward(ctx, table: Tensor, positions: Tensor, data: Tensor, files: Files, kernel: int) -> Tensor:
        ctx.save_for_backward(data)
        ctx.files, ctx.kernel = files, kernel
        ctx.table_rows, ctx.position_rows = len(table), len(positions)
        ctx.dtypes = table.dtype, positions.dtype
        if kernels := kernels_for(data.device, table.dtype):
            f = files
            tokens = kernels.stem_forward(
                table, positions, data, f.file, f.first_byte, f.end_byte, f.first_token, f.tokens, kernel // 2
            )
            places = [p for p in files.places if p[1] > len(positions)]  # the kernel skips these
        else:
            tokens, places = sum_of_rows(table, data, files, kernel), files.places
        for first, count in places:
            for token, row, run in position_runs(count, len(positions)):
                tokens[first + token : first + token + run] += positions[row : row + run]
        return tokens

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # [N, D]
        (data,) = ctx.saved_tensors
        wide, places = torch.promote_types(grad.dtype, torch.float32), ctx.files.places
        if kernels := kernels_for(data.device, grad.dtype):
            f, k = ctx.files, ctx.kernel
            table_grad = kernels.stem_backward(
                grad, data, f.file, f.first_byte, f.end_byte, f.first_token, f.tokens, k // 2, k
            )
            positions_grad = kernels.positions_backward(grad, f.first_token, f.tokens, ctx.position_rows)
            places = [p for p in places if p[1] > ctx.position_rows]
        else:
            table_grad = rows_gradient(grad, data, ctx.files, ctx.kernel, ctx.table_rows)
            positions_grad = grad.new_zeros(ctx.position_rows, grad.shape[1], dtype=wide)
        for first, count in places:
            for token, row, run in position_runs(count, ctx.position_rows):
                positions_grad[row : row + run] += grad[first + token : first + token + run]
        return table_grad.to(ctx.dtypes[0]), positions_grad.to(ctx.dtypes[1]), None, None, None


def sum_of_rows(table: Tensor, data: Tensor, files: Files, kernel: int) -> Tensor:
    """[N, D]. Padding needs no `padding_idx`, since its rows of the table are zero; `embedding_bag` would take seven
    times as long with it."""
    tokens = table.new_empty(len(files.file), table.shape[1])
    for chunk, rows in table_rows(data, files, kernel):
        tokens[chunk] = F.embedding_bag(rows, table, mode="sum")
    return tokens


def rows_gradient(grad: Tensor, data: Tensor, files: Files, kernel: int, rows_of_table: int) -> Tensor:
    """The gradient of the table, [N, D] -> [K * V, D]. A row's gradient is the sum of those of the tokens to which it
    was added, which are found by sorting. This takes half the time of `index_add_` (2 CPU cores, 2026-11-21)."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    table_grad = grad.new_zeros(rows_of_table, grad.shape[1], dtype=wide)
    for chunk, rows in table_rows(data, files, kernel):
        tokens = torch.argsort(rows.flatten(), stable=True).div_(kernel, rounding_mode="floor")
        counts = torch.bincount(rows.flatten(), minlength=rows_of_table)
        table_grad += F.embedding_bag(tokens, grad[chunk].to(wide), counts.cumsum(0) - counts, mode="sum")
    table_grad.view(kernel, -1, grad.shape[1])[:, PAD_BYTE] = 0
    return table_grad


def table_rows(data: Tensor, files: Files, kernel: int) -> Iterator[tuple[slice, Tensor]]:
    """Runs of tokens, and the row of the table for each of their bytes, int32 [C, K]. Past the end of a file it is the
    row of PAD_BYTE."""
    offset = torch.arange(kernel, device=data.device)
    first_row = (offset * (BYTE_VALUES + 1)).to(torch.int32)
    for start in range(0, len(files.file), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        file = files.file[chunk]
        place = torch.arange(start, start + len(file), device=data.device) - files.first_token[file]  # in its file
        byte = (files.first_byte[file] + place * (kernel // 2))[:, None] + offset  # [C, K]
        inside = byte < torch.where(place < files.tokens[file], files.end_byte[file], 0)[:, None]
        value = data[byte.clamp_(max=len(data) - 1)].to(torch.int32).masked_fill_(~inside, PAD_BYTE)
        yield chunk, value + first_row


def position_runs(tokens: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """The positions of a file's tokens as runs: (first token, its row of the position table, number of tokens)."""
    repeated = (rows + 1) // 2
    yield 0, 0, min(tokens, rows)
    for first in range(rows, tokens, repeated):
        yield first, rows - repeated, min(repeated, tokens - first)


class Stem(nn.Module):
    """Bytes [total] and the places of the files -> tokens [N, D] with positions (published: after the convolution)."""

    def __init__(self, architecture: Architecture, init: str) -> None:
        super().__init__()
        dim = architecture.dim
        self.embedding = nn.Parameter(torch.empty(BYTE_VALUES + 1, dim))
        self.kernel = nn.Parameter(torch.empty(dim, dim, architecture.kernel))  # [out, in, K]
        self.positions = nn.Parameter(torch.empty(architecture.max_tokens, dim))
        self.reset_parameters(init)

    def reset_parameters(self, init: str) -> None:
        """Draw the initial weights. For `init` "smooth" see `smooth_embedding` and `sine_positions`; the kernel is
        drawn as published."""
        dim, _, kernel = self.kernel.shape
        nn.init.trunc_normal_(self.embedding, std=dim**-0.5)
        nn.init.trunc_normal_(self.positions, std=dim**-0.5)
        nn.init.uniform_(self.kernel, -((dim * kernel) ** -0.5), (dim * kernel) ** -0.5)
        with torch.no_grad():
            if init == "smooth":
                self.embedding[:PAD_BYTE] = smooth_embedding(dim)
                self.positions.copy_(sine_positions(*self.positions.shape))
            self.embedding[PAD_BYTE].zero_()

    def forward(self, data: Tensor, files: Files) -> Tensor:
        return Tokens.apply(self.table(), self.positions, data, files, self.kernel.shape[2])

    def table(self) -> Tensor:
        """[K * V, D]; the rows of PAD_BYTE are zero, even if its embedding is not."""
        stored = stored_dtype(self.embedding)
        dtype = product_dtype(stored, self.embedding.device.type)
        with torch.autocast(self.embedding.device.type, enabled=False):
            embedding, kernel = self.embedding[:PAD_BYTE].to(dtype), self.kernel.to(dtype)
            table = torch.einsum("vi,oik->kvo", embedding, kernel).to(stored)
        return F.pad(table, (0, 0, 0, 1)).flatten(0, 1)


def smooth_embedding(dim: int) -> Tensor:
    """[256, dim]: each channel is a random smooth function of the byte's value, with a standard deviation of dim^-0.5.

    Byte values lie on a circle, since 255 and 0 are neighbours in two's complement, and the low byte of a longer
    integer wraps around. The functions are draws from a Gaussian process with an RBF kernel plus white noise. The noise
    distinguishes neighbouring values.
    """
    distance = (torch.arange(BYTE_VALUES)[:, None] - torch.arange(BYTE_VALUES)).abs()
    distance = torch.minimum(distance, BYTE_VALUES - distance)
    covariance = (1 - WHITE_SHARE) * torch.exp(-0.5 * (distance / SMOOTH_LENGTH) ** 2)
    covariance += WHITE_SHARE * torch.eye(BYTE_VALUES)
    return torch.linalg.cholesky(covariance) @ torch.randn(BYTE_VALUES, dim) * dim**-0.5


def sine_positions(rows: int, dim: int) -> Tensor:
    """[rows, dim]: sines and cosines of wavelengths from 2 pi to 20,000 pi tokens (Vaswani et al. 2017).

    Their root mean square is (2 dim)^-0.5; that of published positions is dim^-0.5.
    """
    angle = torch.arange(rows)[:, None] * 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :dim] * dim**-0.5

"""Test cases that compare the kernels of bfsys with plain PyTorch in float64, for `bfsys check-gpu` and the tests.

A case draws its inputs, runs kernels on `device` (twice, if equal bits are promised) and returns what it compared.
Values that a kernel must not read are NaN. The references favour readability and run on the CPU.

Shapes: N tokens, D dim, K bytes per token, S segments, H heads, E = D / H; M rows of a norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Largest error over largest value. bfloat16 has 8 bits; probabilities and their gradients are rounded to it too.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
NORM_TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NORM_SUM_TOLERANCE = 2e-6  # for gradients of weight and bias, which are float32 sums
EPS = 1e-5
PROCESSORS = 3  # for the norm's backward; so few that each program has several blocks of rows
PADDING = 256  # index after the byte values


@dataclass(frozen=True)
class Compared:
    what: str
    error: float
    """Largest difference divided by the largest expected value; infinite for NaN."""
    allowed: float

    @property
    def is_right(self) -> bool:
        return self.error <= self.allowed


def compare(what: str, actual: Tensor, expected: Tensor, allowed: float) -> Compared:
    """Compare with `expected`, which is float64 on the CPU."""
    if actual.shape != expected.shape:
        return Compared(f"{what}: shape", math.inf, 0)
    error = (actual.double().cpu() - expected).abs().max().item() / max(expected.abs().max().item(), 1e-3)
    return Compared(what, error if math.isfinite(error) else math.inf, allowed)


def is_true(what: str, fact: bool) -> Compared:
    """Return a comparison that is either right or wrong."""
    return Compared(what, 0.0 if fact else math.inf, 0)


def same_bits(what: str, run: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Compared]:
    """Call `run` twice. Returns the first results, and whether the second ones are bit-identical."""
    first, second = run(), run()
    return first, is_true(f"{what}: the same bits twice", all(map(torch.equal, first, second)))


def sum_tolerance(device: torch.device) -> float:
    """The relative error allowed for gradients in any precision. Products with ones are exact, and their sums are
    float32. Matrix units truncate sums instead of rounding them, which costs float32 gradients a digit."""
    return 1e-5 if device.type == "cuda" else 1e-6


# --- Stem --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RaggedFiles:
    """Files of a batch: the index tensors of the kernels, on the CPU."""

    index: dict[str, Tensor]
    rows: int
    stride: int

    def on(self, device: torch.device) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in self.index.items()}


def ragged_files(kernel: int, alignment: int, longest: int, seed: int, tail: bool = True) -> RaggedFiles:
    """Make files of up to `longest` bytes. With `tail`, the last token of a file may be partial."""
    rng = np.random.default_rng(seed)
    stride = kernel // 2
    lengths = np.concatenate([[1 if tail else kernel, longest], rng.integers(kernel, longest, 3)])
    tokens = -(-lengths // stride) if tail else (lengths - kernel) // stride + 1
    aligned = -(-tokens // alignment) * alignment
    ends = np.cumsum(lengths) + 3  # the first bytes of the buffer belong to no file
    index = {
        "data": torch.from_numpy(rng.integers(0, 256, ends[-1], dtype=np.uint8)),
        "file": torch.from_numpy(np.repeat(np.arange(len(lengths), dtype=np.int32), aligned)),
        "first_byte": torch.from_numpy(ends - lengths),
        "end_byte": torch.from_numpy(ends),
        "first_token": torch.from_numpy(np.cumsum(aligned) - aligned),
        "tokens": torch.from_numpy(tokens.astype(np.int32)),
    }
    return RaggedFiles(index, int(aligned.sum()), stride)


def one_hot(files: RaggedFiles, kernel: int) -> Tensor:
    """[N, K * 257] in float64: the lookups as a matrix."""
    matrix = torch.zeros(files.rows, kernel, PADDING + 1, dtype=torch.float64)
    data, first_byte, end_byte, first_token = (
        files.index[name] for name in ("data", "first_byte", "end_byte", "first_token")
    )
    for i, count in enumerate(files.index["tokens"].tolist()):
        for place in range(count):
            begin = int(first_byte[i]) + place * files.stride
            seen = data[begin : min(begin + kernel, int(end_byte[i]))].long()
            matrix[int(first_token[i]) + place, torch.arange(len(seen)), seen] = 1
    return matrix.view(files.rows, -1)


def stem_case(
    kernels: ModuleType,
    device: torch.device,
    *,
    dtype: torch.dtype,
    kernel: int,
    dim: int,
    alignment: int,
    longest: int,
    tail: bool,
) -> list[Compared]:
    """Check the forward of the stem and the gradient of its table."""
    files = ragged_files(kernel, alignment, longest, seed=kernel, tail=tail)
    index, matrix = files.on(device), one_hot(files, kernel)
    generator = torch.Generator().manual_seed(kernel)
    table = torch.randn(kernel, PADDING + 1, dim, generator=generator)
    table[:, PADDING] = 0
    table = table.flatten(0, 1).to(dtype)
    tokens, first_token = files.index["tokens"], files.index["first_token"]
    # The longest file has more tokens than positions; the second longest has exactly as many.
    positions = torch.randn(int(tokens.sort().values[-2]), dim, generator=generator)
    grad = torch.randn(files.rows, dim, generator=generator).to(dtype)

    expected = matrix @ table.double()
    for first, count in zip(first_token.tolist(), tokens.tolist(), strict=True):
        if count <= len(positions):
            expected[first : first + count] += positions[:count]

    def run() -> tuple[Tensor, Tensor]:
        out = kernels.stem_forward(table.to(device), positions.to(device), stride=files.stride, **index)
        return out, kernels.stem_backward(grad.to(device), stride=files.stride, kernel=kernel, **index)

    (out, table_grad), same = same_bits("stem", run)
    file = files.index["file"].long()
    is_token = torch.arange(files.rows) - first_token[file] < tokens[file]
    padding = table_grad.view(kernel, PADDING + 1, dim)[:, PADDING]
    return [
        compare("stem forward", out, expected, TOLERANCE[dtype]),
        compare("stem backward", table_grad, matrix.T @ grad.double(), sum_tolerance(device)),
        is_true("stem: types of results", out.dtype == dtype and table_grad.dtype == torch.float32),
        is_true("stem forward: zero in rows that are no token", not out.cpu()[~is_token].any()),
        is_true("stem backward: zero in rows of no byte", not padding.any()),
        same,
    ]


def positions_case(
    kernels: ModuleType, device: torch.device, *, dtype: torch.dtype, dim: int, rows: int
) -> list[Compared]:
    """Check the gradient of `rows` positions."""
    tokens = torch.tensor([1, 40, 7, 33, 38, 100, 101])  # some have more tokens than positions
    aligned = -(-tokens // 4) * 4
    first = aligned.cumsum(0) - aligned
    grad = torch.randn(int(aligned.sum()), dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    expected = torch.zeros(rows, dim, dtype=torch.float64)
    for start, count in zip(first.tolist(), tokens.tolist(), strict=True):
        if count <= rows:
            expected[:count] += grad[start : start + count]
    given = grad.to(device), first.to(device), tokens.to(device), rows
    (out,), same = same_bits("positions", lambda: [kernels.positions_backward(*given)])
    return [
        compare("positions backward", out, expected, sum_tolerance(device)),
        is_true("positions backward: type of the result", out.dtype == torch.float32),
        same,
    ]


# --- Attention ---------------------------------------------------------------------------------------------------


def reference_attention(qkv: Tensor, start: Tensor, length: Tensor, heads: int) -> Tensor:
    """[N, 3D] -> [N, D], zero outside all segments"""
    dim = qkv.shape[1] // 3
    out = torch.zeros(len(qkv), dim, dtype=qkv.dtype)
    for first, count in zip(start.tolist(), length.tolist(), strict=True):
        segment = slice(first, first + count)
        q, k, v = qkv[segment].view(count, 3, heads, -1).permute(1, 2, 0, 3)
        p = (q @ k.mT / math.sqrt(dim // heads)).softmax(-1)
        out[segment] = (p @ v).transpose(0, 1).reshape(count, dim)
    return out


def attention_case(
    kernels: ModuleType,
    device: torch.device,
    *,
    dtype: torch.dtype,
    width: int,
    dim: int,
    heads: int,
    segments: int = 4,
) -> list[Compared]:
    """Check attention forward and backward in `segments` segments of up to `width` tokens. Between some segments are
    rows of no segment."""
    rng = np.random.default_rng(width)
    lengths = np.concatenate([[1, width], rng.integers(1, width + 1, segments - 2)])
    gap = np.arange(segments) % 2 * (1 + np.arange(segments) % 3)  # rows of no segment after each
    starts = np.cumsum(lengths + gap) - lengths - gap
    rows = int((lengths + gap).sum())
    inside = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    start, length = torch.from_numpy(starts), torch.from_numpy(lengths)
    outside = torch.from_numpy(np.setdiff1d(np.arange(rows), inside))

    generator = torch.Generator().manual_seed(width)
    qkv = (2 * torch.randn(rows, 3 * dim, generator=generator)).to(dtype)
    grad = torch.randn(rows, dim, generator=generator).to(dtype)
    leaf = qkv.double().requires_grad_()
    expected = reference_attention(leaf, start, length, heads)
    expected.backward(grad.double())
    assert leaf.grad is not None

    qkv[outside], grad[outside] = math.nan, math.nan  # must not be read
    where = start.to(device), length.to(device), width, heads, outside.to(device)

    def run() -> tuple[Tensor, Tensor]:
        return (
            kernels.attention_forward(qkv.to(device), *where),
            kernels.attention_backward(qkv.to(device), grad.to(device), *where),
        )

    (out, qkv_grad), same = same_bits("attention", run)
    parts = zip("qkv", qkv_grad.chunk(3, 1), leaf.grad.chunk(3, 1), strict=True)
    return [
        compare("attention forward", out, expected.detach(), TOLERANCE[dtype]),
        *(compare(f"attention backward of {name}", part, wanted, TOLERANCE[dtype]) for name, part, wanted in parts),
        is_true("attention: types of results", out.dtype == qkv_grad.dtype == dtype),
        is_true("attention: zero in rows of no segment", not out[outside].any() and not qkv_grad[outside].any()),
        same,
    ]


# --- Norms -------------------------------------------------------------------------------------------------------


def norm_inputs(rows: int, dim: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> dict[str, Tensor]:
    """Make rows with means far from zero, like those of a residual stream."""
    generator = torch.Generator().manual_seed(rows + dim)
    x, added, grad, total_grad = torch.randn(4, rows, dim, generator=generator)
    weight, bias = 1 + 0.3 * torch.randn(2, dim, generator=generator)
    rows_of = {"x": 3 * x + 2, "added": added, "grad": grad, "total_grad": total_grad}
    return {
        **{name: value.to(dtype) for name, value in rows_of.items()},
        "weight": weight.to(weight_dtype), "bias": bias.to(weight_dtype),
    }  # fmt: skip


def norm_case(
    kernels: ModuleType,
    device: torch.device,
    *,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    dim: int,
    rows: int,
    adds: bool,
) -> list[Compared]:
    """Check addition and norm, forward and backward."""
    given = norm_inputs(rows, dim, dtype, weight_dtype)
    t = {name: value.to(device) for name, value in given.items()}
    added, total_grad = (t["added"], t["total_grad"]) if adds else (None, None)
    total, out = kernels.norm_forward(t["x"], added, t["weight"], t["bias"], EPS)
    wide = {name: value.double().requires_grad_() for name, value in given.items()}
    rows_normed = total.cpu().double().requires_grad_()
    expected = F.layer_norm(rows_normed, (dim,), wide["weight"], wide["bias"], EPS)
    expected.backward(wide["grad"].detach())
    assert rows_normed.grad is not None

    (x_grad, *sums), same = same_bits(
        "norm backward", lambda: kernels.norm_backward(total, t["grad"], total_grad, t["weight"], EPS, PROCESSORS)
    )
    of_x = rows_normed.grad + (wide["total_grad"].detach() if adds else 0)
    results = [
        is_true("norm forward: the sum", torch.equal(total, t["x"] + t["added"] if adds else t["x"])),
        compare("norm forward", out, expected.detach(), NORM_TOLERANCE[dtype]),
        compare("norm backward", x_grad, of_x, NORM_TOLERANCE[dtype]),
        is_true("norm backward: type of the result", x_grad.dtype == dtype),
        same,
    ]
    for value, name in zip(sums, ("weight", "bias"), strict=True):
        wanted = wide[name].grad
        assert wanted is not None
        results.append(compare(f"norm backward of the {name}", value, wanted, NORM_SUM_TOLERANCE))
        results.append(is_true(f"norm backward of the {name}: type of the result", value.dtype == torch.float32))
    return results

"""The stem and the attention on NVIDIA GPUs (sm_80 and newer, tuned for sm_90), as Triton kernels.

Each function is one half of an autograd function. Only code for GPUs imports this module, so bfsys runs without Triton.
Every sum has a fixed order and a single writer: there are no atomics, and the bits are the same every time on the same
kind of GPU. Block sizes are constants with documented reasons. An autotuner's choice may change from run to run.

Shapes: B files, N tokens in the buffer, D dim, K bytes per token, V = 257 byte values (256 is "no byte"),
S segments of at most `width` tokens, H heads of E = D / H channels. Index tensors are int32 or int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bfsys.model.attention import processors

VALUES = tl.constexpr(257)
BYTES = tl.constexpr(256)  # number of byte values; value 256 is the padding
LOG2_E = tl.constexpr(1.4426950408889634)

# Index tensors are slices of one tensor (layout.py), so their alignment changes from batch to batch. Triton would
# recompile each kernel for each combination of alignments.
FILE_INDEX = ["first_byte", "end_byte", "first_token", "tokens"]
SEGMENT_INDEX = ["start", "length"]

BLOCK_D = 64  # channels per program: a row in bfloat16 is one cache line (128 bytes), and it divides dim of all sizes
WIDEST = 128  # tokens of a segment that one program can hold
WIDEST_HEAD = 64  # channels, likewise
# Memory for the partial sums of the table's gradient; one part may take more. At K = 32 on an H200, these are 11 parts
# of 6 MB for tiny and 2 of 25 MB for base.
PARTIAL_BYTES = 256 * 2**20


def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


@triton.jit
def _write_one(out):
    tl.store(out, 1)


def try_compiler(device: torch.device) -> None:
    """Compile and launch the smallest kernel. Raises Triton's own errors if it cannot compile."""
    out = torch.empty(1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(out):  # Triton launches on the current GPU
        _write_one[1,](out)


# --- Stem --------------------------------------------------------------------------------------------------------


@triton.jit
def _locate(n, rows, file, first_byte, end_byte, first_token, tokens, stride):
    """For rows n (int64): position in the file, the file's number of tokens (0 for rows that are not tokens), first
    byte in `data`, and bytes from there to the end of the file (0 or less past the end)."""
    f = tl.load(file + n, mask=n < rows, other=0)
    place = n - tl.load(first_token + f)
    count = tl.load(tokens + f)
    count = tl.where((n < rows) & (place < count), count, 0)
    begin = tl.load(first_byte + f).to(tl.int64) + place * stride
    return place, count, begin, tl.where(count > 0, tl.load(end_byte + f) - begin, 0)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=FILE_INDEX)
def _stem_forward(
    table, positions, data, file, first_byte, end_byte, first_token, tokens, out, rows, position_rows, stride,
    K: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    place, count, begin, seen = _locate(n, rows, file, first_byte, end_byte, first_token, tokens, stride)
    given = (count > 0) & (count <= position_rows)
    acc = tl.load(positions + place[:, None] * D + d, mask=given[:, None] & (d < D), other=0).to(tl.float32)
    for j in tl.range(0, K, loop_unroll_factor=2):
        here = j < seen
        value = tl.load(data + begin + j, mask=here, other=0).to(tl.int32)
        acc += tl.load(table + value[:, None] * D + d, mask=here[:, None] & (d < D), other=0).to(tl.float32)
        table += VALUES * D
    tl.store(out + n[:, None] * D + d, acc.to(out.dtype.element_ty), mask=(n < rows)[:, None] & (d < D))


def stem_forward(
    table: Tensor, positions: Tensor, data: Tensor, file: Tensor, first_byte: Tensor, end_byte: Tensor,
    first_token: Tensor, tokens: Tensor, stride: int,
) -> Tensor:  # fmt: skip
    """For each token, the sum of the table's rows of its bytes, plus its position: [N, D] in the table's dtype.

    table        [K * V, D]   float32 or bfloat16
    positions    [P, D]       added in files of at most P tokens; the caller adds those of longer files
    data         uint8        the files' bytes; file i's begin at first_byte[i] and end before end_byte[i]
    file         [N]          each row's file
    first_byte, end_byte, first_token, tokens  [B]
    stride                    bytes from a token to the next; a token covers K bytes

    Rows that are not tokens become zero. Sums are in float32.
    """
    rows, dim = len(file), table.shape[1]
    out = table.new_empty(rows, dim)
    # Each thread sums 8 channels (4 in float32) of 4 tokens, with loads for two byte positions in flight. This takes
    # about 90 registers, so two programs of 8 warps fit on a multiprocessor. With one token per thread, Triton would
    # pass the bytes through shared memory. Programs of the same channel block are neighbours, so its slice of the table
    # (1 MB at K = 32) stays in the L2 cache, whose bandwidth limits this kernel.
    block = 256 // table.element_size()
    grid = (triton.cdiv(rows, block), triton.cdiv(dim, BLOCK_D))
    with torch.cuda.device_of(table):
        _stem_forward[grid](
            table.contiguous(), positions.contiguous(), data, file, first_byte, end_byte, first_token, tokens, out,
            rows, len(positions), stride,
            K=len(table) // VALUES.value, D=dim, BLOCK_N=block, BLOCK_D=BLOCK_D, num_warps=8,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=FILE_INDEX)
def _stem_bytes(
    data, file, first_byte, end_byte, first_token, tokens, out, rows, pitch, stride,
    K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    _, _, begin, seen = _locate(n, rows, file, first_byte, end_byte, first_token, tokens, stride)
    for _ in range(K):
        value = tl.load(data + begin, mask=seen > 0, other=0).to(tl.float32)
        tl.store(out + n, tl.where(seen > 0, value, BYTES).to(out.dtype.element_ty), mask=n < pitch)
        begin += 1
        seen -= 1
        out += pitch


@triton.jit
def _one_hot(values, numbers, dtype: tl.constexpr):
    return tl.where(values[None, :] == numbers[:, None], 1.0, 0.0).to(dtype)


@triton.jit(do_not_specialize=["rows"])
def _stem_backward(
    grad, values, numbers, partial, rows, split_rows, pitch,
    K: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    j = 2 * tl.program_id(0)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    split = tl.program_id(2).to(tl.int64)
    # The numbers are loaded, not computed. If both operands are loaded, Triton compares them in the register layout of
    # the matrix units. Otherwise every one-hot matrix passes through shared memory.
    byte = tl.load(numbers + tl.arange(0, BYTES))
    even = tl.zeros([BYTES, BLOCK_D], tl.float32)
    odd = tl.zeros([BYTES, BLOCK_D], tl.float32)
    values += tl.cast(j, tl.int64) * pitch + split * split_rows
    grad += split * split_rows * D + d
    count = tl.minimum(rows - split * split_rows, split_rows).to(tl.int32)
    for first in tl.range(0, count, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        g = tl.load(grad + n.to(tl.int64)[:, None] * D, mask=(n < count)[:, None] & (d < D), other=0)
        even_value, odd_value = tl.load(values + n), tl.load(values + pitch + n)
        if g.dtype == tl.float32:  # split into three bfloat16 numbers: exact products, on the fast matrix units
            for _ in tl.static_range(3):
                part = g.to(tl.bfloat16)
                even = tl.dot(_one_hot(even_value, byte, tl.bfloat16), part, even)
                odd = tl.dot(_one_hot(odd_value, byte, tl.bfloat16), part, odd)
                g -= part.to(tl.float32)
        else:
            even = tl.dot(_one_hot(even_value, byte, g.dtype), g, even)
            odd = tl.dot(_one_hot(odd_value, byte, g.dtype), g, odd)
    out = partial + ((split * K + j) * BYTES + tl.arange(0, BYTES))[:, None] * D + d
    tl.store(out, even, mask=d < D)
    tl.store(out + BYTES * D, odd, mask=d < D)


def _split_count(tiles: int, blocks: int, partial_bytes: int, processors: int) -> int:
    """The number of parts to split the tokens into. Each part has `tiles` programs, and a multiprocessor runs one
    program at a time. The result is the fewest parts that leave the smallest share of the last wave idle."""
    most = max(1, min(blocks, 4 * processors // tiles + 1, PARTIAL_BYTES // partial_bytes))
    return max(range(1, most + 1), key=lambda s: tiles * s / (-(-tiles * s // processors) * processors))


def stem_backward(
    grad: Tensor, data: Tensor, file: Tensor, first_byte: Tensor, end_byte: Tensor, first_token: Tensor,
    tokens: Tensor, stride: int, kernel: int,
) -> Tensor:  # fmt: skip
    """Gradient of the table from that of the tokens, grad [N, D]: float32 [K * V, D], zero in the padding's rows.

    The transpose of a lookup is a product with one-hot matrices. On the matrix units it is faster than scattered
    additions to memory, and its order is fixed. Different programs sum parts of the tokens, and the partial sums are
    added afterwards.
    """
    rows, dim = grad.shape
    grad = grad.contiguous()
    # A program computes two byte positions, which halves the reads of the gradient. Their sums, 2 x [256, 64], take 128
    # registers of each thread of 8 warps, and the one-hot matrices take most of the others. So one program fits on a
    # multiprocessor. With three stages, loads of two blocks of the gradient are in flight. In float32, 32 rows fit on
    # sm_90 and sm_100 only. On sm_80 a thread would spill 9 kB (Triton 3.8).
    block = 64
    if grad.dtype == torch.float32:
        block = 32 if _generation(grad.device) in (9, 10) else 16
    tiles, blocks = kernel // 2 * triton.cdiv(dim, BLOCK_D), max(1, triton.cdiv(rows, block))
    splits = _split_count(tiles, blocks, 4 * kernel * BYTES.value * dim, processors(grad.device))
    split_rows = triton.cdiv(blocks, splits) * block
    pitch = splits * split_rows  # whole blocks, so that the loop below needs no mask for bytes
    values = grad.new_empty(kernel, pitch, dtype=torch.bfloat16)  # exact for bytes; two are compared at once
    numbers = torch.arange(BYTES.value, dtype=values.dtype, device=grad.device)
    partial = grad.new_empty(splits, kernel, BYTES.value, dim, dtype=torch.float32)
    with torch.cuda.device_of(grad):
        _stem_bytes[(triton.cdiv(pitch, 256),)](
            data, file, first_byte, end_byte, first_token, tokens, values, rows, pitch, stride, K=kernel, BLOCK_N=256
        )
        _stem_backward[(kernel // 2, triton.cdiv(dim, BLOCK_D), splits)](
            grad, values, numbers, partial, rows, split_rows, pitch,
            K=kernel, D=dim, BLOCK_N=block, BLOCK_D=BLOCK_D, num_warps=8, num_stages=3,
        )  # fmt: skip
    out = partial.new_zeros(kernel, VALUES.value, dim)
    out[:, : BYTES.value] = partial.sum(0)
    return out.flatten(0, 1)


@triton.jit(do_not_specialize=["files"], do_not_specialize_on_alignment=FILE_INDEX)
def _positions_backward(
    grad, out, first_token, tokens, files, rows,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    longest = tl.zeros([BLOCK_F], tl.int32)
    for i in range(0, files, BLOCK_F):
        f = i + tl.arange(0, BLOCK_F)
        count = tl.load(tokens + f, mask=f < files, other=0).to(tl.int32)
        longest = tl.maximum(longest, tl.where(count <= rows, count, 0))
    used = tl.program_id(0) * BLOCK_P < tl.max(longest, 0)  # most positions are beyond the longest file
    acc = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for i in tl.range(0, tl.where(used, files, 0), loop_unroll_factor=4):  # loads for four files in flight
        count = tl.load(tokens + i)
        n = tl.load(first_token + i).to(tl.int64) + p
        mask = (p < tl.where(count <= rows, count, 0))[:, None] & (d < D)
        acc += tl.load(grad + n[:, None] * D + d, mask=mask, other=0).to(tl.float32)
    tl.store(out + p.to(tl.int64)[:, None] * D + d, acc, mask=(p < rows)[:, None] & (d < D))


def positions_backward(grad: Tensor, first_token: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """Gradient of the `rows` positions from that of the tokens, grad [N, D]: float32 [rows, D].

    out[p] = sum of grad[first_token[i] + p] over the files i with p < tokens[i] <= rows, in the files' order.
    """
    dim = grad.shape[1]
    out = grad.new_empty(rows, dim, dtype=torch.float32)
    block = 16  # small, since only positions within a file have work, and each program loops over all files
    with torch.cuda.device_of(grad):
        _positions_backward[(triton.cdiv(rows, block), triton.cdiv(dim, BLOCK_D))](
            grad.contiguous(), out, first_token, tokens, len(tokens), rows,
            D=dim, BLOCK_P=block, BLOCK_D=BLOCK_D, BLOCK_F=256, num_warps=2,
        )  # fmt: skip
    return out


# --- Attention ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize_on_alignment=SEGMENT_INDEX)
def _attention_forward(
    qkv, out, start, length,
    D: tl.constexpr, H: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    segment, head = tl.program_id(0) // H, tl.program_id(0) % H
    first, count = tl.load(start + segment).to(tl.int64), tl.load(length + segment).to(tl.int32)
    qkv += first * 3 * D + head * E
    out += first * D + head * E
    e = tl.arange(0, BLOCK_E)[None, :]
    t = tl.arange(0, TILE)
    keys, inside = t[:, None] * (3 * D) + e, (t < count)[:, None] & (e < E)
    k = tl.load(qkv + D + keys, mask=inside, other=0)
    v = tl.load(qkv + 2 * D + keys, mask=inside, other=0)
    for block in tl.range(0, count, BLOCK_M):
        m = block + tl.arange(0, BLOCK_M)[:, None]
        mask = (m < count) & (e < E)
        q = tl.load(qkv + m * (3 * D) + e, mask=mask, other=0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (E**-0.5 * LOG2_E)
        s = tl.where((t < count)[None, :], s, float("-inf"))
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        o = tl.dot(p.to(v.dtype), v, input_precision="ieee") / tl.sum(p, 1)[:, None]
        tl.store(out + m * D + e, o.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=SEGMENT_INDEX)
def _attention_backward(
    qkv, grad, out, start, length,
    D: tl.constexpr, H: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Scores are transposed, with a query per column. The products that sum over queries can then take them from the
    registers that hold them."""
    segment, head = tl.program_id(0) // H, tl.program_id(0) % H
    first, count = tl.load(start + segment).to(tl.int64), tl.load(length + segment).to(tl.int32)
    qkv += first * 3 * D + head * E
    out += first * 3 * D + head * E
    grad += first * D + head * E
    e = tl.arange(0, BLOCK_E)[None, :]
    t = tl.arange(0, TILE)
    keys, inside = t[:, None] * (3 * D) + e, (t < count)[:, None] & (e < E)
    k = tl.load(qkv + D + keys, mask=inside, other=0)
    v = tl.load(qkv + 2 * D + keys, mask=inside, other=0)
    dk = tl.zeros([TILE, BLOCK_E], tl.float32)
    dv = tl.zeros([TILE, BLOCK_E], tl.float32)
    for block in tl.range(0, count, BLOCK_M):
        m = block + tl.arange(0, BLOCK_M)[:, None]
        mask = (m < count) & (e < E)
        q = tl.load(qkv + m * (3 * D) + e, mask=mask, other=0)
        g = tl.load(grad + m * D + e, mask=mask, other=0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * (E**-0.5 * LOG2_E)  # [TILE, BLOCK_M]
        s = tl.where((t < count)[:, None], s, float("-inf"))
        p = tl.exp2(s - tl.max(s, 0)[None, :])
        p = p / tl.sum(p, 0)[None, :]
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(g), input_precision="ieee")
        ds = (p * (dp - tl.sum(p * dp, 0)[None, :]) * E**-0.5).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        dq = tl.dot(tl.trans(k), ds, input_precision="ieee")  # [BLOCK_E, BLOCK_M]
        tl.store(out + m * (3 * D) + e, tl.trans(dq).to(out.dtype.element_ty), mask=mask)
    tl.store(out + D + keys, dk.to(out.dtype.element_ty), mask=inside)
    tl.store(out + 2 * D + keys, dv.to(out.dtype.element_ty), mask=inside)


def supports_attention(dtype: torch.dtype, width: int, dim: int, heads: int) -> bool:
    """Whether `attention_forward` and `attention_backward` support segments of up to `width` tokens of this kind. With
    more than the published 64 channels per head, the backward pass would spill registers and lack shared memory."""
    known = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and width <= WIDEST and dim % heads == 0 and dim // heads <= WIDEST_HEAD


def _tiles(width: int, dim: int, heads: int) -> dict[str, int]:
    head = dim // heads
    sizes = [max(16, triton.next_power_of_2(size)) for size in (width, head)]  # sizes that the matrix units take
    return {"D": dim, "H": heads, "E": head, "TILE": sizes[0], "BLOCK_E": sizes[1]}


def attention_forward(
    qkv: Tensor, start: Tensor, length: Tensor, width: int, heads: int, outside: Tensor
) -> Tensor:  # [N, 3D] -> [N, D]
    """Attention of every token to the tokens of its segment.

    qkv        [N, 3D]  all queries, all keys, all values; head by head in each
    start      [S]      first row of each segment
    length     [S]      its rows, from 1 to `width`
    outside    int64    the rows of no segment, zero in the result

    A program holds the keys and values of one head of one segment, so nothing is read twice. The softmax is in float32.
    """
    rows, dim = len(qkv), qkv.shape[1] // 3
    tiles, wide = _tiles(width, dim, heads), qkv.dtype == torch.float32
    out = qkv.new_empty(rows, dim)
    # Four warps multiply 64 queries at a time, and the scores against 128 keys take half of the registers. Three
    # programs fit on a multiprocessor, which hides waits for memory. float32 does not use the matrix units; with 32
    # queries at a time, Triton 3.9 spills 1,100 bytes per thread.
    block = min(tiles["TILE"], 16 if wide else 64)
    warps = tiles["TILE"] // 8 if wide else block // 16
    with torch.cuda.device_of(qkv):
        _attention_forward[(len(start) * heads,)](
            qkv.contiguous(), out, start, length, BLOCK_M=block, **tiles, num_warps=warps, num_stages=2
        )
    return out.index_fill_(0, outside, 0)


def attention_backward(
    qkv: Tensor, grad: Tensor, start: Tensor, length: Tensor, width: int, heads: int, outside: Tensor
) -> Tensor:  # [N, 3D], [N, D] -> [N, 3D]
    """Gradient of qkv from that of the output. The probabilities are recomputed, since the scores of a segment cost
    less than reading their stored sum. dq, dk and dv are written in one pass."""
    tiles, wide = _tiles(width, qkv.shape[1] // 3, heads), qkv.dtype == torch.float32
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    # 32 queries at a time against 128 keys, so that the sums of dk and dv (64 registers per thread of 8 warps) fit. On
    # sm_90 the compiler would use 147 registers. Limited to 128, it spills none, and two programs fit.
    block = min(tiles["TILE"], 16 if wide else 32)
    warps = tiles["TILE"] // 8 if wide or tiles["TILE"] < 64 else tiles["TILE"] // 16
    tight = _generation(qkv.device) == 9 and not wide and tiles["TILE"] == 128 and tiles["BLOCK_E"] <= 64
    with torch.cuda.device_of(qkv):
        _attention_backward[(len(start) * heads,)](
            qkv.contiguous(), grad.contiguous(), out, start, length, BLOCK_M=block, **tiles,
            num_warps=warps, num_stages=1 if wide else 2, maxnreg=128 if tight else None,
        )  # fmt: skip
    return out.index_fill_(0, outside, 0)

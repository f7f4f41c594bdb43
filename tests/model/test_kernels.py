"""The GPU kernels against plain PyTorch in float64: on a GPU where there is one, by Triton's interpreter otherwise."""

import math
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from bfsys.batch import ByteBatch, Sample
from bfsys.model import attention, norm, stem
from bfsys.model.byteformer import ByteFormer
from bfsys.model.sizes import architecture
from tests.model.triton_kernels import DEVICE, ON_GPU, close, compiled_for_nvidia, loaded

LONGEST = 2500 if ON_GPU else 250  # bytes; the interpreter is slow
# Largest error over largest value. bfloat16 has 8 bits; probabilities and their gradients are rounded to it too.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
# This holds for gradients in any precision: products with ones are exact, and their sums are float32. Matrix units cut
# sums off where others round, which costs float32 gradients a digit.
SUM_TOLERANCE = 1e-5 if ON_GPU else 1e-6


@pytest.fixture
def kernels_and_norms(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ModuleType]]:
    yield from loaded(monkeypatch, "kernels", "norm_kernels")


@pytest.fixture
def kernels(kernels_and_norms: list[ModuleType]) -> ModuleType:
    return kernels_and_norms[0]


# --- Stem --------------------------------------------------------------------------------------------------------


def ragged(kernel: int, alignment: int, seed: int, tail: bool = True) -> SimpleNamespace:
    """Some files and their index tensors. `tail`: a file's last token begins before its end; else it is whole."""
    rng = np.random.default_rng(seed)
    stride = kernel // 2
    lengths = np.concatenate([[1 if tail else kernel, LONGEST], rng.integers(kernel, LONGEST, 3)])
    tokens = -(-lengths // stride) if tail else (lengths - kernel) // stride + 1
    aligned = -(-tokens // alignment) * alignment
    ends = np.cumsum(lengths) + 3  # the buffer's first bytes are nobody's
    index = {
        "data": torch.from_numpy(rng.integers(0, 256, ends[-1], dtype=np.uint8)),
        "file": torch.from_numpy(np.repeat(np.arange(len(lengths), dtype=np.int32), aligned)),
        "first_byte": torch.from_numpy(ends - lengths),
        "end_byte": torch.from_numpy(ends),
        "first_token": torch.from_numpy(np.cumsum(aligned) - aligned),
        "tokens": torch.from_numpy(tokens.astype(np.int32)),
    }
    return SimpleNamespace(
        index={k: v.to(DEVICE) for k, v in index.items()}, rows=int(aligned.sum()), stride=stride, **index
    )


def one_hot(files: SimpleNamespace, kernel: int) -> Tensor:
    """[N, K * 257] in float64: the lookups as a matrix."""
    matrix = torch.zeros(files.rows, kernel, 257, dtype=torch.float64)
    for i, count in enumerate(files.tokens.tolist()):
        for place in range(count):
            begin = int(files.first_byte[i]) + place * files.stride
            for j in range(min(kernel, int(files.end_byte[i]) - begin)):
                matrix[int(files.first_token[i]) + place, j, int(files.data[begin + j])] = 1
    return matrix.view(files.rows, -1)


STEMS = [  # kernel, dim, alignment, whole windows only
    (2, 24, 1, False),
    (4, 48, 4, True),
    (8, 192, 64, False),
    (32, 72, 8, True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "dim", "alignment", "whole"), STEMS)
def test_stem_forward_sums_table_rows(kernels, kernel, dim, alignment, whole, dtype):
    files = ragged(kernel, alignment, seed=kernel, tail=not whole)
    generator = torch.Generator().manual_seed(kernel)
    table = torch.randn(kernel, 257, dim, generator=generator)
    table[:, 256] = 0
    table = table.flatten(0, 1).to(dtype)
    rows = int(files.tokens.sort().values[-2])  # the longest file has too many tokens for them, the next just not
    positions = torch.randn(rows, dim, generator=generator)

    expected = one_hot(files, kernel) @ table.double()
    for first, count in zip(files.first_token.tolist(), files.tokens.tolist(), strict=True):
        if count <= len(positions):
            expected[first : first + count] += positions[:count]
    out = kernels.stem_forward(table.to(DEVICE), positions.to(DEVICE), stride=files.stride, **files.index)
    assert out.dtype == dtype
    close(out, expected, TOLERANCE[dtype])
    place = torch.arange(files.rows) - files.first_token[files.file.long()]
    assert not out.cpu()[place >= files.tokens[files.file.long()]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "dim", "alignment", "whole"), STEMS)
def test_stem_backward_is_the_transpose(kernels, kernel, dim, alignment, whole, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_processors", lambda device: 3 * kernel)  # two to six splits
    files = ragged(kernel, alignment, seed=kernel, tail=not whole)
    grad = torch.randn(files.rows, dim, generator=torch.Generator().manual_seed(kernel)).to(dtype)
    out = kernels.stem_backward(grad.to(DEVICE), stride=files.stride, kernel=kernel, **files.index)
    assert out.dtype == torch.float32
    close(out, one_hot(files, kernel).T @ grad.double(), SUM_TOLERANCE)
    assert not out.view(kernel, 257, dim)[:, 256].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "rows"), [(24, 40), (48, 100), (192, 7)])
def test_positions_backward_sums_over_files(kernels, dim, rows, dtype):
    tokens = torch.tensor([1, 40, 7, 33, 38, 100, 101])  # some have too many for the positions
    aligned = -(-tokens // 4) * 4
    first = aligned.cumsum(0) - aligned
    grad = torch.randn(int(aligned.sum()), dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    expected = torch.zeros(rows, dim, dtype=torch.float64)
    for start, count in zip(first.tolist(), tokens.tolist(), strict=True):
        if count <= rows:
            expected[:count] += grad[start : start + count]
    out = kernels.positions_backward(grad.to(DEVICE), first.to(DEVICE), tokens.to(DEVICE), rows)
    assert out.dtype == torch.float32
    close(out, expected, SUM_TOLERANCE)


@pytest.mark.parametrize(
    ("tiles", "blocks", "megabytes", "expected"),
    [
        (48, 7000, 6, 11),  # tiny, K = 32: 4 whole waves on 132 multiprocessors
        (192, 7000, 25, 2),  # base, K = 32
        (6, 7000, 1, 22),  # tiny, K = 4: one whole wave
        (1, 7000, 200, 1),  # memory
        (48, 7, 6, 5),  # no more parts than blocks of tokens
    ],
)
def test_splits_fill_the_gpu(kernels, tiles, blocks, megabytes, expected):
    assert kernels._split_count(tiles, blocks, megabytes * 10**6, 132) == expected


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


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("width", "dim", "heads"), [(5, 24, 3), (16, 32, 1), (40, 48, 2), (100, 48, 1), (128, 192, 3)])
def test_attention_in_segments(kernels, width, dim, heads, dtype):
    assert kernels.supports_attention(dtype, width, dim, heads)
    rng = np.random.default_rng(width)
    length = np.concatenate([[1, width], rng.integers(1, width + 1, 2)])
    gap = np.array([0, 3, 0, 2])  # rows of no segment after each
    start = np.cumsum(length + gap) - length - gap
    rows = int((length + gap).sum())
    inside = np.concatenate([np.arange(s, s + n) for s, n in zip(start, length, strict=True)])
    start, length = torch.from_numpy(start), torch.from_numpy(length)
    outside = torch.from_numpy(np.setdiff1d(np.arange(rows), inside))

    generator = torch.Generator().manual_seed(width)
    qkv = (2 * torch.randn(rows, 3 * dim, generator=generator)).to(dtype)
    grad = torch.randn(rows, dim, generator=generator).to(dtype)
    leaf = qkv.double().requires_grad_()
    expected = reference_attention(leaf, start, length, heads)
    expected.backward(grad.double())

    where = {"width": width, "heads": heads, "outside": outside.to(DEVICE)}
    segments = start.to(DEVICE), length.to(DEVICE)
    qkv[outside], grad[outside] = math.nan, math.nan  # must not be read
    out = kernels.attention_forward(qkv.to(DEVICE), *segments, **where)
    qkv_grad = kernels.attention_backward(qkv.to(DEVICE), grad.to(DEVICE), *segments, **where)
    assert out.dtype == qkv_grad.dtype == dtype
    close(out, expected.detach(), TOLERANCE[dtype])
    for part, wanted in zip(qkv_grad.chunk(3, 1), leaf.grad.chunk(3, 1), strict=True):
        close(part, wanted, TOLERANCE[dtype])
    assert not out[outside].any()
    assert not qkv_grad[outside].any()


def test_attention_names_what_it_cannot_do(kernels):
    assert not kernels.supports_attention(torch.float64, 128, 192, 3)
    assert not kernels.supports_attention(torch.float32, 129, 192, 3)
    assert not kernels.supports_attention(torch.float32, 128, 192, 1)
    assert not kernels.supports_attention(torch.bfloat16, 128, 128, 1)
    assert kernels.supports_attention(torch.float16, 128, 128, 2)


# --- Compiling, which needs no GPU ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "dim", "kernel"),
    [
        (torch.bfloat16, 768, 32),
        pytest.param(torch.bfloat16, 192, 2, marks=pytest.mark.slow),
        pytest.param(torch.float32, 768, 32, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_hopper(dtype, dim, kernel, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from bfsys.model import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compiled_for_nvidia(90, monkeypatch)
    monkeypatch.setattr(kernels, "_generation", lambda device: 9)
    files, heads = ragged(kernel, 64, seed=0), dim // 64
    index = {name: tensor.cpu() for name, tensor in files.index.items()}
    qkv, outside = torch.zeros(files.rows, 3 * dim, dtype=dtype), torch.zeros(0, dtype=torch.int64)
    segments = index["first_token"], index["tokens"], 128, heads, outside
    table, positions = torch.zeros(kernel * 257, dim, dtype=dtype), torch.zeros(1000, dim)
    kernels.stem_forward(table, positions, stride=files.stride, **index)
    kernels.stem_backward(qkv[:, :dim], stride=files.stride, kernel=kernel, **index)
    kernels.positions_backward(qkv[:, :dim], index["first_token"], index["tokens"], 1000)
    kernels.attention_forward(qkv, *segments)
    kernels.attention_backward(qkv, qkv[:, :dim], *segments)
    assert len(compiled) == 6
    for name, program in compiled.items():
        assert program.asm["cubin"], name
        assert program.metadata.shared <= 227 * 1024, name


@pytest.mark.parametrize("rows", [600, 20])
def test_the_model_computes_the_same_by_kernels(kernels_and_norms, monkeypatch, rows):
    """Answers and gradients of a model whose stem, norms and attention are the kernels', and of one by PyTorch alone;
    with positions for every token, and for a part of them."""
    a = architecture(
        "custom", dim=32, layers=3, heads=2, kernel=8, window=16, shift=8, max_tokens=rows, merge_after=(0,)
    )
    rng = np.random.default_rng(0)
    files = [Sample("", rng.integers(0, 256, n, dtype=np.uint8)) for n in (1, 63, 64, 65, LONGEST)]
    batch = ByteBatch.from_samples(files).to(DEVICE)
    torch.manual_seed(0)
    model = ByteFormer(a, 5).to(DEVICE)
    for block in model.blocks:
        block.forward = block.compute  # as on a GPU
    results, called = [], []
    for found, norms in ((None, None), kernels_and_norms):
        for module in (attention, stem):
            monkeypatch.setattr(module, "kernels_for", lambda *_, found=found: called.append(found) or found)
        monkeypatch.setattr(norm, "norm_kernels_for", lambda *_, found=norms: called.append(found) or found)
        model.zero_grad()
        logits = model(batch)
        logits.square().sum().backward()
        results.append({"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters()}})
    assert called.count(kernels_and_norms[0]) >= 2 + 2 * a.layers
    assert called.count(kernels_and_norms[1]) == 2 * a.layers + len(a.merge_after)
    for name, want in results[0].items():
        close(results[1][name], want.double().cpu(), 1e-4 if ON_GPU else 1e-5)

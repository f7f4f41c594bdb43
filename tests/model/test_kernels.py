"""The GPU kernels against plain PyTorch in float64: on a GPU where there is one, by Triton's interpreter otherwise."""

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch

from bfsys.batch import ByteBatch, Sample
from bfsys.gpu_check.kernel_cases import TOLERANCE, attention_case, positions_case, ragged_files, stem_case
from bfsys.model import attention, norm, stem
from bfsys.model.byteformer import ByteFormer
from bfsys.model.sizes import architecture
from tests.model.triton_kernels import DEVICE, ON_GPU, all_right, close, compiled_for_nvidia, loaded, stack_bytes

LONGEST = 2500 if ON_GPU else 250  # bytes; the interpreter is slow
SHARED_KB = {80: 163, 89: 99, 90: 227}  # of a program, by compute capability
MOST_SPILLED = 320  # bytes of a thread; attention in float32 spills 288


@pytest.fixture
def kernels_and_norms() -> Iterator[list[ModuleType]]:
    yield from loaded("kernels", "norm_kernels")


@pytest.fixture
def kernels(kernels_and_norms: list[ModuleType]) -> ModuleType:
    return kernels_and_norms[0]


# --- Stem --------------------------------------------------------------------------------------------------------


STEMS = [  # kernel, dim, alignment, whole windows only
    (2, 24, 1, False),
    (4, 48, 4, True),
    (8, 192, 64, False),
    (32, 72, 8, True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "dim", "alignment", "whole"), STEMS)
def test_stem_sums_table_rows_and_its_gradient_is_the_transpose(
    kernels, kernel, dim, alignment, whole, dtype, monkeypatch
):
    monkeypatch.setattr(kernels, "processors", lambda device: 3 * kernel)  # gives two to six splits
    sizes = {"kernel": kernel, "dim": dim, "alignment": alignment, "longest": LONGEST}
    all_right(stem_case(kernels, DEVICE, dtype=dtype, tail=not whole, **sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "rows"), [(24, 40), (48, 100), (192, 7)])
def test_positions_backward_sums_over_files(kernels, dim, rows, dtype):
    all_right(positions_case(kernels, DEVICE, dtype=dtype, dim=dim, rows=rows))


@pytest.mark.parametrize(
    ("tiles", "blocks", "megabytes", "expected"),
    [
        (48, 7000, 6, 11),  # tiny, K = 32: 4 whole waves on 132 multiprocessors
        (192, 7000, 25, 2),  # base, K = 32
        (6, 7000, 1, 22),  # tiny, K = 4: one whole wave
        (1, 7000, 200, 1),  # memory
        (48, 7, 6, 5),  # there are no more parts than blocks of tokens
    ],
)
def test_splits_fill_the_gpu(kernels, tiles, blocks, megabytes, expected):
    assert kernels._split_count(tiles, blocks, megabytes * 10**6, 132) == expected


# --- Attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("width", "dim", "heads"), [(5, 24, 3), (16, 32, 1), (40, 48, 2), (100, 48, 1), (128, 192, 3)])
def test_attention_in_segments(kernels, width, dim, heads, dtype):
    assert kernels.supports_attention(dtype, width, dim, heads)
    all_right(attention_case(kernels, DEVICE, dtype=dtype, width=width, dim=dim, heads=heads))


def test_attention_names_what_it_cannot_do(kernels):
    assert not kernels.supports_attention(torch.float64, 128, 192, 3)
    assert not kernels.supports_attention(torch.float32, 129, 192, 3)
    assert not kernels.supports_attention(torch.float32, 128, 192, 1)
    assert not kernels.supports_attention(torch.bfloat16, 128, 128, 1)
    assert kernels.supports_attention(torch.float16, 128, 128, 2)


# --- Compiling, which needs no GPU ---------------------------------------------------------------------------------


def test_the_smallest_kernel_runs(kernels):
    kernels.try_compiler(DEVICE)


@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "kernel"),
    [
        (90, torch.bfloat16, 768, 32),
        (80, torch.float32, 192, 32),
        pytest.param(90, torch.bfloat16, 192, 2, marks=pytest.mark.slow),
        pytest.param(90, torch.float32, 768, 32, marks=pytest.mark.slow),
        pytest.param(80, torch.bfloat16, 768, 32, marks=pytest.mark.slow),
        pytest.param(89, torch.float32, 768, 8, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_nvidia_and_keep_their_sums_in_registers(
    capability, dtype, dim, kernel, monkeypatch, tmp_path
):
    pytest.importorskip("triton")
    from bfsys.model import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compiled_for_nvidia(capability, monkeypatch)
    monkeypatch.setattr(kernels, "_generation", lambda device: capability // 10)
    files, heads = ragged_files(kernel, 64, LONGEST, seed=0), dim // 64
    index = files.index
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
        assert program.metadata.shared <= SHARED_KB[capability] * 1024, name
        assert stack_bytes(program) <= MOST_SPILLED, name


@pytest.mark.parametrize("rows", [600, 20])
def test_the_model_computes_the_same_by_kernels(kernels_and_norms, monkeypatch, rows):
    """Logits and gradients are equal with the kernels for stem, norms and attention, and with PyTorch alone. Positions
    exist for every token, or for a part of them."""
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

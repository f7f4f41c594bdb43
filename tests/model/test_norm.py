"""The residual addition and the LayerNorm after it, by kernels of ours, against float64."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from bfsys.gpu_check.kernel_cases import EPS, NORM_TOLERANCE, PROCESSORS, norm_case, norm_inputs
from bfsys.model import norm
from bfsys.model.norm import add_norm
from tests.model.triton_kernels import DEVICE, ON_GPU, all_right, close, compiled_for_nvidia, loaded

ROWS = (1, 7, 70_001 if ON_GPU else 61)  # the interpreter is slow


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    for (module,) in loaded("norm_kernels"):
        yield module


# All combinations of dimension, type and `adds`. On a CPU half of them are slow; the other half covers all pairs.
TRIPLES = list(itertools.product([24, 192, 384, 768, 1280], NORM_TOLERANCE, [True, False]))
SLOW = () if ON_GPU else TRIPLES[1::4] + TRIPLES[2::4]


@pytest.mark.parametrize(
    ("dim", "dtype", "adds"),
    [pytest.param(*t, id=f"{t[0]}-{t[1]}-{t[2]}", marks=pytest.mark.slow if t in SLOW else ()) for t in TRIPLES],
)
def test_forward_and_backward_against_float64(kernels, dim, dtype, adds):
    for rows in ROWS if ON_GPU or dim < 1024 else (1, 7, 29):  # each row is a separate block there
        weight_dtype = torch.float32 if rows == 7 else dtype  # like at ZeRO 0, where weights stay in float32
        sizes = {"weight_dtype": weight_dtype, "dim": dim, "rows": rows}
        all_right(norm_case(kernels, DEVICE, dtype=dtype, adds=adds, **sizes))


def test_nothing_outside_the_rows_is_touched(kernels):
    """The rows are slices of larger tensors. Their other rows are NaN, and must stay NaN."""
    dim, rows = 192, 13
    given = norm_inputs(rows + 2, dim, torch.float32, torch.float32)
    t = {name: value.to(DEVICE) for name, value in given.items()}
    for name in ("x", "added", "grad", "total_grad"):
        t[name][0], t[name][-1] = float("nan"), float("nan")
    x, added, grad, total_grad = (t[name][1:-1] for name in ("x", "added", "grad", "total_grad"))
    total, out = kernels.norm_forward(x, added, t["weight"], t["bias"], EPS)
    results = kernels.norm_backward(total, grad, total_grad, t["weight"], EPS, PROCESSORS)
    assert all(value.isfinite().all() for value in (total, out, *results))


def test_autograd_sees_the_same_with_and_without_kernels(kernels, monkeypatch):
    """A block uses x in addition to its norm. The sum or the norm may also be used alone."""
    dim, rows = 48, 37
    layer = nn.LayerNorm(dim).to(DEVICE)
    given = {name: value.to(DEVICE) for name, value in norm_inputs(rows, dim, torch.float32, torch.float32).items()}
    results = []
    for found in (None, kernels):
        monkeypatch.setattr(norm, "norm_kernels_for", lambda *_, found=found: found)
        x, added = given["x"].clone().requires_grad_(), given["added"].clone().requires_grad_()
        layer.zero_grad()
        y, normed = add_norm(layer, x)
        z, again = add_norm(layer, y + normed.sin(), added)
        unused, only = add_norm(layer, z * 2)
        alone, _ = add_norm(layer, x, added)
        (again * given["grad"] + z * given["total_grad"] + only + alone.square()).sum().backward()
        results.append((x.grad, added.grad, layer.weight.grad, layer.bias.grad, unused))
    for one, other in zip(*results, strict=True):
        close(other, one.double().cpu(), 1e-5)


def test_cpus_compiled_models_and_few_rows_use_pytorch(monkeypatch):
    x = torch.zeros(2**20, 24, device="meta")
    assert norm.norm_kernels_for(x, None) is None
    monkeypatch.setattr(norm, "kernels_for", lambda *_: "some")
    assert norm.norm_kernels_for(x, x).__name__ == "bfsys.model.norm_kernels"
    assert norm.norm_kernels_for(x, x.bfloat16()) is None
    assert norm.norm_kernels_for(torch.zeros(2**14, 4096, device="meta"), None) is None
    assert norm.norm_kernels_for(x[: 2**19], None) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert norm.norm_kernels_for(x, x) is None


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        (torch.bfloat16, 192),
        *(pytest.param(torch.bfloat16, dim, marks=pytest.mark.slow) for dim in (384, 768, 1280, 2048)),
        *(pytest.param(torch.float32, dim, marks=pytest.mark.slow) for dim in (192, 1280)),
    ],
)
def test_no_register_is_spilled(capability, dtype, dim, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from bfsys.model import norm_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compiled_for_nvidia(capability, monkeypatch)
    t = norm_inputs(1000, dim, dtype, dtype)
    norm_kernels.norm_forward(t["x"], t["added"], t["weight"], t["bias"], EPS)
    norm_kernels.norm_backward(t["x"], t["grad"], t["total_grad"], t["weight"], EPS, 132)
    assert sorted(compiled) == ["_norm_backward", "_norm_forward"]
    for name, program in compiled.items():
        registers, spilled = resources(program, tmp_path)
        print(f"sm_{capability} {dtype} {dim} {name}: {registers} registers")
        assert spilled == 0, name
        assert registers <= 128, name  # four programs of four warps on a multiprocessor


def resources(program, folder: Path) -> tuple[int, int]:
    """(registers, spilled bytes) of a thread of a compiled program, from Triton's assembler."""
    from triton.backends.nvidia import compiler

    (folder / "program.ptx").write_text(program.asm["ptx"])
    assembler = compiler.get_ptxas(90).path if hasattr(compiler, "get_ptxas") else shutil.which("ptxas")
    architecture = re.search(r"\.target (\w+)", program.asm["ptx"])[1]
    told = subprocess.run(
        [assembler, "-v", f"--gpu-name={architecture}", str(folder / "program.ptx"), "-o", str(folder / "program.o")],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    return int(re.search(r"Used (\d+) registers", told)[1]), int(re.search(r"(\d+) bytes spill stores", told)[1])

"""Our Triton kernels for tests: on a GPU where there is one, by Triton's interpreter otherwise, or compiled only."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from bfsys.gpu_check.interpreter import interpreted
from bfsys.gpu_check.kernel_cases import Compared

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def loaded(*names: str) -> Iterator[list[ModuleType]]:
    """Yield the modules bfsys.model.NAME, for the body of a fixture."""
    pytest.importorskip("triton")
    if ON_GPU:
        yield [importlib.import_module(f"bfsys.model.{name}") for name in names]
        return
    with interpreted(*names) as modules:
        yield modules


def all_right(compared: list[Compared]) -> None:
    assert [c for c in compared if not c.is_right] == []


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = (actual.double().cpu() - expected).abs().max().item()
    assert error <= tolerance * max(expected.abs().max().item(), 1e-3), error


def compiled_for_nvidia(capability: int, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Make launches compile for sm_CAPABILITY instead of running. Returns the programs by name."""
    from triton.runtime.jit import JITFunction

    compiled = {}

    def compile_launch(self, *args, grid, warmup, **options):
        compiled[self.__name__] = _compile(self, args, options, capability)

    monkeypatch.setattr(JITFunction, "run", compile_launch)
    return compiled


def stack_bytes(program) -> int:
    """Memory for the registers that a thread of a compiled program spills."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", usage)[-1])


def _compile(function, args, options, capability: int):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import mangle_type

    given = {**dict(zip(function.arg_names, args, strict=False)), **options}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        name, value = parameter.name, given[parameter.name]
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if parameter.is_constexpr or (number == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = mangle_type(value)
        if number % 16 == 0 and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(function, signature, constexprs=constants, attrs=attributes)
    others = {name: value for name, value in options.items() if name not in function.arg_names}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=others)

"""Our Triton kernels for tests: on a GPU where there is one, by Triton's interpreter otherwise, or compiled only.

Without a GPU, the interpreted kernels live in a copy of Triton of their own: Triton decides once, when it is imported,
whether its functions are compiled or interpreted, and other tests may need them compiled.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

import bfsys.model

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
INTERPRETED = "interpreted_"
_interpreted: dict[str, ModuleType] = {}  # by name, while they are not in sys.modules


def loaded(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[list[ModuleType]]:
    """The modules bfsys.model.NAME, for the body of a fixture."""
    pytest.importorskip("triton")
    if ON_GPU:
        yield [importlib.import_module(f"bfsys.model.{name}") for name in names]
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    compiled = {module: sys.modules.pop(module) for module in tritons()}
    sys.modules.update(_interpreted)
    try:
        is_first = "triton" not in sys.modules
        for name in names:
            if INTERPRETED + name not in sys.modules:
                path = Path(bfsys.model.__path__[0], f"{name}.py")
                spec = importlib.util.spec_from_file_location(INTERPRETED + name, path)
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                sys.modules[INTERPRETED + name] = module
        if is_first:
            teach_bfloat16(sys.modules["triton.runtime.interpreter"])
        yield [sys.modules[INTERPRETED + name] for name in names]
    finally:
        _interpreted.update({module: sys.modules.pop(module) for module in tritons()})
        sys.modules.update(compiled)


def tritons() -> list[str]:
    """Names in sys.modules that belong to Triton, but for its library, which a process can load only once."""
    return [n for n in sys.modules if n.startswith(INTERPRETED) or (n.split(".")[0] == "triton" and "._C" not in n)]


def teach_bfloat16(interpreter: ModuleType) -> None:
    """Triton 3.7's interpreter keeps bfloat16 as uint16, multiplies matrices of those integers, and lets a rounding
    that carries into the exponent go wrong."""
    convert, dot, bf16 = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot, interpreter.tl.bfloat16
    f32, handle = interpreter.tl.float32, interpreter.TensorHandle

    def convert_float(data, source, target, rounding):
        if (source, target) == (f32, bf16):
            return torch.from_numpy(np.array(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, rounding)

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == bf16:
            a, b = (handle((x.data.astype(np.uint32) << 16).view(np.float32), f32) for x in (a, b))
        return dot(self, a, b, *rest)

    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = convert_float, create_dot


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = (actual.double().cpu() - expected).abs().max().item()
    assert error <= tolerance * max(expected.abs().max().item(), 1e-3), error


def compiled_for_nvidia(capability: int, monkeypatch: pytest.MonkeyPatch) -> dict:
    """From now on launches run nothing, but compile what they would run on sm_CAPABILITY: the programs by name."""
    from triton.runtime.jit import JITFunction

    compiled = {}

    def compile_launch(self, *args, grid, warmup, **options):
        compiled[self.__name__] = _compile(self, args, options, capability)

    monkeypatch.setattr(JITFunction, "run", compile_launch)
    return compiled


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

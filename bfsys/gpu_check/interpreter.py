"""The Triton kernels of bfsys without a GPU, run by Triton's interpreter.

The interpreted kernels use a separate copy of Triton. Triton decides once, when it is imported, whether its functions
are compiled or interpreted, and the rest of the process may need them compiled.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import bfsys.model

INTERPRETED = "interpreted_"
_interpreted: dict[str, ModuleType] = {}  # modules by name, while they are not in sys.modules


@contextmanager
def interpreted(*names: str) -> Iterator[list[ModuleType]]:
    """Yield the modules bfsys.model.NAME with interpreted kernels. Raises ImportError without Triton."""
    with patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        compiled = {module: sys.modules.pop(module) for module in _tritons()}
        sys.modules.update(_interpreted)
        try:
            is_first = "triton" not in sys.modules
            for name in names:
                if INTERPRETED + name not in sys.modules:
                    path = Path(bfsys.model.__path__[0], f"{name}.py")
                    spec = importlib.util.spec_from_file_location(INTERPRETED + name, path)
                    assert spec is not None, path
                    assert spec.loader is not None, path
                    module = importlib.util.module_from_spec(spec)
                    spec.loader.exec_module(module)
                    sys.modules[INTERPRETED + name] = module
            if is_first:
                _teach_bfloat16(sys.modules["triton.runtime.interpreter"])
            yield [sys.modules[INTERPRETED + name] for name in names]
        finally:
            _interpreted.update({module: sys.modules.pop(module) for module in _tritons()})
            sys.modules.update(compiled)


def _tritons() -> list[str]:
    """Names in sys.modules that belong to Triton, except its native library, which a process can load only once."""
    return [n for n in sys.modules if n.startswith(INTERPRETED) or (n.split(".")[0] == "triton" and "._C" not in n)]


def _teach_bfloat16(interpreter: Any) -> None:
    """Correct bfloat16 in Triton 3.7's interpreter. It stores bfloat16 as uint16, multiplies matrices of these
    integers, and rounds wrongly if the carry reaches the exponent."""
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

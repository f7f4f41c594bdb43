"""The precision in which the model stores activations, and the precision in which it computes with them."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bfsys.model.chunked import ChunkedNorm

Precision = Literal["fp32", "tf32", "bf16"]


def set_precision(model: nn.Module, precision: Precision) -> None:
    """Choose the precision in which a trained model computes answers.

    fp32  as stored
    tf32  products of float32 numbers with 10 bits of mantissa on GPUs, for the whole process; same as fp32 on CPUs
    bf16  weights and activations in bfloat16
    """
    if precision == "bf16":
        model.to(torch.bfloat16)
    elif precision == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = True


def stored_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of activations: autocast's under autocast (bf16 at ZeRO stage 0), otherwise that of the weights."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


@cache
def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype of the operands of matrix products if activations are stored as `dtype`.

    A CPU without instructions for bfloat16 converts operands inside each product, which takes four times as long as a
    product in float32 (Cascade Lake, 2026-11-21). On such a CPU, operands are converted beforehand.
    """
    if dtype != torch.bfloat16 or device_type != "cpu" or cpu_multiplies_bf16():
        return dtype
    return torch.float32


def cpu_multiplies_bf16() -> bool:
    """Whether the processor has instructions for products in bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Linear(nn.Linear):
    """A linear layer, [N, in] -> [N, out] in the dtype of its input. Operands of the product are in `product_dtype`."""

    def forward(self, x: Tensor) -> Tensor:
        if not _is_bfloat16_on_cpu(x):
            return super().forward(x)
        dtype = product_dtype(x.dtype, "cpu")
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), bias).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """A layer norm, [N, D] -> [N, D] in the dtype of its input, computed in at least float32.

    Autocast on GPUs returns float32. Without the conversion, the residual stream would be float32 from the first
    merging on, and would take twice the memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _is_bfloat16_on_cpu(x):
            return super().forward(x).to(x.dtype)
        if torch.compiler.is_compiling():
            weight, bias = self.weight.float(), self.bias.float()
            return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
        return ChunkedNorm.apply(x, self.weight, self.bias, self.eps)


def is_native_bfloat16(x: Tensor) -> bool:
    """Whether `x` is bfloat16 on a CPU with instructions for products in bfloat16."""
    return _is_bfloat16_on_cpu(x) and product_dtype(x.dtype, "cpu") == x.dtype


def _is_bfloat16_on_cpu(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"

"""In which precision the model stores activations, and in which it multiplies matrices."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def stored_dtype(weight: Tensor) -> torch.dtype:
    """Of activations: that of the weights, or under autocast (bf16 at ZeRO stage 0) the one that it asks for."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


@cache
def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Of the operands of matrix products, where activations are stored as `dtype`; the same in each process.

    A CPU without instructions for bfloat16 converts operands inside of each product, which takes four times as long
    as a product in float32 (Cascade Lake, 2026-11-21). There they are converted beforehand.
    """
    if dtype != torch.bfloat16 or device_type != "cpu":
        return dtype
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype if native else torch.float32

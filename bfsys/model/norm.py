"""The residual addition and the LayerNorm after it: one Triton kernel on a GPU, PyTorch's two operations elsewhere."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from bfsys.model.attention import kernels_for, processors
from bfsys.model.precision import LayerNorm

# Rows times channels from which the kernels of bfsys are faster. Below, PyTorch's operations take less time on an H200,
# and an autograd function in Python costs the host more (docs/performance.md).
LEAST_NUMBERS = 2**24


class AddNorm(torch.autograd.Function):
    """(x + added, its norm). Only the sum is saved. The backward pass takes both gradients at once, so autograd need
    not add them."""

    @staticmethod
    def forward(
        ctx, kernels: ModuleType, x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, out = kernels.norm_forward(x, added, weight, bias, eps)
        ctx.kernels, ctx.eps, ctx.adds = kernels, eps, added is not None
        ctx.dtypes = weight.dtype, bias.dtype
        ctx.save_for_backward(total, weight)
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    def backward(ctx, total_grad: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        if grad is None:
            return None, total_grad, total_grad if ctx.adds else None, None, None, None
        x_grad, weight_grad, bias_grad = ctx.kernels.norm_backward(
            total, grad, total_grad, weight, ctx.eps, processors(total.device)
        )
        weight_grad, bias_grad = weight_grad.to(ctx.dtypes[0]), bias_grad.to(ctx.dtypes[1])
        return None, x_grad, x_grad if ctx.adds else None, weight_grad, bias_grad, None


def add_norm(norm: LayerNorm, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(x + added, norm(x + added)), both [N, D] in the dtype of `x`; (x, norm(x)) if `added` is None.

    The norm's own forward is not called. At ZeRO-3, a leaf module that contains the norm must therefore call this
    function. Autocast on GPUs would return the norm in float32, and the next product would round it anyway.
    """
    kernels = norm_kernels_for(x, added)
    if kernels:
        return AddNorm.apply(kernels, x, added, norm.weight, norm.bias, norm.eps)
    x = x if added is None else x + added
    return x, norm(x)


def norm_kernels_for(x: Tensor, added: Tensor | None) -> ModuleType | None:
    """The kernels of bfsys if they are faster for these rows, else None. A compiled model fuses norms without them."""
    if torch.compiler.is_compiling() or x.numel() < LEAST_NUMBERS or kernels_for(x.device, x.dtype) is None:
        return None
    from bfsys.model import norm_kernels

    is_alike = added is None or (added.dtype == x.dtype and added.shape == x.shape)
    return norm_kernels if is_alike and norm_kernels.supports_norm(x.shape[1]) else None

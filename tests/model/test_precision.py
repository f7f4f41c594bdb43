"""Training on a CPU in every mixture of precisions. test_byteformer.py shows that the model is right in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bfsys.batch import ByteBatch, Sample
from bfsys.model import attention, byteformer, chunked, precision
from bfsys.model.byteformer import ByteFormer
from bfsys.model.precision import LayerNorm
from bfsys.model.sizes import architecture

SHAPE = architecture("custom", dim=32, layers=4, heads=2, kernel=8, window=16, shift=8, max_tokens=400)
BF16, FP32 = torch.bfloat16, torch.float32


def batch() -> ByteBatch:
    rng = np.random.default_rng(0)
    return ByteBatch.from_samples([Sample("", rng.integers(0, 256, n, dtype=np.uint8)) for n in (1, 900, 333, 1500)])


def answers(model: ByteFormer, autocast: bool = False) -> dict[str, Tensor]:
    with torch.autocast("cpu", BF16, enabled=autocast):
        logits = model(batch())
    (logits.to(model.head.weight.dtype) * torch.linspace(-1, 2, logits.numel()).view_as(logits)).sum().backward()
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def made(checkpointing: bool = False) -> ByteFormer:
    torch.manual_seed(0)
    model = ByteFormer(SHAPE, 5, activation_checkpointing=checkpointing)
    for p in model.parameters():  # weights that are exact in bfloat16, so that only the computation differs
        p.data = p.data.bfloat16().float()
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("weights", "autocast", "products", "tolerance"),
    [(FP32, False, FP32, 1e-5), (BF16, False, FP32, 0.05), (BF16, False, BF16, 0.05), (FP32, True, FP32, 0.05),
     (FP32, True, BF16, 0.05)],
)  # fmt: skip
def test_precisions_agree_with_float64(
    weights: torch.dtype,
    autocast: bool,
    products: torch.dtype,
    tolerance: float,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    want = answers(made().double())
    monkeypatch.setattr(precision, "product_dtype", lambda *_: products)
    for module in (attention, byteformer, chunked):
        monkeypatch.setattr(module, "CHUNK_TOKENS", 64)
    got = answers(made(checkpointing).to(weights), autocast)
    for name, exact in want.items():
        difference = (got[name].double() - exact).norm() / exact.norm().clamp(min=1e-3)
        assert difference < tolerance, (name, difference)


@pytest.mark.parametrize("autocast", [False, True])
def test_products_have_the_precision_of_the_processor(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, 1 + 2^-9 is not rounded before the multiplication."""
    layer = precision.Linear(2, 1, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[1 + 2**-9, -1.0]]))
    seen = {}
    for products in (FP32, BF16):
        monkeypatch.setattr(precision, "product_dtype", lambda *_, products=products: products)
        with torch.autocast("cpu", BF16, enabled=autocast):
            out = layer(torch.ones(1, 2, dtype=BF16))
        assert out.dtype == BF16
        seen[products] = out.item()
    assert seen == {FP32: 2**-9, BF16: 0}


def test_gradients_of_norms_are_not_summed_in_bfloat16() -> None:
    """A bfloat16 sum stops growing long before 40,000 tokens."""
    torch.manual_seed(0)
    x = torch.randn(40_000, 16).bfloat16()
    grads = {}
    for dtype in (torch.float64, BF16):
        norm = LayerNorm(16).to(dtype)
        y = norm(x.to(dtype))
        assert y.dtype == dtype
        y.backward(x.to(dtype))
        grads[dtype] = norm.weight.grad.double()
    assert (grads[BF16] - grads[torch.float64]).norm() < 0.01 * grads[torch.float64].norm()


def test_frozen_parameters_get_no_gradient() -> None:
    model = made()
    want = answers(made())
    for block in model.blocks[:2]:
        block.requires_grad_(False)
    got = answers(model)
    assert not any(name.startswith(("blocks.0", "blocks.1")) for name in got)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name])

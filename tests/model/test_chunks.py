"""Blocks in chunks on a CPU, in every mixture of precisions; that they are right in float64 is shown by
test_byteformer.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bfsys.batch import ByteBatch, Sample
from bfsys.model import chunks
from bfsys.model.byteformer import ByteFormer
from bfsys.model.layout import AS_RELEASED, MASKED, make_layout
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
    for p in model.parameters():  # weights that bfloat16 holds, so that only what is computed differs
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
    monkeypatch.setattr(chunks, "product_dtype", lambda *_: products)
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 64)
    got = answers(made(checkpointing).to(weights), autocast)
    for name, exact in want.items():
        difference = (got[name].double() - exact).norm() / exact.norm().clamp(min=1e-3)
        assert difference < tolerance, (name, difference)


def test_nothing_is_kept_where_no_gradient_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(chunks._Kept, "to", lambda self, dtype: kept.append(self) or self)
    model = made()
    with torch.no_grad():
        model(batch())
    assert not kept
    model(batch())
    assert len(kept) == SHAPE.layers


def test_frozen_parameters_get_no_gradient() -> None:
    model = made()
    want = answers(made())
    for block in model.blocks[:2]:
        block.requires_grad_(False)
    got = answers(model)
    assert not any(name.startswith(("blocks.0", "blocks.1")) for name in got)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name])


@pytest.mark.parametrize("mode", [MASKED, AS_RELEASED])
def test_a_layout_moves_whole(mode: str) -> None:
    layout = make_layout(torch.tensor([9, 700, 64]), replace(SHAPE, max_tokens=200), mode)
    assert layout.to(torch.device("cpu")) is layout
    moved = layout.to(torch.device("meta"))
    for there, here in ((moved.files, layout.files), *zip(moved.layers, layout.layers, strict=True)):
        for name, value in vars(here).items():
            if isinstance(value, Tensor):
                assert getattr(there, name).device.type == "meta", name
                assert getattr(there, name).shape == value.shape, name
    assert [len(r) for r in moved.rounding] == [len(r) for r in layout.rounding]
    assert len({id(layer) for layer in moved.layers}) == len({id(layer) for layer in layout.layers})

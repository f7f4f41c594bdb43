"""Everything of a batch goes to the model's device: answers of GPUs that are not there, by PyTorch's fake tensors.

Nothing is computed, but an operation on tensors of two devices is refused as on a GPU. This is the path of GPUs without
our kernels, which CPUs do not take; the kernels have tests of their own. (Autograd's engine wants a real GPU.)
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bfsys.batch import ByteBatch, Sample
from bfsys.errors import UserError
from bfsys.loss import loss_and_sums
from bfsys.model import attention, byteformer
from bfsys.model.byteformer import ByteFormer
from bfsys.model.layout import MODES, make_layout
from bfsys.model.sizes import architecture


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_an_answer_is_made_on_one_device(mode: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    a = architecture(
        "custom", kernel=4, window=16, shift=8, dim=32, layers=3, heads=1, merge_after=(0, 1), max_tokens=40
    )
    batch = ByteBatch.from_samples([Sample("", np.full(n, 7, np.uint8)) for n in (5, 33, 200, 90)])
    layout = make_layout(batch.lengths, a, mode)
    model = ByteFormer(a, 5, mode, activation_checkpointing=checkpointing)
    monkeypatch.setattr(byteformer, "make_layout", lambda *_: layout)  # the real function reads values
    monkeypatch.setattr(attention, "_kernels", lambda _: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to("cuda").train()
        logits = model(batch.to("cuda"))
        loss, sums = loss_and_sums(logits, batch.to("cuda"), 1, 0.1)
    assert {t.device.type for t in (logits, loss, sums)} == {"cuda"}


@pytest.mark.parametrize("mode", MODES)
def test_a_layout_moves_all_tensors_to_a_device(mode: str) -> None:
    a = architecture("custom", dim=32, layers=4, heads=2, kernel=8, window=16, shift=8, max_tokens=200)
    layout = make_layout(torch.tensor([9, 700, 64]), a, mode)
    assert layout.to(torch.device("cpu")) is layout
    moved = layout.to(torch.device("meta"))
    for there, here in ((moved.files, layout.files), *zip(moved.layers, layout.layers, strict=True)):
        for name, value in vars(here).items():
            if isinstance(value, Tensor):
                assert getattr(there, name).device.type == "meta", name
                assert getattr(there, name).shape == value.shape, name
    assert [len(r) for r in moved.rounding] == [len(r) for r in layout.rounding]
    assert len({id(layer) for layer in moved.layers}) == len({id(layer) for layer in layout.layers})


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton finds a driver")
def test_a_triton_that_cannot_compile_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(UserError, match=r"cannot be compiled \(.*driver.*\): Triton needs a C compiler"):
        attention._kernels.__wrapped__(torch.device("cpu"))

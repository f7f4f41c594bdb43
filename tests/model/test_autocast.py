"""Autocast on a GPU, without one: fake tensors go through the same rules and have no values."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bfsys.model.byteformer import Merge


@pytest.fixture
def autocast_for_gpus(monkeypatch: pytest.MonkeyPatch) -> torch.autocast:
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    return torch.autocast("cuda", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_do_not_widen_the_residual_stream(
    dtype: torch.dtype, autocast_for_gpus: torch.autocast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO 0 trains in bfloat16 with autocast. It computes layer norms in float32 on GPUs, but not on CPUs."""
    monkeypatch.setattr("bfsys.model.norm.kernels_for", lambda *_: None)  # as on GPUs without Triton
    with FakeTensorMode(), torch.device("cuda"):
        merge, x = Merge(16), torch.randn(8, 16, dtype=dtype)
        with autocast_for_gpus:
            assert torch.nn.LayerNorm.forward(merge.norm, x).dtype == torch.float32
            assert merge.norm(x).dtype == dtype
            assert merge(x, torch.zeros(0, dtype=torch.int64)).dtype == torch.bfloat16

"""The operations in chunks, in float64, against numerical gradients and PyTorch's own operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from bfsys.model import chunked
from bfsys.model.attention import attend_by_sdpa
from bfsys.model.chunked import ChunkedAttention, ChunkedMLP, ChunkedNorm
from bfsys.model.layout import make_layout
from bfsys.model.sizes import architecture

SHAPE = architecture("custom", dim=4, layers=2, heads=2, kernel=2, window=4, shift=2, max_tokens=20, merge_after=[])


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use several chunks; the last one is shorter."""
    monkeypatch.setattr(chunked, "CHUNK_TOKENS", 5)


def test_mlp() -> None:
    torch.manual_seed(0)
    shapes = ((12, 3), (6, 3), (6,), (3, 6), (3,))
    x, *weights = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    w1, b1, w2, b2 = weights
    torch.testing.assert_close(ChunkedMLP.apply(x, *weights), F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2))
    assert gradcheck(ChunkedMLP.apply, (x, *weights))


@pytest.mark.parametrize("layer", [0, 1])  # the windows of layer 0 are aligned, those of layer 1 are shifted
def test_attention(layer: int) -> None:
    torch.manual_seed(0)
    layout = make_layout(torch.tensor([1, 9, 3, 15]), SHAPE, "masked")
    chunks = layout.layers[layer].in_chunks(5)
    assert len(chunks) > 2
    qkv = torch.randn(layout.layers[layer].tokens, 12, dtype=torch.float64, requires_grad=True)
    expected = attend_by_sdpa(qkv, layout.layers[layer].windows, 2)
    torch.testing.assert_close(ChunkedAttention.apply(qkv, chunks, 2), expected)
    assert gradcheck(lambda rows: ChunkedAttention.apply(rows, chunks, 2), (qkv,))


def test_norm() -> None:
    """The norm computes in float32, and is compared with PyTorch's."""
    torch.manual_seed(0)
    shapes = ((12, 4), (4,), (4,))
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    theirs = [value.detach().clone().requires_grad_() for value in ours]
    got, expected = ChunkedNorm.apply(*ours, 1e-5), F.layer_norm(theirs[0], (4,), *theirs[1:])
    torch.testing.assert_close(got, expected)
    (got * got).sum().backward()
    (expected * expected).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)

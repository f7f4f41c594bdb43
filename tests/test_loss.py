from __future__ import annotations

import torch
import torch.nn.functional as F

from bfsys.batch import ByteBatch
from bfsys.loss import LOSS, SAMPLES, TOP1, TOP5, loss_and_sums


def batch_of(labels: list[int], sources: list[int]) -> ByteBatch:
    n = len(labels)
    return ByteBatch(
        torch.zeros(n, dtype=torch.uint8), torch.arange(n + 1), torch.tensor(labels), torch.tensor(sources),
        torch.arange(n),
    )  # fmt: skip


def test_sums_are_those_of_plain_cross_entropy() -> None:
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 9
    sources = torch.arange(50) % 3
    loss, sums = loss_and_sums(logits, batch_of(labels.tolist(), sources.tolist()), 4, 0.1)
    assert torch.isclose(loss, F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum"))
    for s in range(3):
        mine = sources == s
        assert sums[s, SAMPLES] == mine.sum()
        assert sums[s, TOP1] == (logits[mine].argmax(1) == labels[mine]).sum()
        top5 = logits[mine].topk(5).indices
        assert sums[s, TOP5] == (top5 == labels[mine][:, None]).any(1).sum()
    assert torch.isclose(sums[:, LOSS].sum(), loss.double())
    assert sums[3].tolist() == [0, 0, 0, 0]


def test_not_a_number_is_never_right() -> None:
    logits = torch.full((2, 3), float("nan"))
    _, sums = loss_and_sums(logits, batch_of([0, 1], [0, 0]), 1)
    assert sums[0, TOP1] == sums[0, TOP5] == 0

from __future__ import annotations

from dataclasses import replace

import pytest
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
    assert not sums[3].any()


def test_the_first_class_with_the_highest_score_is_the_answer() -> None:
    logits = torch.zeros(8, 8, dtype=torch.bfloat16)
    logits[7, 6:] = 1
    _, sums = loss_and_sums(logits, batch_of(list(range(8)), list(range(8))), 8)
    assert sums[:, TOP1].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert sums[:, TOP5].tolist() == [1, 1, 1, 1, 1, 0, 0, 1]


def test_not_a_number_is_never_right() -> None:
    logits = torch.full((2, 3), float("nan"))
    _, sums = loss_and_sums(logits, batch_of([0, 1], [0, 0]), 1)
    assert sums[0, TOP1] == sums[0, TOP5] == 0


def test_mixed_files_have_mixed_targets() -> None:
    torch.manual_seed(0)
    logits, share = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    first, second = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([3, 2, 2, 0, 1])
    batch = replace(batch_of(first.tolist(), [0] * 5), second_labels=second, second_share=share)
    loss, sums = loss_and_sums(logits, batch, 1, label_smoothing=0.1)
    targets = (1 - share)[:, None] * F.one_hot(first, 4) + share[:, None] * F.one_hot(second, 4)
    expected = F.cross_entropy(logits, targets.double(), reduction="sum", label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums[0, LOSS].item() == pytest.approx(expected.item(), rel=1e-6)

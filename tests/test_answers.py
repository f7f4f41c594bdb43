"""The order of a model's predictions."""

from __future__ import annotations

import torch

from bfsys.answers import ranked


def test_of_equally_likely_classes_the_first_comes_first() -> None:
    """`topk` gives other orders, and evaluations would then count another answer than predictions give."""
    generator = torch.Generator().manual_seed(0)
    classes = [f"c{number}" for number in range(100)]
    logits = torch.randint(5, (50, len(classes)), generator=generator).float()  # most are equal, as in bfloat16
    answers = ranked(logits.softmax(1), classes, top=len(classes))
    assert [first.index for first, *_ in answers] == logits.argmax(1).tolist()
    for row, answer in zip(logits.tolist(), answers, strict=True):
        assert [one.index for one in answer] == sorted(range(len(classes)), key=lambda c, row=row: (-row[c], c))


def test_there_are_no_more_answers_than_classes() -> None:
    ((only,),) = ranked(torch.ones(1, 1), ["one"], top=3)
    assert (only.class_name, only.index, only.probability) == ("one", 0, 1.0)

"""A model's prediction for a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """A class, and its probability for a file."""

    class_name: str
    index: int
    """Position of the class in `Model.classes`."""
    probability: float

    def to_dict(self) -> dict:
        """The prediction as a tree for the JSON of commands and server."""
        return {"class": self.class_name, "index": self.index, "probability": self.probability}


def ranked(probabilities: Tensor, classes: Sequence[str], top: int) -> list[list[Prediction]]:
    """The `top` likeliest classes (all, if there are fewer) of each row of [n, classes], the likeliest first.

    Of equally likely classes, the first one comes first, as in evaluations. Ties are frequent in bfloat16, and `topk`
    orders them arbitrarily.
    """
    values, indices = (found[:, :top].tolist() for found in probabilities.sort(dim=1, descending=True, stable=True))
    return [
        [Prediction(classes[i], i, p) for p, i in zip(*row, strict=True)] for row in zip(values, indices, strict=True)
    ]

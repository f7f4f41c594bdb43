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
    """The `top` likeliest classes (all, if there are fewer) of each row of [n, classes], the likeliest first."""
    found = probabilities.topk(min(top, len(classes)))
    return [
        [Prediction(classes[i], i, p) for p, i in zip(values, indices, strict=True)]
        for values, indices in zip(found.values.tolist(), found.indices.tolist(), strict=True)
    ]

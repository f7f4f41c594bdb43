"""The explanation of a model's answer: evidence by window, by byte and by named part of the file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bfsys.answers import Prediction, ranked
from bfsys.batch import Sample
from bfsys.data.streaming.byte_transforms import ByteTransform
from bfsys.explain.attribution import DRAWS, Classifier, integrated_gradients, occlusion, windows_of
from bfsys.explain.ranges import Range, Structure
from bfsys.explain.references import SHUFFLED, LabelledFile, choose
from bfsys.explain.structure import structure

TOP = 5  # classes
NAMED = 3  # parts in a summary
WORTH_NAMING = 0.05  # share of the evidence
WORST_ERROR = 0.1  # relative error of the sum of integrated gradients; a larger one is noted
LEAST_DROP = 0.02  # drop of the log-probability below which a window does not matter by itself


@dataclass(frozen=True)
class Window:
    """A run of bytes and its evidence."""

    first: int
    end: int
    evidence: float
    """The drop of the log-probability of the class, in nats, when other files' bytes replace the window."""


@dataclass(frozen=True)
class Part:
    """A range of the file, and its share of the positive evidence."""

    range: Range
    share: float


@dataclass(frozen=True)
class Without:
    """The model's answer when bytes of other files replace the parts of one name."""

    name: str
    predictions: tuple[Prediction, ...]
    """The likeliest classes, by their mean probability over the references."""
    probability: float
    """The remaining probability of the explained class, as a mean over the references."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """The evidence of a file's bytes for a class, as `Model.explain` returns it."""

    name: str
    """The name of the file."""
    stored: np.ndarray
    """uint8: the file."""
    data: np.ndarray
    """uint8 [n]: the bytes that the model reads. They differ from the file if the run has byte transforms."""
    format: str
    """The file format, such as `PNG`."""
    explained: Prediction
    """The class that the evidence is for: by default the likeliest one."""
    predictions: list[Prediction]
    """The likeliest classes; the first one is the model's answer."""
    windows: tuple[Window, ...]
    """Evidence by occlusion, over all bytes in their order."""
    gradients: np.ndarray
    """float32 [n]: integrated gradients. Their sum is the log-odds of the class minus those of the references."""
    parts: tuple[Part, ...]
    """The structure of the file. The shares sum to 1, or are all 0 if there is no positive evidence."""
    without: Without
    """The answer without the most important part."""
    reference: str
    """The bytes that replaced those of the file."""
    notes: tuple[str, ...]
    """Remarks for the reader."""

    def shares(self) -> dict[str, float]:
        """Share of the evidence by name of the part, the largest first."""
        return dict(sorted(_by_name(self.parts).items(), key=lambda item: -item[1]))

    def summary(self) -> str:
        """One sentence, such as `71 % of the evidence lies in IDAT, 22 % in tEXt`."""
        shares = {name: share for name, share in self.shares().items() if share > 0}
        if not shares:
            return f"no byte is evidence for {self.explained.class_name}"
        named = [(name, share) for name, share in shares.items() if share >= WORTH_NAMING][:NAMED]
        if not named:
            most = math.ceil(100 * max(shares.values()))
            return f"the evidence is spread over {len(shares)} parts, with at most {most} % in each"
        first, *others = (f"{100 * share:.0f} %" for _, share in named)
        names = [name for name, _ in named]
        return ", ".join(
            [f"{first} of the evidence lies in {names[0]}"]
            + [f"{share} in {name}" for share, name in zip(others, names[1:], strict=True)]
        )

    def as_dict(self) -> dict:
        """The explanation as a tree for JSON; it has windows, but no values for single bytes."""
        return {
            "name": self.name,
            "bytes": len(self.data),
            "format": self.format,
            "class": self.explained.class_name,
            "probability": self.explained.probability,
            "top": [one.to_dict() for one in self.predictions],
            "summary": self.summary(),
            "parts": [
                {
                    "name": p.range.name,
                    "kind": p.range.kind,
                    "first": p.range.first,
                    "end": p.range.end,
                    "share": p.share,
                }
                for p in self.parts
            ],
            "windows": [{"first": w.first, "end": w.end, "evidence": w.evidence} for w in self.windows],
            "without": {
                "part": self.without.name,
                "probability": self.without.probability,
                "top": [one.to_dict() for one in self.without.predictions],
            },
            "reference": self.reference,
            "notes": list(self.notes),
        }


def explain(
    classifier: Classifier,
    classes: Sequence[str],
    stored: Sample,
    data: np.ndarray,
    *,
    transforms: Sequence[ByteTransform],
    files: Sequence[LabelledFile],
    index: int | None,
    seed: int,
) -> Explanation:
    """The explanation of class `index` (None: the likeliest) for a file; the references are chosen among `files`.

    `data` are the bytes of `stored` after the transforms, uint8.
    """
    probabilities = np.exp(classifier.log_probabilities([data])[0])
    predictions = _ranked(probabilities, classes)
    index = predictions[0].index if index is None else index
    layout = _structure_of(stored.data, data, transforms)
    references, reference = choose(files, data, layout.format, index, DRAWS, seed)
    windows = windows_of(len(data), classifier.network.architecture.stride)
    evidence = occlusion(classifier, data, references, index, windows)
    gradients, error = integrated_gradients(classifier, data, references, index)
    shares = _shares(evidence, gradients, windows, layout.ranges)
    parts = tuple(Part(one, share) for one, share in zip(layout.ranges, shares, strict=True))
    return Explanation(
        name=stored.key,
        stored=stored.data,
        data=data,
        format=layout.format,
        explained=Prediction(classes[index], index, float(probabilities[index])),
        predictions=predictions,
        windows=tuple(Window(*window, float(worth)) for window, worth in zip(windows, evidence, strict=True)),
        gradients=gradients.astype(np.float32),
        parts=parts,
        without=_without(classifier, classes, data, references, index, parts),
        reference=reference,
        notes=tuple(_notes(transforms, data, classifier, reference, float(evidence.max()), error)),
    )


def _structure_of(stored: np.ndarray, data: np.ndarray, transforms: Sequence[ByteTransform]) -> Structure:
    """The structure of the bytes that are read, if the transforms keep their places; otherwise a single range."""
    if all(transform.keeps_places for transform in transforms):
        return structure(stored, len(data))
    return Structure("transformed", (Range(0, len(data), "transformed bytes", "content"),))


def _shares(
    evidence: np.ndarray, gradients: np.ndarray, windows: list[tuple[int, int]], ranges: Sequence[Range]
) -> list[float]:
    """Share of each range in the positive evidence by occlusion.

    Occlusion gives the evidence of a window. If a window overlaps several ranges, its evidence is divided in proportion
    to their positive integrated gradients in the window, or evenly if there are none.
    """
    per_byte = np.zeros(len(gradients))
    for (first, end), worth in zip(windows, evidence.clip(min=0), strict=True):
        weights = gradients[first:end].clip(min=0)
        weights = weights if weights.sum() > 0 else np.ones(end - first)
        per_byte[first:end] = worth * weights / weights.sum()
    total = per_byte.sum()
    return [float(per_byte[r.first : r.end].sum() / total) if total > 0 else 0.0 for r in ranges]


def _by_name(parts: Sequence[Part]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for part in parts:
        shares[part.range.name] = shares.get(part.range.name, 0.0) + part.share
    return shares


def _without(
    classifier: Classifier,
    classes: Sequence[str],
    data: np.ndarray,
    references: Sequence[np.ndarray],
    index: int,
    parts: Sequence[Part],
) -> Without:
    shares = _by_name(parts)
    name = max(shares, key=lambda one: shares[one])
    changed = []
    for reference in references:
        other = data.copy()
        for part in parts:
            if part.range.name == name:
                other[part.range.first : part.range.end] = reference[part.range.first : part.range.end]
        changed.append(other)
    probabilities = np.exp(classifier.log_probabilities(changed)).mean(0)
    return Without(name, tuple(_ranked(probabilities, classes)), float(probabilities[index]))


def _ranked(probabilities: np.ndarray, classes: Sequence[str]) -> list[Prediction]:
    return ranked(torch.from_numpy(probabilities)[None], classes, TOP)[0]


def _notes(
    transforms: Sequence[ByteTransform],
    data: np.ndarray,
    classifier: Classifier,
    reference: str,
    largest: float,
    error: float,
) -> list[str]:
    notes = []
    if moving := [one.name for one in transforms if not one.keeps_places]:
        notes.append(
            f"The run's byte transform {' and '.join(moving)} moves bytes: evidence is shown over the bytes that the "
            "model reads, and the structure of the file cannot be shown."
        )
    elif transforms:
        notes.append(
            "The run's byte transforms keep bytes at their places: the structure is that of the file, and the bytes "
            "are those that the model reads."
        )
    if len(data) > classifier.network.architecture.max_bytes:
        notes.append("The file has more tokens than the model has positions, so positions repeat.")
    if error > WORST_ERROR:
        notes.append(
            f"The integrated gradients of single bytes are inexact: their sum is off by {100 * error:.0f} % of what it "
            "should be."
        )
    if largest < LEAST_DROP:
        notes.append(
            f"No window matters by itself (the largest drop of the log-probability is {largest:.2g}): the "
            "evidence is in many places, or in none, and the shares of parts are uncertain."
        )
    if reference == SHUFFLED:
        notes.append("No validation files of other classes were available, so evidence is less exact.")
    return notes

"""Tests whether a model reads headers, metadata or lengths of files in place of their content.

Each file gets bytes of donors and keeps its length. Donors are files of other classes (if possible of its own source
and format):

    headers and metadata replaced   a model that reads content keeps its answers
    content replaced                a model that reads content loses them: the rest comes from headers and metadata
    everything replaced             the rest comes from the length

A part is replaced by the donor's part of the same name, or else of the same kind. The evidence of a kind is the mean
drop of the log-probability of the answer when everything of that kind is replaced. Its share refers to the sum of the
positive evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from bfsys.config import Config
from bfsys.data.streaming.byte_transforms import ByteTransform
from bfsys.data.streaming.datasets import no_such_split
from bfsys.errors import UserError, counted
from bfsys.explain.attribution import Classifier
from bfsys.explain.ranges import KINDS, UNNAMED, Range
from bfsys.explain.references import LabelledFile, open_split, read_files

DONORS = 2  # per file
# Thresholds of the warnings, as shares of the accuracy beyond chance.
LOST_WITHOUT_HEADERS = 0.25  # share lost when headers and metadata are replaced
LEFT_WITHOUT_CONTENT = 0.5  # share left when content is replaced
LEFT_FROM_LENGTH = 0.25  # share left when everything is replaced
ERRORS = 2  # a difference must also exceed this many standard errors
# Kinds of ranges that are replaced, by the name of the result.
REPLACED: dict[str, tuple[str, ...]] = {
    "header": ("header",),
    "metadata": ("metadata",),
    "header_and_metadata": ("header", "metadata"),
    "content": ("content",),
    "everything": KINDS,
}


@dataclass(frozen=True)
class Row:
    """The results of one class, of one source or of all files. Accuracies and shares are between 0 and 1."""

    files: int
    accuracy: float
    without_header_and_metadata: float
    """Accuracy when headers and metadata are replaced."""
    without_content: float
    """Accuracy when content is replaced."""
    from_length: float
    """Accuracy when everything except the length is replaced."""
    header_share: float
    """Share of the positive evidence that lies in headers. The three shares sum to 1, or are all 0."""
    metadata_share: float
    content_share: float


@dataclass(frozen=True)
class Shortcuts:
    """The report on a split, as `Model.shortcuts` returns it."""

    split: str
    all: Row
    sources: dict[str, Row]
    classes: dict[str, Row]
    chance: float
    """Accuracy of the most frequent class among these files."""
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict:
        """The report as a tree for JSON."""
        return asdict(self)


def shortcuts(
    classifier: Classifier,
    config: Config,
    classes: Sequence[str],
    transforms: Sequence[ByteTransform],
    split: str,
    limit: int,
    seed: int,
) -> Shortcuts:
    """The report on at most `limit` files of a split, drawn with the seed. Raises UserError."""
    sources = open_split(config, split, classes)
    if not sources.splits:
        raise no_such_split(config, split)
    if moving := [one.name for one in transforms if not one.keeps_places]:
        raise UserError(
            f"the run's byte transform {' and '.join(moving)} moves bytes: headers cannot be distinguished from content"
        )
    files, bad = read_files(sources, transforms, limit, seed)
    if len({one.label for one in files}) < 2:
        remedy = "raise --limit" if limit < sum(map(len, sources.splits)) else "the split has no other files"
        raise UserError(f"{split}: the {len(files)} files that were read belong to fewer than two classes; {remedy}")
    measured = _measure(classifier, files, seed)
    labels = np.array([one.label for one in files])
    source = np.array([one.source for one in files])
    chance = float(np.bincount(labels).max() / len(labels))
    total = measured.row(np.ones(len(files), bool))
    unknown = sum(all(r.kind == "content" for r in one.structure.ranges) for one in files)
    notes = [f"{counted(bad, 'file')} could not be read"] if bad else []
    if unknown:
        notes.append(
            f"{unknown} of {len(files)} files have no known headers or metadata: all of their bytes are content"
        )
    return Shortcuts(
        split=split,
        all=total,
        sources={name: measured.row(source == i) for i, name in enumerate(sources.names) if (source == i).any()},
        classes={classes[label]: measured.row(labels == label) for label in np.unique(labels).tolist()},
        chance=chance,
        warnings=tuple(_warnings(total, chance)),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Measured:
    """Per file: whether the answer is right, its share of right answers after each replacement, and the drops."""

    right: np.ndarray  # bool [files]
    left: dict[str, np.ndarray]  # float64 [files]
    drops: dict[str, np.ndarray]  # float64 [files], nats

    def row(self, chosen: np.ndarray) -> Row:
        evidence = [max(0.0, float(self.drops[kind][chosen].mean())) for kind in KINDS]
        header, metadata, content = (one / sum(evidence) if sum(evidence) else 0.0 for one in evidence)
        left = {name: float(values[chosen].mean()) for name, values in self.left.items()}
        return Row(
            files=int(chosen.sum()),
            accuracy=float(self.right[chosen].mean()),
            without_header_and_metadata=left["header_and_metadata"],
            without_content=left["content"],
            from_length=left["everything"],
            header_share=header,
            metadata_share=metadata,
            content_share=content,
        )


def _measure(classifier: Classifier, files: Sequence[LabelledFile], seed: int) -> _Measured:
    rng = np.random.default_rng([seed, 2])
    donors = [_donors(files, one, rng) for one in files]
    labels = np.array([one.label for one in files])
    plain = classifier.log_probabilities(one.data for one in files)
    answers = plain.argmax(1)
    left, drops = {}, {}
    for name, kinds in REPLACED.items():

        def changed(kinds: tuple[str, ...] = kinds) -> Iterator[np.ndarray]:
            for one, others in zip(files, donors, strict=True):
                for donor in others:
                    yield transplanted(one, donor, lambda r: r.kind in kinds)

        scores = classifier.log_probabilities(changed()).reshape(len(files), DONORS, -1)
        left[name] = (scores.argmax(2) == labels[:, None]).mean(1)
        of_answer = np.take_along_axis(scores, answers[:, None, None], 2)[:, :, 0]
        drops[name] = plain[np.arange(len(files)), answers] - of_answer.mean(1)
    return _Measured(answers == labels, left, drops)


def _donors(files: Sequence[LabelledFile], one: LabelledFile, rng: np.random.Generator) -> list[LabelledFile]:
    """DONORS files of other classes; of the same source and format, if there are any."""
    others = [f for f in files if f.label != one.label]
    alike = [f for f in others if (f.source, f.structure.format) == (one.source, one.structure.format)]
    pool = alike or others
    return [pool[i] for i in rng.integers(len(pool), size=DONORS)]


def transplanted(one: LabelledFile, donor: LabelledFile, chosen: Callable[[Range], bool]) -> np.ndarray:
    """uint8 [n]: what the model would read of `one` if its chosen ranges held bytes of the donor, truncated or repeated
    to the same length.

    A range gets the bytes of the donor's ranges of the same name and kind, or else of the same kind, or else of the
    whole donor.
    """
    result = one.data.copy()
    groups: dict[tuple[str, str], list[Range]] = {}
    for r in one.structure.ranges:
        if chosen(r):
            groups.setdefault((r.name, r.kind), []).append(r)
    if sum(map(len, groups.values())) == len(one.structure.ranges):  # everything
        return np.resize(donor.data, len(result))
    for (name, kind), ranges in groups.items():
        same_kind = [r for r in donor.structure.ranges if r.kind == kind]
        same_name = [r for r in same_kind if r.name == name and name != UNNAMED]
        parts = [donor.data[r.first : r.end] for r in same_name or same_kind] or [donor.data]
        length = sum(r.end - r.first for r in ranges)
        bytes_in = np.resize(np.concatenate(parts), length)
        at = 0
        for r in ranges:
            result[r.first : r.end] = bytes_in[at : at + r.end - r.first]
            at += r.end - r.first
    return result


def _warnings(row: Row, chance: float) -> list[str]:
    """Warnings as sentences; see the thresholds above."""
    gain = row.accuracy - chance
    error = ERRORS * math.sqrt(max(row.accuracy * (1 - row.accuracy), chance * (1 - chance)) / row.files)
    if gain <= error:
        return [
            f"the accuracy of {_percent(row.accuracy)} is not beyond chance ({_percent(chance)}) on these {row.files} "
            "files, so the report cannot detect shortcuts"
        ]
    found = []
    lost = row.accuracy - row.without_header_and_metadata
    if lost >= max(LOST_WITHOUT_HEADERS * gain, error):
        found.append(
            f"the model reads headers or metadata: with those of other classes, its accuracy falls from "
            f"{_percent(row.accuracy)} to {_percent(row.without_header_and_metadata)}"
        )
    if row.without_content - chance >= max(LEFT_WITHOUT_CONTENT * gain, error):
        found.append(
            f"the model does not need the content: with that of other classes, its accuracy is still "
            f"{_percent(row.without_content)} (chance: {_percent(chance)})"
        )
    if row.from_length - chance >= max(LEFT_FROM_LENGTH * gain, error):
        found.append(
            f"the model reads the length of files: with all bytes from other classes, its accuracy is still "
            f"{_percent(row.from_length)} (chance: {_percent(chance)})"
        )
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

"""Baselines for models of bytes. They classify the same files by their sizes, by how often each byte value occurs, or
by their first bytes. A model that does not beat them has not learned the content of the files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from bfsys.batch import ByteBatch
from bfsys.config import Config
from bfsys.data.streaming.datasets import Sources, make_plan, open_training
from bfsys.data.streaming.loader import evaluation_rounds, training_batches
from bfsys.data.streaming.quarantine import Quarantine
from bfsys.ranks import Ranks

FIRST_BYTES = 64  # contain the header of most formats
NO_BYTE = 256  # value past the end of a shorter file


@dataclass
class Table:
    """The features of files that the simple models use."""

    lengths: np.ndarray  # int64 [files]
    counts: np.ndarray  # float64 [files, 256]: share of each byte value
    first: np.ndarray  # int16 [files, FIRST_BYTES]
    labels: np.ndarray  # int64 [files]

    @classmethod
    def of(cls, batches: Iterator[ByteBatch]) -> Table:
        lengths, counts, first, labels = [], [], [], []
        for batch in batches:
            for i, content in enumerate(batch.files()):
                lengths.append(len(content))
                counts.append(np.bincount(content, minlength=256) / max(1, len(content)))
                head = content[:FIRST_BYTES].astype(np.int16)
                first.append(np.pad(head, (0, FIRST_BYTES - len(head)), constant_values=NO_BYTE))
                labels.append(int(batch.labels[i]))
        return cls(np.array(lengths), np.array(counts), np.array(first), np.array(labels))


def largest_class(training: Sources, val: Table) -> float:
    counts: Counter[str] = Counter()
    for split in training.splits:
        counts.update(split.dataset.description["splits"][split.split]["class_counts"])
    largest = max(training.classes, key=counts.__getitem__)
    return float((val.labels == training.classes.index(largest)).mean())


def nearest_size(train: Table, val: Table) -> float:
    """The accuracy of choosing the class with the nearest mean logarithm of the length. Byte transforms may leave
    nothing of a file; then the logarithm is that of one byte."""
    of_train, of_val = (np.log(np.maximum(1, table.lengths)) for table in (train, val))
    classes = np.unique(train.labels)
    means = np.array([of_train[train.labels == c].mean() for c in classes])
    nearest = np.abs(of_val[:, None] - means).argmin(1)
    return float((classes[nearest] == val.labels).mean())


def byte_counts(train: Table, val: Table) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(np.sqrt(train.counts), train.labels)  # square roots, since shares differ by orders of magnitude
    return float(model.score(np.sqrt(val.counts), val.labels))


def first_bytes(train: Table, val: Table) -> float:
    """The accuracy of a linear model of the first byte values. It can find magic numbers and header fields."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    model = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression(C=0.1, max_iter=2000))
    model.fit(train.first, train.labels)
    return float(model.score(val.first, val.labels))


def unmixed(config: Config) -> Sources:
    """The training data without mixup, because the baselines need one class per file."""
    sources = [replace(s, augment=replace(s.augment, mixup=False)) if s.augment else s for s in config.data.sources]
    return open_training(replace(config, data=replace(config.data, sources=tuple(sources))))


def batches_for_training(config: Config, sources: Sources, steps: int, every: int = 1) -> Iterator[ByteBatch]:
    """The batches of each `every`-th of `steps` steps."""
    optim = replace(config.optim, content_loss=0.0)  # these models predict only classes
    config = replace(config, optim=optim, train=replace(config.train, steps=steps))
    return training_batches(config, sources, make_plan(config, sources), Ranks(), first_step=0, every=every)


def batches_for_evaluation(config: Config, sources: Sources) -> Iterator[ByteBatch]:
    return (batch for batch, counts in evaluation_rounds(config, sources, Ranks(), Quarantine(), 0) if counts)


def tables_of(
    config: Config, training: Sources, validation: Sources, most_files: int | None = None
) -> tuple[Table, Table]:
    """The tables of one epoch of the run's training files and of its evaluation files.

    With `most_files`, training files come from steps at equal distances in the epoch, because the files of tars made
    elsewhere may be sorted by class.
    """
    files = sum(len(split) for split in training.splits)
    steps = -(-files // config.data.batch_samples)
    every = -(-files // most_files) if most_files else 1
    train = Table.of(batches_for_training(config, unmixed(config), steps, every))
    return train, Table.of(batches_for_evaluation(config, validation))

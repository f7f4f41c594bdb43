"""Baselines for models of bytes: they classify the same files by their sizes, or by how often each byte value occurs. A
model that does not beat them has learned nothing that the files do not give away on their outside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from bfsys.batch import ByteBatch
from bfsys.config import Config
from bfsys.data.streaming.datasets import Sources, make_plan, open_training
from bfsys.data.streaming.loader import evaluation_rounds, training_batches
from bfsys.data.streaming.quarantine import Quarantine
from bfsys.ranks import Ranks


@dataclass
class Table:
    """Files as the simple models see them."""

    lengths: np.ndarray  # int64 [files]
    counts: np.ndarray  # float64 [files, 256]: share of each byte value
    labels: np.ndarray  # int64 [files]

    @classmethod
    def of(cls, batches: Iterator[ByteBatch]) -> Table:
        lengths, counts, labels = [], [], []
        for batch in batches:
            for i, content in enumerate(batch.files()):
                lengths.append(len(content))
                counts.append(np.bincount(content, minlength=256) / max(1, len(content)))
                labels.append(int(batch.labels[i]))
        return cls(np.array(lengths), np.array(counts), np.array(labels))


def largest_class(train: Table, val: Table) -> float:
    return float((val.labels == np.bincount(train.labels).argmax()).mean())


def nearest_size(train: Table, val: Table) -> float:
    classes = np.unique(train.labels)
    means = np.array([np.log(train.lengths[train.labels == c]).mean() for c in classes])
    nearest = np.abs(np.log(val.lengths)[:, None] - means).argmin(1)
    return float((classes[nearest] == val.labels).mean())


def byte_counts(train: Table, val: Table) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(np.sqrt(train.counts), train.labels)  # square roots: shares spread over orders of magnitude
    return float(model.score(np.sqrt(val.counts), val.labels))


def unmixed(config: Config) -> Sources:
    """The training files augmented as ever, but each of one class: the simple models know no shares of two."""
    sources = [replace(s, augment=replace(s.augment, mixup=False)) if s.augment else s for s in config.data.sources]
    return open_training(replace(config, data=replace(config.data, sources=tuple(sources))))


def batches_for_training(config: Config, sources: Sources, steps: int) -> Iterator[ByteBatch]:
    optim = replace(config.optim, content_loss=0.0)  # these models predict classes alone
    config = replace(config, optim=optim, train=replace(config.train, steps=steps))
    return training_batches(config, sources, make_plan(config, sources), Ranks(), first_step=0)


def batches_for_evaluation(config: Config, sources: Sources) -> Iterator[ByteBatch]:
    return (batch for batch, counts in evaluation_rounds(config, sources, Ranks(), Quarantine(), 0) if counts)


def tables_of(config: Config, training: Sources, validation: Sources) -> tuple[Table, Table]:
    """One epoch of the run's training files, and its evaluation files."""
    epoch = -(-sum(len(split) for split in training.splits) // config.data.batch_samples)
    train = Table.of(batches_for_training(config, unmixed(config), epoch))
    return train, Table.of(batches_for_evaluation(config, validation))

"""The data of a run, opened once, for training, dry runs, the pre-flight checks and planning."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from bfsys.config import Config
from bfsys.data.media.encodings import AS_STORED
from bfsys.data.media.input_formats import InputFormat, input_format, kind_of
from bfsys.data.storage.shards import Split
from bfsys.data.streaming.byte_transforms import lengths_after
from bfsys.data.streaming.copies import notes_on_copies
from bfsys.data.streaming.datasets import (
    Descriptions,
    Sources,
    any_remote,
    content_facts,
    evaluable_splits,
    fetch_descriptions,
    first_files,
    index_problems,
    long_files,
    make_plan,
    notes_on_data,
    open_evaluation,
    open_training,
)
from bfsys.data.streaming.plan import MicroBatch, Plan, lanes_of_rank
from bfsys.data.streaming.reader import ShardReader
from bfsys.dist import Ranks
from bfsys.errors import UserError, counted
from bfsys.out_of_distribution import FEWEST, FILES, ReferenceFiles, reference_files
from bfsys.process import usable_cores

FIRST_STEPS = 20  # the plan balances lengths, so later steps are similar


class Planned(NamedTuple):
    """A micro-batch that is not yet read."""

    stored_bytes: int
    """The total size of its files in the shards."""
    lengths: np.ndarray
    """Bytes of each file as the model reads it, int64 [B]; see `RunData.lengths_of`."""


@dataclass(frozen=True)
class RunData:
    """The training and evaluation data of a run, and their order."""

    config: Config
    training: Sources
    validation: Sources
    """The evaluation data. It has no splits if no source has one to evaluate."""
    plan: Plan

    @property
    def is_remote(self) -> bool:
        """Whether a training source is remote, so that shards are fetched during the run."""
        return any_remote(self.training)

    @property
    def facts(self) -> dict:
        """Everything that determines the data of every step. Equal facts mean equal bytes in equal order."""
        return {**self.plan.facts, **content_facts(self.training)}

    @property
    def evaluated(self) -> str:
        """A fingerprint of the evaluation files. Scores of different files are not comparable."""
        files = [(split.split, split.fingerprint) for split in self.validation.splits]
        return hashlib.sha256(repr(files).encode()).hexdigest()[:16]

    @property
    def _evaluated_splits(self) -> dict[int, Split]:
        """The evaluation splits, by the position of their sources in the config."""
        return {source.number: source.split for source in self.validation.opened}

    @property
    def input_formats(self) -> list[InputFormat]:
        """The format in which the model reads the files of each training source: that of the augmentation or, without
        one, that of the packed files, preferably of those for evaluation."""
        evaluated = self._evaluated_splits
        formats = []
        for source in self.training.opened:
            if source.augmentation:
                options = source.augmentation.options
                formats.append(input_format(options.encoding, asdict(options)))
                continue
            packed = [_packed_format(s.dataset.description) for s in (evaluated.get(source.number), source.split) if s]
            formats.append(next((f for f in packed if f.is_known), packed[-1]))
        return formats

    def read_reference_files(self) -> ReferenceFiles | None:
        """Evaluation files of each source as the model reads them, and training files of the sources with too few of
        those. None if too few files can be read."""
        most, fewest = (-(-count // len(self.training.splits)) for count in (FILES, FEWEST))
        evaluated = self._evaluated_splits
        there = [len(evaluated.get(source.number, ())) for source in self.training.opened]
        is_other = self.config.data.eval_split != self.config.data.train_split
        missing = [most - files if files < fewest and is_other else 0 for files in there]
        return reference_files(
            self._spread(self.validation, [most] * len(self.validation.splits)), self._spread(self.training, missing)
        )

    def _spread(self, sources: Sources, counts: Sequence[int]) -> Iterator[np.ndarray]:
        """At most `counts` files of each source, uint8 [n] each. They are at equal distances, since tars made elsewhere
        may be sorted by class. Files that are empty or cannot be read are left out."""
        reader = ShardReader(sources, seed=self.config.train.seed, replace_bad=False)
        try:  # one at a time, since files may be large
            for source, (split, count) in enumerate(zip(sources.splits, counts, strict=True)):
                for sample in np.linspace(0, len(split) - 1, min(count, len(split))).astype(int):
                    data = reader.read(MicroBatch(*np.array([source, sample, 0])[:, None])).data
                    if len(data):
                        yield data
        finally:
            reader.close()

    def check_unchanged(self) -> None:
        """Raise UserError if a local dataset was replaced by another one since it was opened. The new index matches the
        new shards, so checksums would not detect it."""
        splits = (*self.training.splits, *self.validation.splits)
        for dataset in {split.dataset.location: split.dataset for split in splits}.values():
            if dataset.was_replaced():
                raise dataset.packed_again()

    @cached_property
    def notes(self) -> list[str]:
        """Warnings about the data and about loading them on this machine, one line each."""
        workers, cores = self.config.data.workers, usable_cores()
        if workers <= cores:
            return self.notes_on_content
        return [
            *self.notes_on_content,
            f"data.workers: {counted(workers, 'loader process')} for each rank, which has {counted(cores, 'core')}; "
            "more processes than cores make loading slower",
        ]

    @cached_property
    def notes_on_content(self) -> list[str]:
        """Warnings about the data, which hold on any machine, one line each."""
        notes, evaluated = [], self.config.data.eval_split
        if not self.validation.splits:
            notes.append(f"no source has a split {evaluated!r}: nothing will be evaluated")
        elif evaluated == self.config.data.train_split:
            notes.append(
                f"data.eval_split: {evaluated!r} is the split that the run trains on; its scores say nothing about "
                "other files"
            )
        return [
            *notes,
            *self._notes_on_settings(),
            *self._notes_on_mixture(),
            *self._notes_on_evaluation(),
            *self._notes_on_jitter(),
            *notes_on_data(self.training),
            *notes_on_copies(self.training, self.validation, evaluated),
            *long_files(self.config, self.training),
            *long_files(self.config, self.validation),
        ]

    def _notes_on_settings(self) -> Iterator[str]:
        """Settings that have no effect with these data."""
        config, classes = self.config, len(self.training.classes)
        if config.optim.content_loss and config.data.byte_transforms:
            yield "optim.content_loss: has no effect, because data.byte_transforms change the files"
        if config.train.keep_best and config.train.best_metric == "top5" and classes <= 5:
            yield (
                f"train.best_metric: top5 is 100 % after every evaluation, because there are {classes} classes; "
                "set it to top1 or loss"
            )

    def _notes_on_mixture(self) -> Iterator[str]:
        steps = self.config.train.steps
        draws = self.plan.mixture.counts(steps * self.plan.batch_samples)
        for name, count in zip(self.training.names, draws.tolist(), strict=True):
            if not count:
                yield (
                    f"{name}: its share of the mixture is so small that no file is drawn from it in "
                    f"{counted(steps, 'step')}; raise its weight, or remove the source"
                )

    def _notes_on_evaluation(self) -> Iterator[str]:
        """Sources that are not evaluated, or in another format than they are trained in."""
        evaluated = self._evaluated_splits
        for source, format in zip(self.training.opened, self.input_formats, strict=True):
            split = evaluated.get(source.number)
            if split is None and evaluated:
                yield f"{source.name}: has no split {self.config.data.eval_split!r}, so its files are not evaluated"
            if split is None or split.dataset.cache is not None or not source.augmentation:
                continue
            if _others_among_first(split, format.matches):
                yield (
                    f"{split.dataset.shown}: the files of {split.split} are not {format.describe()}, as training "
                    "makes them, so scores do not show what the model has learned; pack them with --encoding "
                    f"{format.encoding.text}, and give that dataset as eval_path"
                )

    def _notes_on_jitter(self) -> Iterator[str]:
        for source in self.training.opened:
            split = source.split
            if not source.jitter or split.dataset.cache is not None:
                continue
            if others := _others_among_first(split, lambda data: kind_of(data) is not None):
                yield (
                    f"{split.dataset.shown}: jitter changes pictures and sounds, and the first {others} files are "
                    "neither"
                )

    def lengths_of(self, step: int, lanes: Sequence[int]) -> np.ndarray:
        """Bytes of each file of some lanes as the model reads it, int64 [B]. For files that are encoded again with
        compression, it is the stored size."""
        return self._lengths(self.plan.micro_batch_of(step, lanes))

    def first_steps(self) -> list[list[Planned]]:
        """The micro-batches of the run's first steps (at most FIRST_STEPS), by step and lane."""
        batches = (
            [self.plan.micro_batch(step, lane) for lane in range(self.plan.lanes)]
            for step in range(min(FIRST_STEPS, self.config.train.steps))
        )
        return [[Planned(self.plan.bytes_of(batch), self._lengths(batch)) for batch in step] for step in batches]

    def _lengths(self, batch: MicroBatch) -> np.ndarray:
        lengths = []
        for number, source in enumerate(self.training.opened):
            augmentation = source.augmentation
            stored = source.split.samples["length"][batch.sample[batch.source == number]].astype(np.int64)
            if augmentation and not augmentation.compresses:
                stored = np.full_like(stored, augmentation.least_bytes)
            lengths.append(lengths_after(self.training.transforms, stored))
        return np.concatenate(lengths)


def _others_among_first(split: Split, is_such: Callable[[np.ndarray], bool]) -> int:
    """The number of the first files of a split, uint8 [n] each, if none of them is such a file; otherwise 0."""
    count = 0
    for data in first_files(split):  # one at a time, since files may be large
        if is_such(np.frombuffer(data, np.uint8)):
            return 0
        count += 1
    return count


def _packed_format(description: dict) -> InputFormat:
    arguments = description.get("made_by", {}).get("arguments")
    return input_format(description.get("encoding", AS_STORED), arguments if isinstance(arguments, dict) else {})


def open_run_data(config: Config, ranks: Ranks, descriptions: Descriptions | None = None) -> RunData:
    """Open and check everything; this rank verifies its share of the index. Raises UserError with all problems.

    The `descriptions` of remote datasets are fetched if they are not given.
    """
    descriptions = fetch_descriptions(config) if descriptions is None else descriptions
    training = open_training(config, descriptions)
    validation = open_evaluation(config, config.data.eval_split, training.classes, descriptions)
    split = config.data.eval_split
    if not validation.splits:  # on purpose, which is noted, or because the split is misspelled
        there = evaluable_splits(config, descriptions)
        longer = [name for name in there if split.lower().startswith(name)]  # as validation is for val
        if meant := difflib.get_close_matches(split, there, 1, 0.7) or longer:
            raise UserError(f"data.eval_split: no source has a split {split!r} (did you mean {meant[0]!r}?)")
    lanes_of_rank(config.data.lanes, ranks.rank, ranks.world_size)
    problems = [p for part in (training, validation) for p in short_files(config, part)]
    problems += [p for part in (training, validation) for p in index_problems(part, ranks.rank, ranks.world_size)]
    if problems:
        raise UserError(*problems)
    return RunData(config, training, validation, make_plan(config, training))


def short_files(config: Config, sources: Sources) -> list[str]:
    """Problems of files that are shorter than the model accepts. Empty files do not count; reading replaces them."""
    least, problems = config.model.least_bytes, []
    for source in sources.opened:
        split, augmentation = source.split, source.augmentation
        if least == 1:  # the lengths are read only if they matter
            break
        stored = [augmentation.least_bytes] if augmentation else split.samples["length"].astype(np.int64)
        lengths = lengths_after(sources.transforms, np.array(stored))
        if short := np.count_nonzero((lengths > 0) & (lengths < least)):
            which = f"{short} of {len(split)} files in {split.split} are"
            if augmentation:
                of_what = " (a black picture or silence)" if augmentation.compresses else ""
                which = f"augmented files of {lengths[0]} bytes{of_what} in {split.split} are"
            problems.append(
                f"{split.dataset.shown}: {which} shorter than the {least} bytes that a model needs with model.mode "
                f"{config.model.mode} and model.kernel {least}"
            )
    return problems

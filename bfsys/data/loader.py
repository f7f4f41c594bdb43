"""From a data config to micro-batches of bytes: the plan is the sampler, the reader a map-style dataset.

`torch.utils.data.DataLoader` runs them, with its worker processes and prefetch; it keeps no state of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from bfsys.batch import ByteBatch
from bfsys.config import Config
from bfsys.data.plan import MicroBatch, Plan, evaluation_batches, lanes_of_rank
from bfsys.data.reader import ShardReader
from bfsys.data.shards import Split, open_split, split_names
from bfsys.dist import Ranks
from bfsys.errors import UserError, collecting


@dataclass(frozen=True)
class Sources:
    """The opened datasets of a run: the same split of each, and the union of their classes.

    A source that lacks the split (an evaluation split, say) is left out: `numbers` are positions in the config,
    and `names` the same for every split.
    """

    splits: tuple[Split, ...]
    numbers: tuple[int, ...]
    names: tuple[str, ...]
    label_maps: tuple[np.ndarray, ...]


def union_of_classes(config: Config) -> tuple[str, ...]:
    """Class names of all sources, sorted: the rows of the head. Raises UserError with all problems."""
    names, problems = set(), []
    for source in config.data.sources:
        with collecting(problems):
            names |= set(open_split(source.path, config.data.train_split).classes)
    if problems:
        raise UserError(*problems)
    return tuple(sorted(names))


def open_sources(config: Config, split: str, classes: Sequence[str], *, allow_missing: bool = False) -> Sources:
    """Open a split of every source and map its labels to `classes`; raises UserError with all problems.

    With `allow_missing`, sources without the split are left out, be it all of them.
    """
    number_of = {name: i for i, name in enumerate(classes)}
    opened: list[tuple[int, Split]] = []
    problems: list[str] = []
    for number, source in enumerate(config.data.sources):
        with collecting(problems):
            if allow_missing and split not in split_names(source.path):
                continue
            part = open_split(source.path, split)
            unknown = [name for name in part.classes if name not in number_of]
            if unknown:
                raise UserError(f"{source.path}: the model does not know the classes {', '.join(unknown[:10])}")
            problems.extend(_unfit_samples(part, config))
            opened.append((number, part))
    if problems:
        raise UserError(*problems)
    names = [Path(source.path).name for source in config.data.sources]
    return Sources(
        splits=tuple(part for _, part in opened),
        numbers=tuple(number for number, _ in opened),
        names=tuple(names[n] if names.count(names[n]) == 1 else f"{names[n]}_{n}" for n, _ in opened),
        label_maps=tuple(np.array([number_of[name] for name in part.classes]) for _, part in opened),
    )


def make_plan(config: Config, sources: Sources) -> Plan:
    """The data order; raises UserError if its micro-batches would exceed the byte budget."""
    data = config.data
    plan = Plan(
        sources.splits,
        [data.sources[n].weight for n in sources.numbers],
        batch_samples=data.batch_samples,
        lanes=data.lanes,
        shuffle_block=data.shuffle_block,
        seed=config.train.seed,
    )
    budget, mean = data.micro_batch_bytes, plan.mean_micro_batch_bytes
    if budget and mean > budget:
        lanes = -(-data.lanes * mean // budget)
        raise UserError(
            f"data.micro_batch_bytes: {data.batch_samples} samples in {data.lanes} lanes make micro-batches of "
            f"{mean:,.0f} bytes on average, over the budget of {budget:,}; {lanes:.0f} or more lanes would fit"
        )
    return plan


def training_batches(
    config: Config, sources: Sources, plan: Plan, ranks: Ranks, *, first_step: int
) -> Iterator[ByteBatch]:
    """The rank's micro-batches from `first_step` to the end of the run, lane by lane within a step."""
    lanes = lanes_of_rank(plan.lanes, ranks.rank, ranks.world_size)
    reader = ShardReader(sources.splits, sources.label_maps)
    requests = _PlannedBatches(plan, lanes, range(first_step, config.train.steps))
    loader = DataLoader(
        _Reads(reader),
        batch_size=None,  # a request is a whole micro-batch already
        sampler=requests,
        num_workers=config.data.workers,
        collate_fn=_as_it_is,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def evaluation_rounds(config: Config, sources: Sources, ranks: Ranks) -> Iterator[tuple[ByteBatch, bool]]:
    """Every sample once over all ranks, in equally many rounds on each.

    Yields (batch, counts). Where batches run out, a rank repeats the last one with counts False, since the
    forward passes of ZeRO-3 are collective.
    """
    batches = evaluation_batches(sources.splits, config.data.eval_batch_bytes)
    reader = ShardReader(sources.splits, sources.label_maps)
    for first in range(0, len(batches), ranks.world_size):
        mine = first + ranks.rank
        yield reader.read(batches[min(mine, len(batches) - 1)]), mine < len(batches)
    reader.close()


class _PlannedBatches(Sampler[MicroBatch]):
    def __init__(self, plan: Plan, lanes: range, steps: range) -> None:
        self.plan, self.lanes, self.steps = plan, lanes, steps

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in self.steps:
            for lane in self.lanes:
                yield self.plan.micro_batch(step, lane)

    def __len__(self) -> int:
        return len(self.steps) * len(self.lanes)


class _Reads(Dataset[ByteBatch]):
    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader

    def __getitem__(self, wanted: MicroBatch) -> ByteBatch | UserError:
        try:
            return self.reader.read(wanted)
        except UserError as error:  # raised in a worker process, it would arrive wrapped in a traceback
            return error


def _as_it_is(batch: ByteBatch) -> ByteBatch:
    return batch


def _unfit_samples(split: Split, config: Config) -> list[str]:
    """What the model could not take: empty files, and files longer than its position table."""
    architecture = config.model.architecture()
    length = split.samples["length"]
    problems = []
    empty, long = np.flatnonzero(length == 0), np.flatnonzero(length > architecture.max_bytes)
    if len(empty):
        problems.append(f"{split.path}: {len(empty)} empty files, the first is {split.key(int(empty[0]))!r}")
    if len(long):
        worst = int(np.argmax(length))
        needed = -(-int(length[worst]) // architecture.stride)
        problems.append(
            f"{split.path}: {len(long)} of {len(split)} files are longer than the {architecture.max_bytes:,} bytes "
            f"that model.max_tokens {architecture.max_tokens:,} covers at model.kernel {architecture.kernel}, the "
            f"longest ({split.key(worst)!r}) has {int(length[worst]):,}; set model.max_tokens to {needed} or more, "
            f"or pack without them (tools/pack.py --max-file-bytes {architecture.max_bytes} --skip-bad)"
        )
    return problems

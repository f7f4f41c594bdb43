"""From the plan to micro-batches of bytes: the plan is the sampler, the reader a map-style dataset.

`torch.utils.data.DataLoader` runs them, with its worker processes and prefetch; it keeps no state of ours. Workers
hand batches over in slots of anonymous shared memory, which vanishes with the processes: pickled through
DataLoader's queues the same bytes take several times as long, and named shared memory outlives a SIGKILL.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from bfsys.batch import ByteBatch
from bfsys.config import Config
from bfsys.data.datasets import Sources, any_remote, make_cache
from bfsys.data.plan import MicroBatch, Plan, evaluation_batches, lanes_of_rank
from bfsys.data.quarantine import Quarantine
from bfsys.data.reader import Fetched, ShardReader, new_buffer
from bfsys.data.remote import Prefetcher
from bfsys.data.ring import Ring
from bfsys.dist import Ranks
from bfsys.errors import UserError

# Micro-batches that each worker may be ahead.
PREFETCH = 4
# Samples that the system is told of before they are read.
READ_AHEAD_SAMPLES = 256
# A slot holds micro-batches of up to this many times the mean; a larger one is pickled. Memory is taken as it is used.
SLOT_OVER_MEAN = 8


def training_batches(
    config: Config, sources: Sources, plan: Plan, ranks: Ranks, *, first_step: int, quarantine: Quarantine | None = None
) -> Iterator[ByteBatch]:
    """The rank's micro-batches from `first_step` to the end of the run, lane by lane within a step.

    `quarantine` is told of samples that could not be read.
    """
    quarantine = quarantine if quarantine is not None else Quarantine()
    reader = ShardReader(
        sources.splits,
        sources.label_maps,
        sources.names,
        seed=config.train.seed,
        augmentations=sources.augmentations,
        transforms=sources.transforms,
        bad_from=[quarantine.bad_from(s.split, n) for s, n in zip(sources.splits, sources.names, strict=True)],
    )
    lanes = lanes_of_rank(plan.lanes, ranks.rank, ranks.world_size)
    allocate = _pinned_buffer if ranks.device.type == "cuda" else new_buffer
    workers = config.data.workers
    ring = Ring(workers * PREFETCH + 1, int(SLOT_OVER_MEAN * plan.mean_micro_batch_bytes)) if workers else None
    prefetcher = Prefetcher(make_cache(config)) if any_remote(sources) else None
    requests = _Requests(plan, lanes, range(first_step, config.train.steps), reader, prefetcher)
    loader = DataLoader(
        _Reads(reader, ring, allocate),
        batch_size=None,  # a request is a whole micro-batch already
        sampler=requests,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        multiprocessing_context="fork" if workers else None,  # workers must inherit the ring
        collate_fn=_as_it_is,
    )
    try:
        for number, fetched in enumerate(loader):
            if isinstance(fetched, UserError):
                raise fetched
            quarantine.found(fetched.bad)
            yield _byte_batch(_taken_out(fetched, ring, number, allocate))
    finally:
        reader.close()
        if prefetcher:
            prefetcher.close()


def evaluation_rounds(
    config: Config, sources: Sources, ranks: Ranks, quarantine: Quarantine, step: int
) -> Iterator[tuple[ByteBatch, bool]]:
    """Every sample once over all ranks, in equally many rounds on each, but for those that cannot be read.

    Yields (batch, counts). Where batches run out, or nothing of one can be read, a rank gets some batch with counts
    False, since the forward passes of ZeRO-3 are collective.
    """
    batches = evaluation_batches(sources.splits, config.data.eval_batch_bytes)
    reader = ShardReader(
        sources.splits,
        sources.label_maps,
        sources.names,
        seed=config.train.seed,
        transforms=sources.transforms,
        replace_bad=False,
    )
    nothing = ByteBatch.of_zeros(1)
    for first in range(0, len(batches), ranks.world_size):
        mine = first + ranks.rank
        if mine >= len(batches):
            yield nothing, False
            continue
        wanted = batches[mine]
        fetched = reader.read(MicroBatch(wanted.source, wanted.sample, wanted.epoch, step))
        quarantine.found(fetched.bad)
        yield (_byte_batch(fetched), True) if len(fetched.labels) else (nothing, False)
    reader.close()


class _Requests(Sampler[tuple[int, MicroBatch]]):
    """The rank's micro-batches, numbered. What will be read soon is announced to the system or the prefetcher."""

    def __init__(
        self, plan: Plan, lanes: range, steps: range, reader: ShardReader, prefetcher: Prefetcher | None
    ) -> None:
        self.plan, self.lanes, self.steps = plan, lanes, steps
        self.reader, self.prefetcher = reader, prefetcher

    def __len__(self) -> int:
        return len(self.steps) * len(self.lanes)

    def __iter__(self) -> Iterator[tuple[int, MicroBatch]]:
        return enumerate(self._fetched_ahead() if self.prefetcher else self._read_ahead())

    def _planned(self) -> Iterator[MicroBatch]:
        return (self.plan.micro_batch(step, lane) for step in self.steps for lane in self.lanes)

    def _read_ahead(self) -> Iterator[MicroBatch]:
        """Announces a micro-batch some READ_AHEAD_SAMPLES before it is asked for."""
        ahead: deque[MicroBatch] = deque()
        samples_ahead = 0
        for wanted in self._planned():
            self.reader.will_need(wanted)
            ahead.append(wanted)
            samples_ahead += len(wanted)
            while samples_ahead >= READ_AHEAD_SAMPLES:
                samples_ahead -= len(ahead[0])
                yield ahead.popleft()
        yield from ahead

    def _fetched_ahead(self) -> Iterator[MicroBatch]:
        """Has the shards of a lane's block and of the next one fetched when the lane comes to the block."""
        announced: dict[int, list[tuple[int, int]]] = {}
        for wanted, lane in zip(self._planned(), itertools.cycle(self.lanes), strict=False):
            shards = self.plan.shards_ahead(wanted.step, lane)
            if announced.get(lane) != shards:
                announced[lane] = shards
                self.prefetcher.want(self.plan.splits[source].remote_shard(shard) for source, shard in shards)
            yield wanted


class _Reads(Dataset):
    def __init__(self, reader: ShardReader, ring: Ring | None, allocate: Callable[[int], np.ndarray]) -> None:
        self.reader, self.ring, self.allocate = reader, ring, allocate

    def __getitem__(self, request: tuple[int, MicroBatch]) -> Fetched | UserError:
        number, wanted = request
        try:
            if not self.ring:
                return self.reader.read(wanted, self.allocate)
            fetched = self.reader.read(wanted, partial(self.ring.buffer, number))
        except UserError as error:  # raised in a worker process, it would arrive wrapped in a traceback
            return error
        in_slot = self.ring.fits(fetched.offsets[-1])
        return replace(fetched, data=None) if in_slot else fetched


def _as_it_is(fetched: Fetched) -> Fetched:
    return fetched


def _taken_out(fetched: Fetched, ring: Ring, number: int, allocate: Callable[[int], np.ndarray]) -> Fetched:
    """A batch that a worker handed over, copied out of its slot, which the next request may use."""
    if fetched.data is not None:
        return fetched
    data = allocate(int(fetched.offsets[-1]))
    data[:] = ring.buffer(number, len(data))
    return replace(fetched, data=data)


def _pinned_buffer(size_bytes: int) -> np.ndarray:
    """Memory that a GPU copies from without waiting. PyTorch keeps it and uses it again."""
    return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True).numpy()


def _byte_batch(fetched: Fetched) -> ByteBatch:
    mixed = fetched.second is not None
    return ByteBatch(
        data=torch.from_numpy(fetched.data),
        offsets=torch.from_numpy(fetched.offsets),
        labels=torch.from_numpy(fetched.labels),
        sources=torch.from_numpy(fetched.sources),
        samples=torch.from_numpy(fetched.samples),
        second_labels=torch.from_numpy(fetched.second) if mixed else None,
        second_share=torch.from_numpy(fetched.share) if mixed else None,
        replaced=fetched.replaced,
    )

"""The loader of micro-batches: the plan is the sampler, and the reader is a map-style dataset.

`torch.utils.data.DataLoader` runs them with its worker processes and prefetch; it holds no state of the data order.
Workers pass batches in slots of anonymous shared memory, which is freed with the processes. The same bytes take several
times as long if they are pickled through DataLoader's queues, and named shared memory stays after a SIGKILL.
"""

from __future__ import annotations

import itertools
import mmap
import os
import re
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import FrameType

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from bfsys.batch import ByteBatch
from bfsys.config import Config
from bfsys.data.storage.prefetch import Prefetcher
from bfsys.data.streaming.datasets import Sources, any_remote, make_cache
from bfsys.data.streaming.plan import (
    MicroBatch,
    Plan,
    evaluation_batches,
    evaluation_share,
    lane_groups,
    lanes_of_rank,
)
from bfsys.data.streaming.quarantine import Quarantine
from bfsys.data.streaming.reader import RawBatch, ShardReader, new_buffer
from bfsys.data.streaming.ring import Ring
from bfsys.dist import Ranks
from bfsys.errors import UserError, cannot_start
from bfsys.process import blocking

# Requests that each worker reads in advance.
PREFETCH = 3
# A request is one micro-batch, or several small ones of about this many bytes together. They then share the overhead of
# a request (0.4 ms in the two processes).
REQUEST_BYTES = 4 << 20
# Samples that are announced to the system (posix_fadvise) before they are read, if they come from a disk. A call costs
# 1 us, a third of reading a sample from memory, so it stops ANNOUNCED_AFTER_SLOW micro-batches after the last slow one.
READ_AHEAD_SAMPLES = 256
ANNOUNCED_AFTER_SLOW = 64
# Size of a slot relative to the mean of a request; data beyond it is pickled. Only touched memory is allocated.
SLOT_OVER_MEAN = 4
# Reports of worker processes: their process id, and the (source, sample) that they are decoding.
_POSITION = np.dtype([("process", "<i8"), ("position", "<i8", 2)])
# Loaders whose workers run: the reader, and the reports of the workers.
_running: dict[int, tuple[ShardReader, np.ndarray]] = {}


class LoaderCrashed(RuntimeError):
    """A loader process ended although nothing had asked it to."""


def training_batches(
    config: Config,
    sources: Sources,
    plan: Plan,
    ranks: Ranks,
    *,
    first_step: int,
    every: int = 1,
    micro_batches: int | None = None,
    quarantine: Quarantine | None = None,
) -> Generator[ByteBatch, None, None]:
    """The rank's micro-batches from `first_step` to the end of the run, lane by lane within a step; of each `every`-th
    step.

    The rank's lanes are grouped into `micro_batches` per step; by default, each lane is one. `quarantine` records
    samples that could not be read.
    """
    quarantine = quarantine if quarantine is not None else Quarantine()
    bad_from = [quarantine.bad_from(source.split.split, source.origin) for source in sources.opened]
    with_content = config.content_weight > 0
    reader = ShardReader(sources, seed=config.train.seed, bad_from=bad_from, with_content=with_content)
    lanes = lanes_of_rank(plan.lanes, ranks.rank, ranks.world_size)
    pinned = ranks.device.type == "cuda"
    prefetcher = Prefetcher(make_cache(config)) if any_remote(sources) else None
    groups = lane_groups(lanes, micro_batches or len(lanes))
    requests = _Requests(plan, groups, range(first_step, config.train.steps, every), reader, prefetcher)
    try:
        if config.data.workers:
            mean_bytes = plan.mean_micro_batch_bytes * len(lanes) / len(groups)
            batches = _read_by_workers(config.data.workers, requests, reader, mean_bytes, pinned)
        else:
            allocate = _pinned_buffer if pinned else new_buffer
            batches = (reader.read(wanted, allocate) for wanted in requests.announced())
        for fetched in batches:
            quarantine.found(fetched.bad)
            if fetched.slow:
                requests.to_announce = ANNOUNCED_AFTER_SLOW
            batch = _byte_batch(fetched, pinned)
            del fetched  # a slot is in use as long as an array refers to it
            yield batch
            del batch
    finally:
        reader.close()
        if prefetcher:
            prefetcher.close()


def evaluation_rounds(
    config: Config, sources: Sources, ranks: Ranks, quarantine: Quarantine, step: int
) -> Iterator[tuple[ByteBatch, bool]]:
    """Every readable sample once over all ranks. All ranks have the same number of rounds.

    Yields (batch, counts). A rank without a further batch, or with an unreadable one, gets a dummy batch with counts
    False, since the forward passes of ZeRO-3 are collective.
    """
    # Otherwise thousands of small files would be computed at once, each with a probability of each class.
    least_bytes = max(config.model.architecture().rounding_bytes, len(sources.classes))
    batches = evaluation_batches(sources.splits, config.data.eval_batch_bytes, least_bytes)
    share = evaluation_share(batches, sources.splits, ranks.rank, ranks.world_size)
    reader = ShardReader(sources, seed=config.train.seed, replace_bad=False)
    nothing = ByteBatch.of_zeros(config.model.kernel)
    try:
        for number in range(-(-len(batches) // ranks.world_size)):
            if number >= len(share):
                yield nothing, False
                continue
            wanted = share[number]
            fetched = reader.read(MicroBatch(wanted.source, wanted.sample, wanted.epoch, step))
            quarantine.found(fetched.bad)
            yield (_byte_batch(fetched), True) if len(fetched.labels) else (nothing, False)
    finally:
        reader.close()


class _Requests:
    """The rank's micro-batches. They are announced to the system or the prefetcher before they are read."""

    def __init__(
        self, plan: Plan, groups: list[range], steps: range, reader: ShardReader, prefetcher: Prefetcher | None
    ) -> None:
        """Each of the `groups` of lanes is a micro-batch of every step."""
        self.plan, self.groups, self.steps = plan, groups, steps
        self.reader, self.prefetcher = reader, prefetcher
        self.to_announce = ANNOUNCED_AFTER_SLOW

    def announced(self) -> Iterator[MicroBatch]:
        return self._fetched_ahead(self.prefetcher) if self.prefetcher else self._read_ahead()

    def _planned(self) -> Iterator[MicroBatch]:
        return (self.plan.micro_batch_of(step, lanes) for step in self.steps for lanes in self.groups)

    def _read_ahead(self) -> Iterator[MicroBatch]:
        """Announces a micro-batch about READ_AHEAD_SAMPLES samples before it is yielded."""
        ahead: deque[MicroBatch] = deque()
        samples_ahead = 0
        for wanted in self._planned():
            if self.to_announce > 0:
                self.to_announce -= 1
                self.reader.will_need(wanted)
            ahead.append(wanted)
            samples_ahead += len(wanted)
            while samples_ahead >= READ_AHEAD_SAMPLES:
                samples_ahead -= len(ahead[0])
                yield ahead.popleft()
        yield from ahead

    def _fetched_ahead(self, prefetcher: Prefetcher) -> Iterator[MicroBatch]:
        """Prefetches the shards of each lane's current block, then those of its next one: see `Plan.shards_ahead`."""
        lanes = itertools.chain(*self.groups)
        announced = {lane: self.plan.shards_ahead(self.steps.start, lane) for lane in lanes}
        for of_each_lane in itertools.zip_longest(*announced.values()):  # interleaved, since all lanes begin at once
            self._want(prefetcher, (shard for shard in of_each_lane if shard))
        for wanted, group in zip(self._planned(), itertools.cycle(self.groups), strict=False):
            for lane in group:
                shards = self.plan.shards_ahead(wanted.step, lane)
                if announced[lane] != shards:
                    announced[lane] = shards
                    self._want(prefetcher, shards)
            yield wanted

    def _want(self, prefetcher: Prefetcher, shards: Iterable[tuple[int, int]]) -> None:
        splits = self.plan.splits
        prefetcher.want(splits[s].remote_shard(n) for s, n in shards if splits[s].dataset.cache)


def _read_by_workers(
    workers: int, requests: _Requests, reader: ShardReader, mean_bytes: float, pinned: bool
) -> Iterator[RawBatch]:
    """Micro-batches in their order, read by worker processes."""
    per_request = max(1, int(REQUEST_BYTES / mean_bytes)) if reader.is_plain else 1
    # Two more than the requests under way, since the consumer may hold one and take the next.
    ring = Ring(workers * PREFETCH + 2, int(SLOT_OVER_MEAN * per_request * mean_bytes))
    positions = np.frombuffer(mmap.mmap(-1, workers * _POSITION.itemsize), _POSITION)
    # RunData.notes gives this warning in terms of the config.
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    loader = DataLoader(
        _Reads(reader, ring),
        batch_size=None,  # a request is a list of whole micro-batches
        sampler=_with_slots(requests, per_request, ring),
        num_workers=workers,
        prefetch_factor=PREFETCH,
        multiprocessing_context="fork",  # workers must inherit the ring
        collate_fn=lambda answer: answer,
        worker_init_fn=partial(_begin_worker, os.getpid(), reader, positions),
    )
    # Workers inherit the mask, so a SIGTERM to all processes of a job cannot end one that begins.
    try:
        with blocking({signal.SIGTERM}):
            answers = _Answers(loader)  # starts the processes
    except OSError as error:
        raise cannot_start(f"a process that reads data (data.workers={workers})", error) from None
    with _naming_crashes(reader, positions):
        yield from _micro_batches_of(answers, ring, pinned)


def _micro_batches_of(answers: Iterable, ring: Ring, pinned: bool) -> Iterator[RawBatch]:
    for answer in answers:
        if isinstance(answer, UserError):
            raise answer
        slot, micro_batches = answer
        content = None if slot is None else ring.release(slot)
        for fetched in micro_batches:
            if content is not None and fetched.slot_start is not None:
                data = content[fetched.slot_start : fetched.slot_start + int(fetched.offsets[-1])]
                fetched = replace(fetched, data=data)
            if pinned:
                data = _pinned_buffer(len(fetched.data))
                data[:] = fetched.data
                fetched = replace(fetched, data=data)
            yield fetched
            del fetched


class _Answers(_MultiProcessingDataLoaderIter):
    """PyTorch's iterator over a DataLoader with worker processes. If they cannot be started, it prints no error when it
    is deleted."""

    _are_started = False

    def __init__(self, loader: DataLoader) -> None:
        super().__init__(loader)
        self._are_started = True

    def __del__(self) -> None:
        if self._are_started:
            super().__del__()


def _with_slots(requests: _Requests, per_request: int, ring: Ring) -> Iterator[tuple[int | None, list[MicroBatch]]]:
    """Requests to the workers: the slot, or None if all are in use, and the micro-batches."""
    batches = requests.announced()
    while request := list(itertools.islice(batches, per_request)):
        yield ring.reserve(), request


class _Reads(Dataset):
    def __init__(self, reader: ShardReader, ring: Ring) -> None:
        self.reader, self.ring = reader, ring

    def __getitem__(
        self, request: tuple[int | None, list[MicroBatch]]
    ) -> tuple[int | None, list[RawBatch]] | UserError:
        slot, batches = request
        try:
            return slot, list(self._read(slot, batches))
        except UserError as error:  # raised in a worker, it would arrive as a traceback
            return error

    def _read(self, slot: int | None, batches: list[MicroBatch]) -> Iterator[RawBatch]:
        start = 0
        for wanted in batches:
            fetched = self.reader.read(wanted, partial(self._buffer, slot, start))
            if slot is not None and self._fits(start, len(fetched.data)):
                start += len(fetched.data)
                fetched = replace(fetched, data=new_buffer(0), slot_start=start - len(fetched.data))
            yield fetched

    def _fits(self, start: int, size_bytes: int) -> bool:
        return start + size_bytes <= self.ring.slot_bytes

    def _buffer(self, slot: int | None, start: int, size_bytes: int) -> np.ndarray:
        if slot is not None and self._fits(start, size_bytes):
            return self.ring.fill(slot, start, size_bytes)
        return new_buffer(size_bytes)


@contextmanager
def _naming_crashes(reader: ShardReader, positions: np.ndarray) -> Iterator[None]:
    """Raise LoaderCrashed if a worker process crashes. PyTorch has a handler of SIGCHLD, which raises RuntimeError
    wherever the training process is at that moment, and its iterator raises RuntimeError, too.

    The handler is wrapped once and stays, as PyTorch's does, since a loader may be closed after another one has begun,
    or in another thread, where no handler can be set.
    """
    by_pytorch = signal.getsignal(signal.SIGCHLD)
    is_wrapped = isinstance(by_pytorch, partial) and by_pytorch.func is _handle_sigchld
    if threading.current_thread() is threading.main_thread() and callable(by_pytorch) and not is_wrapped:
        signal.signal(signal.SIGCHLD, partial(_handle_sigchld, by_pytorch))
    _running[id(positions)] = reader, positions
    try:
        yield
    except RuntimeError as error:
        if (crash := _crash_of(error)) is error:
            raise
        raise crash from None
    finally:
        del _running[id(positions)]


def _handle_sigchld(
    by_pytorch: Callable[[int, FrameType | None], object], number: int, frame: FrameType | None
) -> None:
    try:
        by_pytorch(number, frame)
    except RuntimeError as error:
        raise _crash_of(error) from None


def _crash_of(error: RuntimeError) -> RuntimeError:
    """The error itself if it is of another kind. If workers decode files, the text names the current file."""
    if isinstance(error.__cause__, LoaderCrashed):  # raised by the handler while PyTorch's iterator was waiting
        return error.__cause__
    text, *_ = str(error).partition(". ")
    if isinstance(error, LoaderCrashed) or not text.startswith("DataLoader worker (pid"):
        return error
    processes = set(map(int, re.findall(r"\d+", text)))
    for reader, positions in list(_running.values()):
        for worker in positions if not reader.is_plain else ():
            if worker["process"] in processes:
                text += (
                    f"; it was reading {reader.name_of(*worker['position'].tolist())}. If it ends there again, pack "
                    "the dataset without this file"
                    + (", or set optim.content_loss=0, which decodes nothing" if reader.with_content else "")
                )
    return LoaderCrashed(f"{text}; if it was killed by signal 9, memory was short: use fewer data.workers")


def _begin_worker(parent: int, reader: ShardReader, positions: np.ndarray, worker: int) -> None:
    positions[worker]["process"] = os.getpid()
    reader.position = positions[worker]["position"]
    _end_with_parent(parent)


def _end_with_parent(parent: int) -> None:
    """End this worker when the training process ends or sends SIGTERM. Ignore SIGTERM from other processes.

    SLURM and shells send SIGTERM to all processes of a job, and training needs batches until it has saved. PyTorch's
    workers would end at once. They would also hang after the training process was killed, if a pipe cannot hold all
    that they have read.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        while os.getppid() == parent:
            request = signal.sigtimedwait({signal.SIGTERM}, 1.0)
            if request and request.si_pid == parent:
                break
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _pinned_buffer(size_bytes: int) -> np.ndarray:
    """Pinned memory, from which copies to a GPU are asynchronous. PyTorch caches and reuses it."""
    return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True).numpy()


def _byte_batch(fetched: RawBatch, pinned: bool = False) -> ByteBatch:
    arrays = {name: torch.from_numpy(value) for name, value in vars(fetched).items() if isinstance(value, np.ndarray)}
    if pinned and "content" in arrays:
        arrays["content"] = arrays["content"].pin_memory()
    return ByteBatch(**arrays, replaced=fetched.replaced)

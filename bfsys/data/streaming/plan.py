"""The samples of step t on lane l, computed from the index without reading data and without state.

A step draws `batch_samples` samples; `Mixture` says how many of each source. The draws of a source are numbered
r = 0, 1, 2, …: draw r belongs to epoch r // N of its N samples and to lane r % lanes. In each epoch the shards are
permuted, and the sequence is cut into one contiguous slice per lane, exactly as long as the lane's draws of that epoch.
N successive draws therefore hold every sample once, and a lane reads few shards. A slice is divided into blocks of
`shuffle_block` samples. Within a block, samples are shuffled and assigned to the block's steps so that each step gets
about the same number of bytes.

The whole state of the data order is thus the step number, any step can be computed at once, and nothing depends on the
number of ranks or loader processes.

Rejected alternative: micro-batches with a varying number of samples of similar length under a byte budget. The batch
size of a step, and with it the mixture, would vary with the lengths. Batches are ragged, so samples of unequal length
cost no padding anyway. Dealing a block by length keeps every step at `batch_samples` and all lanes at similar cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from bfsys.data.storage.shards import Split
from bfsys.data.streaming.mix import Mixture
from bfsys.errors import UserError, counted

T = TypeVar("T")
Lanes = TypeVar("Lanes", int, np.ndarray)

# The next block is fetched at the latest after this part of a block. The rest of the block leaves enough time.
LATEST_NEXT_BLOCK = 0.5
# Epochs whose order of shards is kept. Near the end of an epoch, every step asks for shards of two epochs on each lane.
KEPT_ORDERS = 2
# Multiples of it, modulo 1, are evenly spread between 0 and 1, for any run of successive lanes.
GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class MicroBatch:
    """The samples that one or several lanes contribute to a step: int64 [samples] each.

    source  position in the list of sources
    sample  number in that source's index
    epoch   number of completed epochs of the source (augmentation is seeded with seed, epoch, sample)
    step    the step of the micro-batch
    """

    source: np.ndarray
    sample: np.ndarray
    epoch: np.ndarray
    step: int = 0

    def __len__(self) -> int:
        return len(self.sample)


class _Slices:
    """The order of one source's samples in every epoch, per lane."""

    def __init__(self, split: Split, source: int, lanes: int, shuffle_block: int, seed: int) -> None:
        self.split, self.source, self.lanes = split, source, lanes
        self.shuffle_block, self.seed = shuffle_block, seed
        self.samples = len(split)
        self._shard_sizes = np.diff(split.shard_starts)
        self._shard_orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by epoch: shards, their ends

    def lane_draws(self, draws: int, lane: Lanes) -> Lanes:
        """The number of the lane's draws among the source's first `draws`; for several lanes, an array."""
        return (draws - lane + self.lanes - 1) // self.lanes

    def epoch_start(self, epoch: int, lane: int) -> int:
        return self.lane_draws(epoch * self.samples, lane)

    def block_samples(self, epoch: int, lane: int, first: int, stop: int) -> np.ndarray:
        """The samples at places [first, stop) of the lane's slice, shuffled: int64 [stop - first]."""
        place, nth, shards, ends = self._places(epoch, lane, np.arange(first, stop))
        shard = shards[nth]
        sample = self.split.shard_starts[shard] + place - (ends[nth] - self._shard_sizes[shard])
        rng = np.random.default_rng([self.seed, 1, self.source, epoch, lane, first])
        return rng.permutation(sample)

    def block_shards(self, epoch: int, lane: int, first: int, stop: int) -> list[int]:
        """The shards of places [first, stop) of the lane's slice."""
        _, nth, shards, _ = self._places(epoch, lane, np.array([first, stop - 1]))
        return shards[nth[0] : nth[1] + 1].tolist()

    def _places(self, epoch: int, lane: int, in_slice: np.ndarray) -> tuple[np.ndarray, ...]:
        """(places in the epoch's sequence of samples, place of each sample's shard in the epoch's sequence of shards,
        the shards in that order, their ends)."""
        before = np.arange(lane)
        slice_start = int(
            np.sum(self.lane_draws((epoch + 1) * self.samples, before) - self.lane_draws(epoch * self.samples, before))
        )
        place = slice_start + in_slice
        shards, ends = self._shards_of_epoch(epoch)
        return place, np.searchsorted(ends, place, side="right"), shards, ends

    def _shards_of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._shard_orders:
            rng = np.random.default_rng([self.seed, 0, self.source, epoch])
            shards = rng.permutation(len(self._shard_sizes))
            if len(self._shard_orders) == KEPT_ORDERS:
                del self._shard_orders[next(iter(self._shard_orders))]
            self._shard_orders[epoch] = (shards, np.cumsum(self._shard_sizes[shards]))
        return self._shard_orders[epoch]


class Plan:
    """The data order of a run. It depends only on `facts`: equal facts give an equal order."""

    def __init__(
        self,
        splits: Sequence[Split],
        weights: Sequence[float],
        *,
        batch_samples: int,
        lanes: int,
        shuffle_block: int,
        seed: int,
        mean_bytes: Sequence[float] | None = None,
    ) -> None:
        """`mean_bytes` is the mean size of each source's files as the model reads them, if it differs from the stored
        size."""
        empty = [f"{s.dataset.shown}: split {s.split!r} has no samples" for s in splits if not len(s)]
        if empty:
            raise UserError(*empty)
        self.splits, self.lanes, self.batch_samples = tuple(splits), lanes, batch_samples
        self.mixture = Mixture(weights)
        self._mean_bytes = mean_bytes or [split.bytes / len(split) for split in splits]
        self._slices = [_Slices(s, i, lanes, shuffle_block, seed) for i, s in enumerate(splits)]
        self._blocks: dict[tuple[int, int], tuple[tuple[int, int], np.ndarray]] = {}
        self.facts = {
            **{
                f"source {i}": f"{s.name} {s.split}: {len(s):,} samples, {len(s.shards):,} shards, {s.bytes:,} bytes, "
                f"{len(s.classes):,} classes, fingerprint {s.fingerprint[:16]}"
                for i, s in enumerate(splits)
            },
            "shares": self.mixture.shares.tolist(),
            "batch_samples": batch_samples,
            "lanes": lanes,
            "shuffle_block": shuffle_block,
            "seed": seed,
        }

    def micro_batch(self, step: int, lane: int) -> MicroBatch:
        """The lane's samples of a step."""
        return self.micro_batch_of(step, [lane])

    def micro_batch_of(self, step: int, lanes: Sequence[int]) -> MicroBatch:
        """The samples of several lanes of a step, lane by lane."""
        begin, end = self.mixture.counts(np.array([step, step + 1]) * self.batch_samples)
        nothing = np.zeros(0, np.int64)
        sources, samples, epochs = [nothing], [nothing], [nothing]
        for lane, (s, slices) in itertools.product(lanes, enumerate(self._slices)):
            first, stop = (int(slices.lane_draws(int(n), lane)) for n in (begin[s], end[s]))
            while first < stop:
                epoch, piece = self._piece(s, lane, first, stop)
                samples.append(piece)
                sources.append(np.full(len(piece), s))
                epochs.append(np.full(len(piece), epoch))
                first += len(piece)
        return MicroBatch(np.concatenate(sources), np.concatenate(samples), np.concatenate(epochs), step)

    def shards_ahead(self, step: int, lane: int) -> list[tuple[int, int]]:
        """(source, shard) pairs of the lane's current blocks, then of its next blocks once a part of a current block is
        drawn.

        All lanes begin their blocks in the same step. The part differs between lanes, so that they do not all request
        their next blocks from the server at the same time.
        """
        found: dict[tuple[int, int], None] = {}
        drawn_before_next = lane * GOLDEN_RATIO % 1 * LATEST_NEXT_BLOCK
        before, after = self.mixture.counts(np.array([step, step + 1]) * self.batch_samples)
        for s, slices in enumerate(self._slices):
            draw, drawn = (int(slices.lane_draws(int(n), lane)) for n in (before[s], after[s]))
            epoch, start, first, stop = self._block_of(s, lane, draw)
            found.update(dict.fromkeys((s, shard) for shard in slices.block_shards(epoch, lane, first, stop)))
            if drawn - start - first >= drawn_before_next * (stop - first):
                epoch, start, first, stop = self._block_of(s, lane, start + stop)
                found.update(dict.fromkeys((s, shard) for shard in slices.block_shards(epoch, lane, first, stop)))
        return list(found)

    def bytes_of(self, batch: MicroBatch) -> int:
        """File bytes of a micro-batch, from the index."""
        return sum(
            int(self.splits[s].samples["length"][batch.sample[batch.source == s]].sum(dtype=np.int64))
            for s in np.unique(batch.source)
        )

    @property
    def mean_micro_batch_bytes(self) -> float:
        """File bytes of the average micro-batch."""
        return float(self.mixture.shares @ self._mean_bytes) * self.batch_samples / self.lanes

    def _block_of(self, source: int, lane: int, draw: int) -> tuple[int, int, int, int]:
        """The block of one of the lane's draws: (epoch, the lane's first draw of the epoch, the block's first place in
        the lane's slice, its last place + 1)."""
        slices = self._slices[source]
        epoch = (draw * self.lanes + lane) // slices.samples
        start = slices.epoch_start(epoch, lane)
        length = slices.epoch_start(epoch + 1, lane) - start
        first = (draw - start) // slices.shuffle_block * slices.shuffle_block
        return epoch, start, first, min(first + slices.shuffle_block, length)

    def _piece(self, source: int, lane: int, first: int, stop: int) -> tuple[int, np.ndarray]:
        """The epoch and samples of the lane's draws [first, stop) of a source, up to the end of the first block."""
        epoch, start, block, block_stop = self._block_of(source, lane, first)
        known = self._blocks.get((source, lane))
        if known is None or known[0] != (epoch, block):
            known = ((epoch, block), self._deal(source, lane, epoch, start, block, block_stop))
            self._blocks[source, lane] = known
        return epoch, known[1][first - start - block : min(stop - start, block_stop) - block]

    def _deal(self, source: int, lane: int, epoch: int, start: int, first: int, stop: int) -> np.ndarray:
        """The block's samples in the order of their draws."""
        slices = self._slices[source]
        samples = slices.block_samples(epoch, lane, first, stop)
        lengths = self.splits[source].samples["length"][samples].astype(np.int64)
        return samples[deal_evenly(lengths, self._steps_of_draws(source, lane, start + first, start + stop))]

    def _steps_of_draws(self, source: int, lane: int, first: int, stop: int) -> np.ndarray:
        """The number of the lane's draws [first, stop) in each step."""
        draws = np.arange(first, stop) * self.lanes + lane
        _, counts = np.unique(self.mixture.places(source, draws) // self.batch_samples, return_counts=True)
        return counts


def deal_evenly(costs: np.ndarray, group_sizes: np.ndarray) -> np.ndarray:
    """Divide items into groups of given sizes so that each group's mean cost is about the common mean.

    costs int64 [n], group_sizes int64 [g] with sum n -> order int64 [n]: the first group_sizes[0] entries are the first
    group's items, and so on. Rounds assign items, the largest first. In each round, the half of the groups whose
    costs are furthest below their target get one item each. With 4,096 log-normal lengths (sigma 0.7) in groups of 12,
    the standard deviation of the groups' means is 0.7 %. With random groups it is 22 %. A round of one item would give
    no better groups, and would take three times as long.
    """
    items = np.argsort(-costs, kind="stable")
    lack = group_sizes * (costs.sum() / max(1, len(costs)))
    room = group_sizes.copy()
    group = np.empty(len(costs), np.int64)
    dealt = 0
    while dealt < len(items):
        open_groups = np.flatnonzero(room)
        takers = open_groups[np.argsort(-lack[open_groups], kind="stable")]
        if dealt + len(takers) < len(items):
            takers = takers[: (len(takers) + 1) // 2]
        taken = items[dealt : dealt + len(takers)]
        group[taken] = takers
        lack[takers] -= costs[taken]
        room[takers] -= 1
        dealt += len(takers)
    return np.argsort(group, kind="stable")


def fitting_world_sizes(lanes: int) -> str:
    """The numbers of ranks that divide the number of lanes, as readable text."""
    return ", ".join(str(n) for n in range(1, lanes + 1) if lanes % n == 0)


def lanes_of_rank(lanes: int, rank: int, world_size: int) -> range:
    """The lanes of a rank. If the world size does not divide the lanes, raises UserError with those that do."""
    if lanes % world_size:
        raise UserError(
            f"data.lanes: {counted(lanes, 'lane')} cannot be shared evenly by {world_size} ranks; "
            f"world sizes that fit: {fitting_world_sizes(lanes)}"
        )
    per_rank = lanes // world_size
    return range(rank * per_rank, (rank + 1) * per_rank)


def lane_groups(lanes: range, groups: int) -> list[range]:
    """The lanes in the given number of groups of neighbours, whose sizes differ by one at most."""
    ends = [len(lanes) * i // groups for i in range(groups + 1)]
    return [lanes[first:end] for first, end in itertools.pairwise(ends)]


def evaluation_batches(splits: Sequence[Split], budget_bytes: int, least_bytes: int) -> list[MicroBatch]:
    """Every sample of every split once, shard by shard, in micro-batches of at most `budget_bytes`.

    Files shorter than `least_bytes` count as `least_bytes`. A file above the budget forms its own batch.
    """
    source = np.concatenate([np.full(len(s), i) for i, s in enumerate(splits)])
    sample = np.concatenate([np.arange(len(s)) for s in splits])
    costs = np.maximum(np.concatenate([s.samples["length"] for s in splits]).astype(np.int64), least_bytes)
    batches = within_budget(zip(costs.tolist(), range(len(costs)), strict=True), budget_bytes)
    return [MicroBatch(source[b], sample[b], np.zeros(len(b), np.int64)) for b in batches]


def evaluation_share(batches: Sequence[MicroBatch], splits: Sequence[Split], rank: int, ranks: int) -> list[MicroBatch]:
    """The micro-batches of a rank. They are neighbours, so a node fetches few shards. Their numbers differ by one at
    most between ranks.

    The one with the longest file comes first, so that a lack of memory shows at once.
    """

    def longest(batch: MicroBatch) -> int:
        return max(
            int(splits[s].samples["length"][batch.sample[batch.source == s]].max()) for s in np.unique(batch.source)
        )

    share = lane_groups(range(len(batches)), ranks)[rank]
    return sorted((batches[number] for number in share), key=longest, reverse=True)


def within_budget(items: Iterable[tuple[int, T]], budget: int) -> Iterator[list[T]]:
    """Group (cost, item) pairs in order into lists of items with a total cost of at most `budget`. An item above the
    budget forms its own list."""
    batch: list[T] = []
    spent = 0
    for cost, item in items:
        if batch and spent + cost > budget:
            yield batch
            batch, spent = [], 0
        batch.append(item)
        spent += cost
    if batch:
        yield batch

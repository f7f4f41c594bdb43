"""Bytes of samples, read directly from the tars: the index holds the offset of each file.

A map-style reader over `pread` needs no unpacking, no state and no lock, and it reads a micro-batch into one buffer.
Every file is verified by its checksum. A damaged file is replaced by another of its source. The choice depends only on
seed, source, sample and epoch, so every rank and every replay make the same one.

Rejected alternatives: iterating over tars as streams, which ties the order to the shards and a resume to a replay;
`mmap`, which turns a truncated file into a SIGBUS.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

from bfsys.data.media.content import NONE, content_of
from bfsys.data.media.input_formats import kind_of
from bfsys.data.storage.remote import WrongContentError
from bfsys.data.streaming.augment import Augmentation
from bfsys.data.streaming.byte_transforms import apply
from bfsys.data.streaming.datasets import Sources
from bfsys.data.streaming.plan import MicroBatch
from bfsys.data.streaming.quarantine import LISTED, BadSample
from bfsys.data.streaming.shard_files import BadFileError, ShardFiles
from bfsys.errors import UserError

# Replacement candidates that are tried for a bad sample.
STAND_INS = 100
# If reading takes longer than this, it waits for a disk.
SLOW_S_PER_SAMPLE, SLOW_S_PER_BYTE = 10e-6, 1e-9
# Mixup partners come from this many samples around a sample.
PARTNERS = 4096
# Streams of random numbers, apart from those of the plan (0, 1).
_AUGMENTATION, _STAND_IN, _PARTNER = 2, 3, 4


@dataclass
class RawBatch:
    """A micro-batch as it was read: the content of a `ByteBatch` as NumPy arrays.

    bad         samples that could not be read
    slow        whether reading took longer than from memory
    slot_start  offset of the data in a loader worker's slot; None if they are in `data`
    """

    data: np.ndarray  # uint8 [bytes]; empty if the data are in a slot
    offsets: np.ndarray  # int64 [samples + 1]
    labels: np.ndarray  # int64 [samples]
    sources: np.ndarray  # int64 [samples]
    samples: np.ndarray  # int64 [samples]
    second_labels: np.ndarray | None = None  # int64 [samples]
    second_share: np.ndarray | None = None  # float32 [samples]
    content: np.ndarray | None = None  # float16 [samples, rows, columns]
    bad: tuple[BadSample, ...] = ()
    replaced: int = 0
    slow: bool = False
    slot_start: int | None = None


def new_buffer(size_bytes: int) -> np.ndarray:
    return np.empty(size_bytes, np.uint8)


class Draw(NamedTuple):
    """A sample of a source, as a step draws it."""

    source: int
    sample: int
    epoch: int
    step: int


def draws_of(wanted: MicroBatch) -> list[Draw]:
    drawn = zip(wanted.source.tolist(), wanted.sample.tolist(), wanted.epoch.tolist(), strict=True)
    return [Draw(source, sample, epoch, wanted.step) for source, sample, epoch in drawn]


class Example(NamedTuple):
    """A sample as the model reads it."""

    content: np.ndarray  # uint8 [bytes]
    label: int
    second_label: int
    second_share: float
    shown: np.ndarray | None = None  # float16 [rows, columns]: the table of its content; for the content loss only


class ShardReader:
    """Reads micro-batches of one or more sources."""

    def __init__(
        self,
        sources: Sources,
        *,
        seed: int = 0,
        bad_from: Sequence[dict[int, int]] = (),
        replace_bad: bool = True,
        with_content: bool = False,
    ) -> None:
        """`bad_from[s]` holds the bad samples of source s from the quarantine: {sample: first step at which it is bad}.
        Without `replace_bad`, bad samples are left out. `with_content`: files are also decoded for the content loss."""
        self.sources, self.splits = sources.opened, sources.splits
        self.seed, self.transforms, self.replace_bad = seed, sources.transforms, replace_bad
        self._bad_from = [dict(bad) for bad in bad_from] or [{} for _ in self.splits]
        self._found: list[BadSample] = []  # by the current `read`
        self._rows = [np.asarray(split.samples) for split in self.splits]
        self._files = ShardFiles(self.splits)
        self.with_content = with_content
        self._shows_nothing: set[tuple[int, int]] = set()
        is_changed = any(source.augmentation or source.jitter for source in self.sources)
        self.is_plain = not (is_changed or self.transforms or with_content)
        self.position = np.zeros(2, np.int64)
        """(source, sample) that is being decoded, in memory that another process may share."""

    def read(self, wanted: MicroBatch, allocate: Callable[[int], np.ndarray] = new_buffer) -> RawBatch:
        """The bytes, classes and origins of a micro-batch, in a buffer from `allocate(bytes)`."""
        began = time.perf_counter()
        fetched = self._read_plainly(wanted, allocate) if self.is_plain else None
        fetched = fetched or self._read_slowly(wanted, allocate)
        usual_s = SLOW_S_PER_SAMPLE * len(wanted) + SLOW_S_PER_BYTE * len(fetched.data)
        fetched.slow = time.perf_counter() - began > usual_s
        return fetched

    def will_need(self, wanted: MicroBatch) -> None:
        """Ask the system to read a micro-batch into memory (posix_fadvise); returns at once."""
        for source, row in zip(wanted.source.tolist(), self._rows_of(wanted).tolist(), strict=True):
            shard, _, offset, length, *_ = row
            try:
                os.posix_fadvise(self._files.open(source, shard), offset, length, os.POSIX_FADV_WILLNEED)
            except (OSError, UserError):
                return  # reading will report the error

    def name_of(self, source: int, sample: int) -> str:
        """The name of a sample for messages: dataset, shard and key."""
        split = self.splits[source]
        shard = split.shards[self._rows[source]["shard"][sample]].file
        return f"{split.dataset.shown}, {shard}: sample {split.key(sample)!r}"

    def close(self) -> None:
        self._files.close()

    def _rows_of(self, wanted: MicroBatch) -> np.ndarray:
        """SAMPLE [samples]"""
        if len(self._rows) == 1:
            return self._rows[0][wanted.sample]
        rows = np.empty(len(wanted), self._rows[0].dtype)
        for source in np.unique(wanted.source):
            mine = wanted.source == source
            rows[mine] = self._rows[source][wanted.sample[mine]]
        return rows

    def _read_plainly(self, wanted: MicroBatch, allocate: Callable[[int], np.ndarray]) -> RawBatch | None:
        """The bytes of a micro-batch as they are stored in the shards; None if anything is damaged."""
        if any(self._bad_from) and any(map(self._is_bad, draws_of(wanted))):
            return None
        rows = self._rows_of(wanted)
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(rows["length"], out=offsets[1:], dtype=np.int64)
        data = allocate(int(offsets[-1]))
        buffer, start, files = data.data, 0, self._files.descriptors
        try:
            for source, row in zip(wanted.source.tolist(), rows.tolist(), strict=True):
                shard, _, offset, length, checksum, _ = row
                part = buffer[start : start + length]
                start += length
                descriptor = files.get((source, shard)) or self._files.open(source, shard)
                if os.preadv(descriptor, (part,), offset) != length or xxhash.xxh3_64_intdigest(part) != checksum:
                    return None
            labels = self._labels_of(wanted.source, rows["label"])
        except (OSError, WrongContentError, IndexError):  # an outage is raised: it has been retried already
            return None
        whole = bool(rows["length"].all())  # an empty file has nothing to classify
        return RawBatch(data, offsets, labels, wanted.source, wanted.sample) if whole else None

    def _labels_of(self, source: np.ndarray, label: np.ndarray) -> np.ndarray:
        """int64 [samples], in the run's classes; IndexError for a label that its dataset does not have."""
        if len(self.sources) == 1:
            return self.sources[0].label_map[label]
        labels = np.empty(len(label), np.int64)
        for s in np.unique(source):
            labels[source == s] = self.sources[s].label_map[label[source == s]]
        return labels

    def _read_slowly(self, wanted: MicroBatch, allocate: Callable[[int], np.ndarray]) -> RawBatch:
        """Read a micro-batch sample by sample: replace bad samples, augment and transform."""
        self._found = []
        examples: list[Example] = []
        origins, replaced = [], 0
        for drawn in draws_of(wanted):
            for candidate in self._candidates(drawn):
                if made := self._make(candidate):
                    examples.append(made)
                    origins.append((candidate.source, candidate.sample))
                    replaced += candidate != drawn
                    break
            else:
                if self.replace_bad:
                    where = self.splits[drawn.source].dataset.shown
                    raise UserError(
                        f"{where}: neither sample {drawn.sample} nor any of {STAND_INS} replacement candidates can be "
                        "read. `bfsys inspect --verify` shows all damage of a dataset on this machine. The first are",
                        *(bad.describe() for bad in self._found[:LISTED]),
                    )
        offsets = np.zeros(len(examples) + 1, np.int64)
        np.cumsum([len(made.content) for made in examples], out=offsets[1:])
        data = allocate(int(offsets[-1]))
        if examples:
            np.concatenate([made.content for made in examples], out=data)
        origin = np.array(origins, np.int64).reshape(-1, 2)
        mixed = any(made.second_share > 0 for made in examples)
        return RawBatch(
            data,
            offsets,
            np.array([made.label for made in examples], np.int64),
            origin[:, 0].copy(),
            origin[:, 1].copy(),
            np.array([made.second_label for made in examples], np.int64) if mixed else None,
            np.array([made.second_share for made in examples], np.float32) if mixed else None,
            np.array([made.shown for made in examples]) if self.with_content else None,
            tuple(self._found),
            replaced,
        )

    def _candidates(self, drawn: Draw) -> Iterator[Draw]:
        """The sample, then its replacement candidates, in the order in which they are tried."""
        yield drawn
        if self.replace_bad:
            rng, samples = self._rng(_STAND_IN, drawn), len(self.splits[drawn.source])
            yield from (drawn._replace(sample=int(rng.integers(samples))) for _ in range(STAND_INS))

    def _make(self, drawn: Draw) -> Example | None:
        """A sample as the model reads it; None if it is bad."""
        if self._is_bad(drawn):
            return None
        try:
            content, label = self._read_sample(drawn)
            made, rng = Example(content, label, label, 0.0), self._rng(_AUGMENTATION, drawn)
            augmentation, jitter = self.sources[drawn.source].augmentation, self.sources[drawn.source].jitter
            if jitter:
                made = made._replace(content=np.frombuffer(jitter(content.tobytes(), rng), np.uint8))
            if augmentation:
                made, rng = self._augmented(augmentation, made, drawn)
            shown = None
            if self.with_content and (jitter or augmentation):
                shown = content_of(made.content.tobytes())
            elif self.with_content:
                shown = self._shown_by(drawn, made.content)
            return made._replace(content=apply(self.transforms, made.content, rng), shown=shown)
        except BadFileError as error:
            self._set_aside(drawn, str(error))
            return None

    def _shown_by(self, drawn: Draw, content: np.ndarray) -> np.ndarray:
        """The content table of a file that is the same in each epoch. A file without a table is decoded only once, to
        save time and the messages that decoders print on damaged files."""
        file = drawn.source, drawn.sample
        if file in self._shows_nothing:
            return NONE
        table = content_of(content.tobytes())
        if np.isnan(table).any():
            if kind_of(content):  # other files are not decoded at all
                self._shows_nothing.add(file)
            return NONE
        return table

    def _augmented(self, augmentation: Augmentation, made: Example, drawn: Draw) -> tuple[Example, np.random.Generator]:
        """Augment a file. With mixup, a partner that cannot be decoded is recorded as bad, and the next one is used. A
        replay of the step uses the same one."""
        content = made.content.tobytes()
        for partner in self._partners(drawn) if augmentation.mixes else (None,):
            second, second_label, rng = None, made.label, self._rng(_AUGMENTATION, drawn)
            try:
                if partner:
                    if self._is_bad(partner):
                        continue
                    read, second_label = self._read_sample(partner)
                    second = read.tobytes()
                encoded, share = augmentation(content, rng, second)
                return Example(np.frombuffer(encoded, np.uint8), made.label, second_label, share), rng
            except (UserError, MemoryError):
                raise
            except Exception as error:  # decoders raise any exception on a damaged file
                problem = str(error) if isinstance(error, BadFileError) else f"cannot be decoded ({error})"
                if partner is None or augmentation.fails_on(content):
                    raise BadFileError(problem) from None
                self._set_aside(partner, problem)
        raise UserError(f"{self.splits[drawn.source].dataset.shown}: no sample for mixup can be read")

    def _partners(self, drawn: Draw) -> Iterator[Draw]:
        """Candidates for mixup with a sample. They are its neighbours, which packing has shuffled, so that a node need
        not fetch every shard of a remote source."""
        rng, samples = self._rng(_PARTNER, drawn), len(self.splits[drawn.source])
        first = max(0, min(drawn.sample - PARTNERS // 2, samples - PARTNERS))
        end = min(first + PARTNERS, samples)
        return (drawn._replace(sample=int(rng.integers(first, end))) for _ in range(STAND_INS))

    def _rng(self, stream: int, drawn: Draw) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream, drawn.source, drawn.epoch, drawn.sample])

    def _is_bad(self, drawn: Draw) -> bool:
        return self._bad_from[drawn.source].get(drawn.sample, drawn.step + 1) <= drawn.step

    def _set_aside(self, drawn: Draw, reason: str) -> None:
        """Record a sample that was newly found to be bad."""
        source, sample, _, step = drawn
        split = self.splits[source]
        self._bad_from[source][sample] = step
        shard = split.shards[self._rows[source]["shard"][sample]].file
        self._found.append(
            BadSample(step, split.split, self.sources[source].origin, sample, shard, split.key(sample), reason)
        )

    def _read_sample(self, drawn: Draw) -> tuple[np.ndarray, int]:
        """A file's bytes and its class; raises BadFileError, and UserError if the reason lies outside the file."""
        source, sample, *_ = drawn
        self.position[:] = source, sample
        shard, label, offset, length, checksum, _ = self._rows[source][sample].tolist()
        label_map = self.sources[source].label_map
        if label >= len(label_map):
            raise BadFileError(f"has class {label} of {len(label_map)} classes")
        if not length:
            raise BadFileError("is empty")
        return self._files.read(source, shard, offset, length, checksum), int(label_map[label])

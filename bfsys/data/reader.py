"""Bytes of samples, straight from the tars: the index says where each file lies.

A map-style reader over `pread` needs no unpacking, no state and no lock, and a micro-batch is read into one
buffer. Refused: iterating over tars as streams, which ties the order to the shards and a resume to a replay.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash

from bfsys.batch import ByteBatch
from bfsys.data.plan import MicroBatch
from bfsys.data.shards import Split
from bfsys.errors import UserError

# Shards that a reader keeps open at a time: well below the usual limit of 1,024 files per process.
OPEN_SHARDS = 128


class ShardReader:
    """Reads micro-batches of one or more splits, and checks each file against its checksum.

    `label_maps[s][label]` is the run's class number of a label of split s. Picklable: open files stay behind.
    """

    def __init__(self, splits: Sequence[Split], label_maps: Sequence[np.ndarray]) -> None:
        self.splits, self.label_maps = tuple(splits), tuple(label_maps)
        self._files: OrderedDict[Path, int] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": OrderedDict()}

    def read(self, wanted: MicroBatch) -> ByteBatch:
        """The bytes, classes and origins of a micro-batch; raises UserError for a sample that is not whole."""
        records = [self.splits[s].samples[i] for s, i in zip(wanted.source, wanted.sample, strict=True)]
        offsets = np.zeros(len(records) + 1, np.int64)
        np.cumsum([r["length"] for r in records], out=offsets[1:])
        data = np.empty(offsets[-1], np.uint8)
        labels = np.empty(len(records), np.int64)
        for n, (s, i, record) in enumerate(zip(wanted.source, wanted.sample, records, strict=True)):
            self._read_sample(self.splits[s], int(i), record, data[offsets[n] : offsets[n + 1]])
            labels[n] = self.label_maps[s][record["label"]]
        return ByteBatch(
            data=torch.from_numpy(data),
            offsets=torch.from_numpy(offsets),
            labels=torch.from_numpy(labels),
            sources=torch.from_numpy(wanted.source.astype(np.int64)),
            samples=torch.from_numpy(wanted.sample.astype(np.int64)),
        )

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _read_sample(self, split: Split, number: int, record: np.void, out: np.ndarray) -> None:
        path = split.path / split.shards[record["shard"]].file
        try:
            got = os.preadv(self._open(path), [out], int(record["offset"]))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        if got != len(out):
            problem = f"ends {len(out) - got:,} bytes early"
        elif xxhash.xxh3_64_intdigest(out) != record["checksum"]:
            problem = "differs from what was packed (checksum)"
        else:
            return
        raise UserError(
            f"{path}: sample {split.key(number)!r} (number {number}, at byte {record['offset']}) {problem}; "
            f"to see all damage: python tools/inspect_shards.py {split.path} --verify"
        )

    def _open(self, path: Path) -> int:
        if path in self._files:
            self._files.move_to_end(path)
        else:
            if len(self._files) >= OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]

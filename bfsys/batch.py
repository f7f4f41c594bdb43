"""Sample and ByteBatch: the types that data and model share.

A batch is ragged: the bytes of its files are stored back to back in one uint8 buffer, without padding. If files were
padded to a common length, as in the published code, 72 % of a batch would be padding (32 files in random order,
log-normal lengths of sigma 0.7), and the answer for a file could depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

NO_LABEL = -1
# Shape of the content table of a file (data/media/content.py)
CONTENT_ROWS, CONTENT_COLUMNS = 64, 48


@dataclass(frozen=True)
class Sample:
    """One file: its name, its bytes and its class."""

    key: str
    data: np.ndarray  # uint8 [bytes]
    label: int = NO_LABEL


@dataclass(frozen=True)
class ByteBatch:
    """B files in one buffer.

    data     uint8 [total bytes], on the device of the model
    offsets  int64 [B + 1] from 0, on the CPU, where index arithmetic is done; file i is
             data[offsets[i]:offsets[i+1]]
    labels   int64 [B], class index in the run's class list, or NO_LABEL
    sources  int64 [B], position of the file's source in the run's source list
    samples  int64 [B], position of the file in its source's index, or -1 if it has none
    second_labels, second_share   int64 [B] and float32 [B]: with mixup, the class of the sound that is mixed in, and
             its share of the target; None without mixup
    content  float16 [B, CONTENT_ROWS, CONTENT_COLUMNS]: content tables of the files (data/media/content.py) for the
             content loss; None without it
    replaced number of files that replace unreadable ones
    """

    data: Tensor
    offsets: Tensor
    labels: Tensor
    sources: Tensor
    samples: Tensor
    second_labels: Tensor | None = None
    second_share: Tensor | None = None
    content: Tensor | None = None
    replaced: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        """int64 [B], bytes per file, on the CPU."""
        return self.offsets[1:] - self.offsets[:-1]

    def files(self) -> list[np.ndarray]:
        """uint8 [bytes] of each file, as views. The batch must be on the CPU."""
        return np.split(self.data.numpy(), self.offsets[1:-1].numpy())

    def to(self, device: torch.device | str) -> ByteBatch:
        """The batch with the inputs of model and loss on `device`. Offsets and sample numbers stay on the CPU."""
        inputs = ("data", "labels", "sources", "second_labels", "second_share", "content")
        there = {name: value for name in inputs if (value := getattr(self, name)) is not None}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in there.items()})

    @staticmethod
    def from_samples(samples: Sequence[Sample]) -> ByteBatch:
        """Concatenate files (for prediction and tests; the reader fills its buffer directly)."""
        offsets = np.zeros(len(samples) + 1, np.int64)
        np.cumsum([len(s.data) for s in samples], out=offsets[1:])
        data = np.concatenate([s.data for s in samples]) if samples else np.zeros(0, np.uint8)
        return ByteBatch(
            data=torch.from_numpy(data),
            offsets=torch.from_numpy(offsets),
            labels=torch.from_numpy(np.array([s.label for s in samples], np.int64)),
            sources=torch.from_numpy(np.zeros(len(samples), np.int64)),
            samples=torch.from_numpy(np.full(len(samples), -1, np.int64)),
        )

    @staticmethod
    def of_zeros(length: int) -> ByteBatch:
        """One file of zero bytes, of class 0: for forward passes whose result does not count."""
        return ByteBatch.from_samples([Sample("", np.zeros(length, np.uint8), label=0)])

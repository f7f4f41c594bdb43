from __future__ import annotations

import numpy as np

from bfsys.batch import ByteBatch, Sample


def test_files_are_stored_back_to_back() -> None:
    files = [b"abc", b"", b"xy"]
    batch = ByteBatch.from_samples([Sample(str(i), np.frombuffer(f, np.uint8), label=i) for i, f in enumerate(files)])
    assert len(batch) == 3
    assert batch.data.numpy().tobytes() == b"abcxy"
    assert batch.offsets.tolist() == [0, 3, 3, 5]
    assert batch.lengths.tolist() == [3, 0, 2]
    assert batch.labels.tolist() == [0, 1, 2]


def test_no_files_are_an_empty_batch() -> None:
    batch = ByteBatch.from_samples([])
    assert len(batch) == 0
    assert batch.offsets.tolist() == [0]

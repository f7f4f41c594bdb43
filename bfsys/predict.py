"""Prediction: the classes of any files, from their bytes alone."""

from __future__ import annotations

if __name__ == "__main__":  # `python -m bfsys.predict`
    from bfsys.cli import run_as

    run_as("predict", "python -m bfsys.predict")

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from bfsys.batch import ByteBatch, Sample
from bfsys.data.packing.listing import regular_files
from bfsys.data.streaming.byte_transforms import ByteTransform, apply
from bfsys.data.streaming.plan import within_budget
from bfsys.model.byteformer import ByteFormer

STDIN = "-"


@torch.no_grad()
def predict(model: ByteFormer, samples: list[Sample]) -> torch.Tensor:
    """Probabilities [files, classes], float32 on the CPU; `model` must be in eval mode."""
    device = next(model.parameters()).device
    return model(ByteBatch.from_samples(samples).to(device)).float().softmax(1).cpu()


def read_files(
    paths: list[str],
    problems: list[str],
    transforms: Sequence[ByteTransform] = (),
    least_bytes: int = 1,
) -> Iterator[Sample]:
    """Files of `paths` one by one, transformed; what cannot be used is described in `problems`."""
    for path in paths:
        names = [path]
        if path != STDIN and os.path.isdir(path):
            names = regular_files(path, problems)
        for name in names:
            try:
                content = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
            except MemoryError:
                problems.append(f"{name}: memory does not suffice to read it")
                continue
            except OSError as error:
                problems.append(f"{name}: cannot be read: {error.strerror}")
                continue
            data = apply(transforms, np.frombuffer(content, np.uint8), np.random.default_rng(0))
            if not len(data):
                problems.append(f"{name}: empty; there is nothing to classify")
            elif len(data) < least_bytes:
                problems.append(f"{name}: {len(data)} bytes; this model needs at least {least_bytes} (model.mode)")
            else:
                yield Sample(name, data)


def batches_of(samples: Iterator[Sample], budget_bytes: int, least_bytes: int = 1) -> Iterator[list[Sample]]:
    """Samples in their order, in lists of at most `budget_bytes` (or of one larger sample); shorter ones than
    `least_bytes` count as so many."""
    return within_budget(((max(len(sample.data), least_bytes), sample) for sample in samples), budget_bytes)

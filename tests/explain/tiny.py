"""Models that learn in a second, and files whose class is written at a known place."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bfsys.batch import ByteBatch, Sample
from bfsys.explain.attribution import Classifier
from bfsys.model.byteformer import ByteFormer
from bfsys.model.sizes import architecture

BUDGET = 20_000


def trained(files: Sequence[np.ndarray], labels: Sequence[int], classes: int = 2, steps: int = 100) -> Classifier:
    torch.manual_seed(0)
    shape = architecture(
        "custom", dim=32, layers=2, heads=2, kernel=8, window=16, shift=8, max_tokens=128, merge_after=(0,)
    )
    network = ByteFormer(shape, classes, init="smooth")
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        chosen = rng.choice(len(files), 64, replace=False)
        batch = ByteBatch.from_samples([Sample("", files[i], labels[i]) for i in chosen])
        optimizer.zero_grad()
        F.cross_entropy(network(batch), batch.labels).backward()
        optimizer.step()
    return Classifier(network.eval().requires_grad_(False), BUDGET)


def png_file(pixels: np.ndarray, text: str) -> bytes:
    """Make a PNG from uint8 [height, width], without compression, with a tEXt chunk before the pixels."""
    info = PngInfo()
    info.add_text("Comment", text)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0, pnginfo=info)
    return file.getvalue()


def wav_file(samples: np.ndarray, comment: bytes) -> bytes:
    """Make a WAV from uint8 [n] at 8 kHz, with a LIST chunk before the samples."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)

    head = chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, 8000, 8000, 1, 8))
    notes = chunk(b"LIST", b"INFO" + chunk(b"ICMT", comment))
    return chunk(b"RIFF", b"WAVE" + head + notes + chunk(b"data", samples.tobytes()))


def write_split(root: Path, split: str, files: Sequence[bytes], labels: Sequence[int], classes: Sequence[str]) -> None:
    for i, (content, label) in enumerate(zip(files, labels, strict=True)):
        path = root / split / classes[label] / f"{i:03}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

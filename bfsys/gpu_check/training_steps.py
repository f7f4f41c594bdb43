"""A training step of bfsys, and of the published implementation, on the same files: for check-gpu and bench_step.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bfsys.batch import ByteBatch, Sample
from bfsys.config import Config, Data, Optim, Source, Train
from bfsys.model.byteformer import ByteFormer
from bfsys.model.published_form import PublishedForm, pad
from bfsys.model.sizes import Architecture
from bfsys.ranks import Ranks

WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Step:
    """One training step in three parts. A call runs all three."""

    forward: Callable[[], Tensor]
    """The loss."""
    backward: Callable[[Tensor], None]
    update: Callable[[], None]

    def __call__(self) -> None:
        self.backward(self.forward())
        self.update()


def random_files(lengths: Sequence[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, length, dtype=np.uint8) for length in lengths]


def published_step(
    files: list[np.ndarray], a: Architecture, classes: int, device: torch.device, bf16: bool, *, fused_attention: bool
) -> Step:
    """A step of the published implementation, padded. In bfloat16 it uses autocast, like the released code."""
    model = PublishedForm(a, classes, fused_attention).to(device)
    x, labels = pad(files, a).to(device), _labels_of(files, classes, device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, fused=True)

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return F.cross_entropy(model(x).float(), labels)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Step(forward, _backward, update)


def bfsys_step(
    files: list[np.ndarray],
    a: Architecture,
    classes: int,
    device: torch.device,
    bf16: bool,
    *,
    checkpointing: bool = False,
    compiled: bool = False,
) -> Step:
    """A step of bfsys' model with PyTorch's AdamW, without DeepSpeed. In bfloat16 it also keeps float32 weights."""
    model = ByteFormer(a, classes, activation_checkpointing=checkpointing, compiled=compiled).to(device)
    batch = ByteBatch.from_samples([Sample("", file) for file in files]).to(device)
    labels = _labels_of(files, classes, device)
    masters: list[Tensor] = list(model.parameters())
    if bf16:  # like DeepSpeed: the update uses float32 weights and gradients, and rounds the result to bfloat16
        masters = [p.detach().clone() for p in model.parameters()]
        model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(masters, weight_decay=WEIGHT_DECAY, fused=True)
    weights: list[Tensor] = list(model.parameters())

    def update() -> None:
        if bf16:
            gradients = [torch.empty_like(master) for master in masters]
            torch._foreach_copy_(gradients, [p.grad for p in weights if p.grad is not None])
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient
            model.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
        if bf16:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)

    return Step(lambda: F.cross_entropy(model(batch).float(), labels), _backward, update)


def engine_step(
    files: list[np.ndarray], a: Architecture, classes: int, device: torch.device, bf16: bool, *, micro_batches: int
) -> Step:
    """A step of bfsys through DeepSpeed at ZeRO 1: the same files in each of `micro_batches`, then an update.

    A process group of one rank must have been started.
    """
    from bfsys.engine import Engine

    model = ByteFormer(a, classes)
    config = Config(
        data=Data(sources=(Source("none"),), batch_samples=len(files) * micro_batches, lanes=micro_batches),
        optim=Optim(clip_norm=1.0),
        train=Train(precision="bf16" if bf16 else "fp32", zero_stage=1),
    )
    engine = Engine(model, config, Ranks(), micro_batches)
    batch = ByteBatch.from_samples([Sample("", file) for file in files]).to(device)
    labels = _labels_of(files, classes, device)

    def forward() -> Tensor:
        return F.cross_entropy(engine.forward(batch).float(), labels, reduction="sum")

    def backward(loss: Tensor) -> None:
        engine.backward(loss)
        for _ in range(micro_batches - 1):
            engine.backward(forward())

    def update() -> None:
        engine.step(1e-3, 0.999)

    return Step(forward, backward, update)


def _backward(loss: Tensor) -> None:
    loss.backward()


def _labels_of(files: list[np.ndarray], classes: int, device: torch.device) -> Tensor:
    return torch.arange(len(files), device=device) % classes

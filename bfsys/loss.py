"""Cross entropy as sums, and the scores that are computed from them.

Sums make the mean over the global batch exact for any division of the samples among ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bfsys.batch import ByteBatch
from bfsys.config import Config

LOSS, TOP1, TOP5, SAMPLES, CONTENT = range(5)  # columns of the sums
COLUMNS = 5


def training_loss(
    outputs: Tensor | tuple[Tensor, Tensor], batch: ByteBatch, num_sources: int, config: Config
) -> tuple[Tensor, Tensor]:
    """The training loss of a micro-batch, a sum over its files, and the sums per source, from the model's outputs."""
    logits, errors = outputs if isinstance(outputs, tuple) else (outputs, None)
    loss, sums = loss_and_sums(logits, batch, num_sources, config.optim.label_smoothing, errors)
    return (loss if errors is None else loss + config.content_weight * errors.sum()), sums


def loss_and_sums(
    logits: Tensor,
    batch: ByteBatch,
    num_sources: int,
    label_smoothing: float = 0.0,
    content_errors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of a micro-batch, and the sums per source.

    logits [B, classes] -> (scalar with gradient, float64 [sources, COLUMNS] without). Losses are computed in at least
    float32, whatever the precision of the logits. `content_errors` [B] are only summed.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=label_smoothing)  # [B]
    if batch.second_labels is not None:  # cross entropy is linear in the target, so mixed targets mix losses
        assert batch.second_share is not None  # both are set or neither
        second = F.cross_entropy(logits, batch.second_labels, reduction="none", label_smoothing=label_smoothing)
        losses = torch.lerp(losses, second, batch.second_share.to(losses.dtype))
    with torch.no_grad():
        content = torch.zeros_like(losses) if content_errors is None else content_errors
        label_logit = logits.gather(1, batch.labels[:, None])
        # A label is among the top k if fewer than k classes precede it, with a higher score, or with the same score and
        # a lower number (ties are frequent in bfloat16). NaN counts as wrong.
        lower = torch.arange(logits.shape[1], device=logits.device) < batch.labels[:, None]
        before = (logits > label_logit) | ((logits == label_logit) & lower)
        rank = before.sum(1).masked_fill(label_logit[:, 0].isnan(), 5)
        columns = torch.stack([losses.detach().double(), (rank < 1).double(), (rank < 5).double(),
                               torch.ones_like(losses, dtype=torch.float64), content.double()], dim=1)  # fmt: skip
        # Not index_add_, whose order is not fixed on GPUs: equal runs must log equal figures.
        of_source = batch.sources == torch.arange(num_sources, device=logits.device)[:, None]  # [sources, B]
        sums = torch.where(of_source[:, :, None], columns, 0.0).sum(1)
    return losses.sum(), sums


def scores(sums: Tensor, source_names: tuple[str, ...]) -> dict:
    """Loss, top-1 and top-5 jointly and per source, from float64 [sources, COLUMNS] sums."""

    def means(row: Tensor) -> dict:
        n = float(row[SAMPLES])
        return {
            "loss": float(row[LOSS]) / n,
            "top1": float(row[TOP1]) / n,
            "top5": float(row[TOP5]) / n,
            "samples": int(n),
        }

    per_source = {name: means(row) for name, row in zip(source_names, sums, strict=True) if row[SAMPLES] > 0}
    return {**means(sums.sum(0)), "sources": per_source}


def describe_scores(result: dict) -> str:
    """loss 0.123 · top-1 95.1 % (image 97.0, speech 93.1)"""
    per_source = ", ".join(f"{name} {100 * s['top1']:.1f}" for name, s in result["sources"].items())
    only = len(result["sources"]) < 2
    return f"loss {result['loss']:.3f} · top-1 {100 * result['top1']:.1f} %" + ("" if only else f" ({per_source})")

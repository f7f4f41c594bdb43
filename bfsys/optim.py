"""AdamW with an averaged copy of the weights, its parameter groups and its learning rate.

The average (EMA) is a state of the optimizer beside its two moments, so that ZeRO shards it, and a checkpoint
saves and restores it, exactly as it does the moments. Refused: a second model on every rank, which ZeRO would
not shard and which would average bfloat16 copies instead of the float32 weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bfsys.config import Optim

MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"


def learning_rate(step: int, steps: int, optim: Optim) -> float:
    """Learning rate of the step that is the `step`-th (from 0) of `steps`.

    A line from warmup_lr to lr over warmup_steps, then half a cosine down to final_lr. (The published code
    moves the cosine once per epoch; per step is its limit.)
    """
    if step < optim.warmup_steps:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, steps - 1 - optim.warmup_steps)
    return optim.final_lr + (optim.lr - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def ema_decay(step: int, optim: Optim) -> float:
    """Decay of the average at the `step`-th step (from 0).

    min(decay, (1 + t) / (10 + t)): the initial weights are forgotten within a run of any length. (Published: the
    constant decay from the first step, which makes no difference to runs much longer than 1 / (1 - decay).)
    """
    return min(optim.ema_decay, (1 + step) / (10 + step))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on parameters of two or more dimensions only, as published (positions included)."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW that also keeps `state[p]["ema"]`, the exponential moving average of p."""

    def __init__(self, groups: Iterable[dict], optim: Optim) -> None:
        self.keeps_average = optim.ema_decay > 0
        betas = (optim.beta1, optim.beta2)
        super().__init__(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
        self.prepare(optim.lr, optim.ema_decay)

    def prepare(self, learning_rate: float, ema_decay: float, skips: bool = False) -> None:
        """Set what changes from step to step. `skips`: the next step changes nothing."""
        self.skips = skips
        for group in self.param_groups:
            group["lr"], group["ema_decay"] = learning_rate, ema_decay

    @property
    def state_names(self) -> tuple[str, ...]:
        return (*MOMENTS, EMA) if self.keeps_average else MOMENTS

    def init_state(self, parameters: Iterable[Tensor]) -> None:
        """Make the state of step 0 now rather than in the first step, so that a checkpoint can fill it."""
        for p in parameters:
            self.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                **{name: torch.zeros_like(p, requires_grad=False) for name in MOMENTS},
            }
            if self.keeps_average:
                self.state[p][EMA] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure=None):
        if self.skips:
            return None
        result = super().step(closure)
        if self.keeps_average:
            for group in self.param_groups:
                moved = [p for p in group["params"] if p.grad is not None]
                if moved:
                    torch._foreach_lerp_([self.state[p][EMA] for p in moved], moved, 1 - group["ema_decay"])
        return result

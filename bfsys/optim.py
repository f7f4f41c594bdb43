"""AdamW, or Muon for matrices and AdamW for the rest; an averaged copy of the weights; the learning rate schedule.

The average (EMA) is a state of the optimizer, like its moments, so ZeRO shards it, and checkpoints save it. Rejected
alternative: a second model on every rank, which ZeRO would not shard and which would average bfloat16 copies instead of
the float32 weights.

Muon replaces the running mean of a matrix's gradients by the nearest matrix with orthonormal rows or columns, so that
all directions of a layer are learned at the same rate. It keeps one moment where AdamW keeps two. muon.py computes this
for matrices that ZeRO has divided.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bfsys import dist
from bfsys.config import Optim
from bfsys.model.byteformer import ByteFormer
from bfsys.muon import Orthogonaliser, Span, Stack, step_scale

MOMENTS = ("exp_avg", "exp_avg_sq")  # names of AdamW's states
MOMENTUM = "momentum_buffer"  # name of Muon's state
EMA = "ema"


def learning_rate(step: int, steps: int, optim: Optim) -> float:
    """Learning rate of the `step`-th (from 0) of `steps` steps.

    It rises linearly from warmup_lr to lr over warmup_steps, then falls to final_lr as half a cosine. (The published
    code updates the cosine once per epoch.)
    """
    if step < optim.warmup_steps:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, steps - 1 - optim.warmup_steps)
    return optim.final_lr + (optim.lr - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def ema_decay(step: int, optim: Optim) -> float:
    """Decay of the average at the `step`-th step (from 0).

    It is min(decay, (1 + t) / (10 + t)), so that the initial weights lose their influence in a run of any length. The
    published code uses the constant decay, which this one reaches after about 9 / (1 - decay) steps: 90,000 for 0.9999.
    """
    return min(optim.ema_decay, (1 + step) / (10 + step))


def parameter_groups(model: ByteFormer, optim: Optim) -> list[dict]:
    """Groups of parameters with the same settings. Parameters with two or more dimensions, including positions, have
    weight decay, as published."""
    stacks = model.stacks() if optim.name == "muon" else {}
    matrices = [p for name, p in model.named_parameters() if name in stacks]
    rest = [p for name, p in model.named_parameters() if name not in stacks]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": optim.weight_decay, "is_muon": False},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "is_muon": False},
    ]
    if matrices:
        groups.append({"params": matrices, "weight_decay": optim.weight_decay, "is_muon": True})
    return groups


@dataclass(frozen=True)
class Held:
    """A span of a parameter that this rank updates. It is at `offset` in `tensor`, a tensor of the optimizer."""

    span: Span
    tensor: Tensor
    offset: int

    @property
    def place(self) -> slice:
        """The position of the span in the flattened tensor."""
        return slice(self.offset, self.offset + self.span.end - self.span.first)

    def of(self, tensor: Tensor) -> Tensor:
        """A view of the span in a tensor with the layout of `tensor`: the weights, a moment or a gradient."""
        return tensor.detach().view(-1)[self.place]


class Optimizer(torch.optim.AdamW):
    """torch.optim.AdamW, and Muon for groups with `is_muon`.

    Besides the moments, `state[p]["ema"]` is the exponential moving average of p.
    """

    def __init__(self, model: ByteFormer, optim: Optim) -> None:
        self.keeps_average = optim.ema_decay > 0
        self.stacks = {n: Stack(*shape) for n, shape in model.stacks().items()} if optim.name == "muon" else {}
        self.scales = {name: step_scale(model.get_parameter(name).shape) for name in self.stacks}
        self.momentum, self.relative_rate = optim.muon_momentum, optim.muon_lr / optim.lr
        self.held: list[Held] = []
        self._orthogonalisers: dict[Tensor, tuple[list[Held], Orthogonaliser]] = {}
        groups, betas = parameter_groups(model, optim), (optim.beta1, optim.beta2)
        super().__init__(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
        self.prepare(optim.lr, optim.ema_decay)

    def prepare(self, learning_rate: float, ema_decay: float, skips: Callable[[], bool] = lambda: False) -> None:
        """Set the values of the next step. `skips` is called once, when the gradients are there, and returns whether
        the step changes nothing."""
        self._skips = functools.cache(skips)
        for group in self.param_groups:
            group["lr"] = learning_rate * (self.relative_rate if group["is_muon"] else 1)
            group["ema_decay"] = ema_decay

    @property
    def state_names(self) -> tuple[str, ...]:
        names = (*MOMENTS, MOMENTUM) if self.stacks else MOMENTS
        return (*names, EMA) if self.keeps_average else names

    def has_state(self, parameter: str, state: str) -> bool:
        """Whether the parameter has this state."""
        return state == EMA or (state == MOMENTUM) == (parameter in self.stacks)

    def init_state(
        self,
        together: Sequence[tuple[bool, list[Tensor]]],
        held: list[Held],
        ranks: dist.Ranks,
        products: torch.dtype,
    ) -> None:
        """Create the state of step 0 before the first step, so that a checkpoint can be loaded into it; collective.

        `together` are the tensors that one call of `step` updates, and whether Muon does, in the same order on all
        ranks. `held` gives the positions of parameters in them. Muon's products are computed in the dtype `products`.
        """
        self.held = held
        for is_muon, tensors in together:
            for p in tensors:
                names = (MOMENTUM,) if is_muon else MOMENTS
                self.state[p] = {name: torch.zeros_like(p, requires_grad=False) for name in names}
                if not is_muon:
                    self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                if self.keeps_average:
                    self.state[p][EMA] = p.detach().clone()
            if is_muon:
                mine = [part for part in held if any(part.tensor is p for p in tensors)]
                spans = [part.span for part in mine]
                self._orthogonalisers[tensors[0]] = mine, Orthogonaliser(self.stacks, spans, ranks, products)

    @torch.no_grad()
    def step(self, closure=None):
        """Update the groups that DeepSpeed has put into `param_groups`; collective if one of them uses Muon."""
        if self._skips():
            return None
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["is_muon"]]
        result = super().step(closure)
        self.param_groups = groups
        for group in groups:
            if group["is_muon"] and group["params"]:
                self._update_matrices(group)
            if self.keeps_average:
                moved = [p for p in group["params"] if p.grad is not None]
                if moved:
                    torch._foreach_lerp_([self.state[p][EMA] for p in moved], moved, 1 - group["ema_decay"])
        return result

    def _update_matrices(self, group: dict) -> None:
        """Update with the orthogonalised Nesterov momentum and decoupled weight decay."""
        tensors, rate = group["params"], group["lr"]
        gradients, momenta = [p.grad for p in tensors], [self.state[p][MOMENTUM] for p in tensors]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        torch._foreach_lerp_(gradients, momenta, self.momentum)
        torch._foreach_mul_(tensors, 1 - rate * group["weight_decay"])
        mine, orthogonalise = self._orthogonalisers[tensors[0]]
        flat = {p: (p.view(-1), gradient.view(-1)) for p, gradient in zip(tensors, gradients, strict=True)}
        weights, steps = ([flat[part.tensor][i][part.place] for part in mine] for i in (0, 1))
        directions = orthogonalise(steps)
        if mine:  # into the gradients' memory, since foreach operations on a GPU are fast only for one dtype
            torch._foreach_copy_(steps, directions)
        by_scale: dict[float, list[list[Tensor]]] = defaultdict(list)
        for part, *pair in zip(mine, weights, steps, strict=True):
            by_scale[self.scales[part.span.name]].append(pair)
        for scale, pairs in by_scale.items():
            torch._foreach_add_(*zip(*pairs, strict=True), alpha=-rate * scale)

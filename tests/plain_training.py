"""Training in plain PyTorch, against which runs of several ranks are held."""

from __future__ import annotations

import torch
from torch import Tensor

from bfsys.config import Config, Optim
from bfsys.data.streaming.datasets import make_plan, open_training
from bfsys.data.streaming.loader import training_batches
from bfsys.dist import Ranks
from bfsys.loss import LOSS, training_loss
from bfsys.model.byteformer import ByteFormer
from bfsys.optim import learning_rate

ALONE = Ranks()


class PlainMuon(torch.optim.Optimizer):
    """Muon as its authors describe it, for one matrix after the other."""

    @staticmethod
    def matrices_of(model: ByteFormer) -> list[torch.nn.Parameter]:
        blocks = [p for b in model.blocks for p in (b.qkv.weight, b.proj.weight, b.fc1.weight, b.fc2.weight)]
        return [*blocks, *(merge.reduction.weight for merge in model.merges.values()), model.stem.kernel]

    def __init__(self, matrices: list[torch.nn.Parameter], optim: Optim) -> None:
        self.optim = optim
        super().__init__(matrices, {"lr": optim.muon_lr, "initial": optim.muon_lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        for p in group["params"]:
            buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
            buffer.mul_(self.optim.muon_momentum).add_(p.grad, alpha=1 - self.optim.muon_momentum)
            update = (1 - self.optim.muon_momentum) * p.grad + self.optim.muon_momentum * buffer
            flat = update.flatten(1)
            parts = flat.chunk(3) if flat.shape[0] == 3 * flat.shape[1] else [flat]
            direction = torch.cat([self.orthogonalised(part) for part in parts])
            scale = max(1, flat.shape[0] / flat.shape[1]) ** 0.5
            p.mul_(1 - group["lr"] * self.optim.weight_decay)
            p.sub_(group["lr"] * scale * direction.view(p.shape))

    @staticmethod
    def orthogonalised(matrix: Tensor) -> Tensor:
        x = matrix / (matrix.norm() + 1e-7)
        for _ in range(5):
            if matrix.shape[0] <= matrix.shape[1]:
                a = x @ x.T
                x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
            else:
                a = x.T @ x
                x = 3.4445 * x + x @ (-4.775 * a + 2.0315 * a @ a)
        return x


def train_plainly(config: Config) -> tuple[list[float], list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Train without DeepSpeed, lanes or ranks. Returns losses, gradient norms, weights and their average."""
    sources = open_training(config)
    batches = training_batches(config, sources, make_plan(config, sources), ALONE, first_step=0)
    torch.manual_seed(config.train.seed)
    with_content = config.content_weight > 0
    model = ByteFormer(
        config.model.architecture(), len(sources.classes), init=config.model.init, with_content=with_content
    )
    by_muon = PlainMuon.matrices_of(model) if config.optim.name == "muon" else []
    rest = [p for p in model.parameters() if not any(p is q for q in by_muon)]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.optim.beta1, config.optim.beta2)
    optimizers = [torch.optim.AdamW(groups, lr=config.optim.lr, betas=betas, eps=config.optim.eps)]
    if by_muon:
        optimizers.append(PlainMuon(by_muon, config.optim))
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    all_losses, norms = [], []
    for step in range(config.train.steps):
        total = 0.0
        for _ in range(config.data.lanes):
            loss, sums = training_loss(model(batch := next(batches)), batch, 2, config)
            (loss / config.data.batch_samples).backward()
            total += sums[:, LOSS].sum().item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)))
        rate = learning_rate(step, config.train.steps, config.optim)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["initial"] / config.optim.lr if "initial" in group else rate
            optimizer.step()
            optimizer.zero_grad()
        for n, p in model.named_parameters():
            decay = min(config.optim.ema_decay, (1 + step) / (10 + step))
            average[n] = decay * average[n] + (1 - decay) * p.detach()
        all_losses.append(total / config.data.batch_samples)
    return all_losses, norms, {n: p.detach() for n, p in model.named_parameters()}, average

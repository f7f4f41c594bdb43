"""Compare the losses of bfsys and of the published implementation, trained from the same weights on the same batches.

    python tools/bench/compare_training.py configs/small.yaml recipe=published data.sources.0.path=data/shards/digits

bfsys trains in a separate process, in float32, and is stopped after the given number of steps. The published
implementation (published_form.py: padded batches, masks, embedding and convolution, whole score matrices) is trained by
a minimal loop with torch.optim.AdamW. The exit code is 1 if a loss differs by more than --tolerance.

With --control, the published implementation is also compared with itself, from weights that differ in their last bit.
Training amplifies rounding errors, so this difference is the smallest that can be expected of bfsys.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from bfsys.start import let_signals_end_the_process

    let_signals_end_the_process()

import torch
import torch.nn.functional as F
from torch import Tensor

from bfsys.batch import ByteBatch
from bfsys.commands.arguments import add_config
from bfsys.config import Config, load_config
from bfsys.data.streaming.datasets import long_files, make_plan, open_training
from bfsys.data.streaming.loader import training_batches
from bfsys.dist import Ranks
from bfsys.errors import UserError, run_command, summary_of
from bfsys.model.byteformer import ByteFormer
from bfsys.model.published_form import PublishedForm, load_bfsys_weights, pad
from bfsys.optim import learning_rate

ROOT = Path(__file__).resolve().parents[2]
SHOWN = 10  # lines


def bfsys_losses(config: str | Path, overrides: Sequence[str], folder: Path, steps: int) -> list[float]:
    """The losses of the first steps of a run in `folder`."""
    changes = [*overrides, f"runs_dir={folder}", "name=compared", "train.log_every=1", "train.precision=fp32"]
    command = [sys.executable, ROOT / "bfsys" / "train.py", config, *changes]
    metrics = folder / "compared" / "metrics.jsonl"
    with open(folder / "errors", "w+") as errors, subprocess.Popen(command, stdout=errors, stderr=errors) as process:
        try:
            while process.poll() is None and max(losses_in(metrics), default=0) < steps:
                time.sleep(0.2)
        finally:
            process.terminate()
        process.wait()
        losses = losses_in(metrics)
        if max(losses, default=0) < steps:
            errors.seek(0)
            raise UserError(f"training failed with code {process.returncode}", *errors.read().splitlines()[-20:])
    return [losses.get(step, math.nan) for step in range(1, steps + 1)]


def losses_in(metrics: Path) -> dict[int, float]:
    """The losses by step. A step whose update was skipped has none."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if line["kind"] == "train"}


def published_losses(config: Config, *, nudged: bool = False) -> Iterator[float]:
    """Yield the loss of every step, from the initial weights of this config. `nudged` changes their last bit."""
    sources, optim = open_training(config), config.optim
    plan = make_plan(config, sources)
    if notes := long_files(config, sources):  # the published model has no position for more tokens
        raise UserError(*notes)
    torch.manual_seed(config.train.seed)
    architecture, num_classes = config.model.architecture(), len(sources.classes)
    initial = ByteFormer(architecture, num_classes, init=config.model.init).state_dict()
    if nudged:
        initial = {name: weight * (1 + torch.finfo(weight.dtype).eps) for name, weight in initial.items()}
    model = PublishedForm(architecture, num_classes)
    load_bfsys_weights(model, initial)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
    batches = training_batches(config, sources, plan, Ranks(), first_step=0)
    for step in range(config.train.steps):
        lanes = list(islice(batches, config.data.lanes))
        targets = torch.cat([targets_of(batch, num_classes) for batch in lanes])
        logits = model(pad([content for batch in lanes for content in batch.files()], architecture))
        loss = F.cross_entropy(logits, targets, label_smoothing=optim.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train.steps, optim)
        optimizer.step()
        yield loss.item()


def targets_of(batch: ByteBatch, num_classes: int) -> Tensor:
    """Return float32 [B, classes]. A mixture of two sounds has both classes, weighted by their shares."""
    targets = F.one_hot(batch.labels, num_classes).float()
    if batch.second_labels is None:
        return targets
    assert batch.second_share is not None  # both are set together
    return torch.lerp(targets, F.one_hot(batch.second_labels, num_classes).float(), batch.second_share.float()[:, None])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=summary_of(__doc__))
    add_config(parser)
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="steps to compare (default 200)")
    parser.add_argument("--tolerance", type=float, default=1e-4, metavar="X", help="relative (default 1e-4)")
    parser.add_argument("--control", action="store_true", help="compare the published implementation with itself, too")
    args = parser.parse_intermixed_args(arguments)
    config = load_config(args.config, args.overrides)
    if config.train.init_from:
        raise UserError("train.init_from: both forms start from fresh weights here; leave it out")
    if config.optim.name != "adamw":
        raise UserError("optim.name: got muon; the published implementation is trained by AdamW: add recipe=published")
    if config.model.pool != "mean":
        raise UserError(
            "model.pool: got attention; the published implementation takes the mean of the tokens: add model.pool=mean"
        )
    if config.content_weight:
        raise UserError(
            f"optim.content_loss: got {config.content_weight:g}; the published implementation has none: "
            "add optim.content_loss=0"
        )
    if not 1 <= args.steps <= config.train.steps:
        raise UserError(f"--steps: got {args.steps}, the run has train.steps {config.train.steps}")
    with tempfile.TemporaryDirectory() as folder:
        ours = bfsys_losses(args.config, args.overrides, Path(folder), args.steps)
    theirs = list(islice(published_losses(config), args.steps))
    control = list(islice(published_losses(config, nudged=True), args.steps)) if args.control else []
    relative = relative_differences(ours, theirs)
    of_control = relative_differences(control, theirs) if control else []
    print(f"{'step':>6}{'bfsys':>14}{'published':>14}{'difference':>14}" + f"{'control':>14}" * bool(control))
    every = max(1, args.steps // SHOWN)
    for step in sorted({0, *range(every - 1, args.steps, every), args.steps - 1}):
        line = f"{step + 1:>6}{ours[step]:14.8f}{theirs[step]:14.8f}{relative[step]:14.1e}"
        print(line + (f"{of_control[step]:14.1e}" if control else ""))
    print(f"largest relative difference of {args.steps} steps: {max(relative):.1e}; allowed {args.tolerance:.0e}")
    if control:
        print(f"largest of the control: {max(of_control):.1e}")
    return 0 if all(difference <= args.tolerance for difference in relative) else 1  # false for NaN


def relative_differences(losses: Sequence[float], others: Sequence[float]) -> list[float]:
    return [abs(one - other) / other for one, other in zip(losses, others, strict=True)]


if __name__ == "__main__":
    run_command(main)

"""Does bfsys learn as the published form does? Both trained from the same weights on the same batches, loss by loss.

    python tools/compare_training.py configs/small.yaml data.sources.0.path=data/shards/digits --steps 200

bfsys trains as ever, in a process of its own, in float32. The published form (published_form.py: padded batches, masks,
embedding and convolution, whole score matrices) is trained by the plainest loop there is with torch.optim.AdamW. Exit
code 1 if a loss differs by more than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
import torch.nn.functional as F

from bfsys.batch import ByteBatch
from bfsys.config import Config, load_config
from bfsys.data.datasets import long_files, make_plan, open_training
from bfsys.data.loader import training_batches
from bfsys.dist import Ranks
from bfsys.errors import UserError, run_command
from bfsys.model.byteformer import ByteFormer
from bfsys.optim import learning_rate
from tools.published_form import PublishedForm, load_bfsys_weights, pad

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 10  # lines


def bfsys_losses(config: str | Path, overrides: Sequence[str], folder: Path) -> list[float]:
    """Of every step of a run in `folder`."""
    changes = [*overrides, f"runs_dir={folder}", "name=compared", "train.log_every=1", "train.precision=fp32"]
    command = [sys.executable, ROOT / "bfsys" / "train.py", config, *changes]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"training failed with code {result.returncode}", *result.stderr.splitlines()[-20:])
    lines = map(json.loads, (folder / "compared" / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def published_losses(config: Config) -> Iterator[float]:
    """Of every step, from the weights that a run of this config starts with."""
    sources, optim = open_training(config), config.optim
    plan = make_plan(config, sources)
    if notes := long_files(config, sources):  # beyond its positions the published form computes nothing
        raise UserError(*notes)
    torch.manual_seed(config.train.seed)
    architecture, num_classes = config.model.architecture(), len(sources.classes)
    initial = ByteFormer(architecture, num_classes).state_dict()
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
        labels = torch.cat([batch.labels for batch in lanes])
        logits = model(pad([content for batch in lanes for content in files_of(batch)], architecture))
        loss = F.cross_entropy(logits, labels, label_smoothing=optim.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train.steps, optim)
        optimizer.step()
        yield loss.item()


def files_of(batch: ByteBatch) -> list[np.ndarray]:
    return np.split(batch.data.numpy(), batch.offsets[1:-1].numpy())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="steps to compare (default 200)")
    parser.add_argument("--tolerance", type=float, default=1e-4, metavar="X", help="relative (default 1e-4)")
    args = parser.parse_intermixed_args(arguments)
    config = load_config(args.config, args.overrides)
    if args.steps > config.train.steps:
        raise UserError(f"--steps: got {args.steps}, the run has train.steps {config.train.steps}")
    overrides = [*args.overrides, f"train.steps={args.steps}"]
    if config.optim.warmup_steps > args.steps:
        overrides.append(f"optim.warmup_steps={args.steps}")
    config = load_config(args.config, overrides)
    config = replace(config, train=replace(config.train, precision="fp32"))
    with tempfile.TemporaryDirectory() as folder:
        ours = bfsys_losses(args.config, overrides, Path(folder))
    theirs = list(published_losses(config))
    relative = [abs(one - other) / other for one, other in zip(ours, theirs, strict=True)]
    print(f"{'step':>6}{'bfsys':>14}{'published':>14}{'difference':>14}")
    for step in sorted({0, *range(args.steps // SHOWN - 1, args.steps, max(1, args.steps // SHOWN)), args.steps - 1}):
        print(f"{step + 1:>6}{ours[step]:14.8f}{theirs[step]:14.8f}{relative[step]:14.1e}")
    print(f"largest relative difference of {args.steps} steps: {max(relative):.1e}; allowed {args.tolerance:.0e}")
    return 0 if max(relative) <= args.tolerance else 1


if __name__ == "__main__":
    run_command(main)

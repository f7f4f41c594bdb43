"""Evaluation: loss, top-1 and top-5 over all files of some datasets, each file once, jointly and per source."""

from __future__ import annotations

if __name__ == "__main__":  # `python -m bfsys.evaluate`
    from bfsys.start import main

    main("evaluate", "python -m bfsys.evaluate")

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bfsys import dist
from bfsys.batch import ByteBatch
from bfsys.config import Config, Source
from bfsys.confusion import Answers
from bfsys.data.storage.description import seen_from
from bfsys.data.streaming.datasets import Sources
from bfsys.data.streaming.loader import evaluation_rounds
from bfsys.data.streaming.quarantine import Quarantine
from bfsys.errors import UserError
from bfsys.locations import is_remote
from bfsys.loss import COLUMNS, SAMPLES, loss_and_sums, scores

MOST_CLASSES_SCORED = 1000  # with more, there are no scores per class, which are in one line of metrics.jsonl
# Damage of files: changed bytes, a missing end or a missing start
DAMAGE = ("flip:0.0001", "flip:0.001", "flip:0.01", "flip:0.1", "truncate:0.9", "truncate:0.5", "skip:16", "skip:256")


@torch.no_grad()
def evaluate(
    forward: Callable[[ByteBatch], Tensor],
    config: Config,
    sources: Sources,
    ranks: dist.Ranks,
    quarantine: Quarantine,
    step: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    answers: Answers | None = None,
) -> dict:
    """The result of `scores` over all ranks; collective. The model of `forward` must be in eval mode.

    Files that cannot be read are left out, and recorded in `quarantine` as found at `step`. If `answers` is given, the
    answers of this rank are added to it. The result then also has `classes`: by name, the number of files of a class
    and their top-1.
    """
    sums = torch.zeros(len(sources.splits), COLUMNS, dtype=torch.float64)
    total = sum(len(split) for split in sources.splits)
    for batch, counts in evaluation_rounds(config, sources, ranks, quarantine, step):
        batch = batch.to(ranks.device)
        logits = forward(batch)
        _, batch_sums = loss_and_sums(logits, batch, len(sources.splits))
        if counts:
            sums += batch_sums.cpu()
        if counts and answers:
            answers.add(batch, logits)
        progress(int(sums[:, SAMPLES].sum()) * ranks.world_size, total)
    dist.sum_over_ranks(sums)
    if not sums[:, SAMPLES].any():
        quarantine.share(ranks, sources.sizes, config.data.max_bad_share)  # raises if too many are bad
        raise dist.AgreedError(f"no file of {', '.join(s.dataset.shown for s in sources.splits)} can be read")
    result = scores(sums, sources.names)
    if answers and answers.num_classes <= MOST_CLASSES_SCORED:
        totals = torch.from_numpy(answers.totals())
        dist.sum_over_ranks(totals)
        rows = zip(sources.classes, *totals.tolist(), strict=True)
        result["classes"] = {name: {"samples": int(n), "top1": right / n} for name, n, right in rows if n}
    return result


def with_datasets(config: Config, datasets: Sequence[str], run: Path) -> Config:
    """The config with `datasets`, if there are any, as its sources."""
    if not datasets and not config.data.sources:
        raise UserError(f"{run}: imported weights, which come without data; give a packed dataset with --data DATASET")
    if not datasets:
        paths = [source.eval_path or source.path for source in config.data.sources]
        if missing := [path for path in paths if not is_remote(path) and not os.path.isdir(path)]:
            raise UserError(
                *(f"{path}: there is no such folder{seen_from(Path(path))}" for path in missing),
                "if the run or its datasets were moved, give the folder of each of its datasets with --data DATASET",
            )
        return config
    if twice := [path for number, path in enumerate(datasets) if path in datasets[:number]]:
        raise UserError(f"--data {twice[0]}: given twice; its files would count twice")
    return replace(config, data=replace(config.data, sources=tuple(Source(path) for path in datasets)))

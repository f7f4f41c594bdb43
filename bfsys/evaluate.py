"""Loss, top-1 and top-5 over a whole split, each file once, jointly and per source.

    python -m bfsys.evaluate RUN [--split val] [--data DATASET]… [--report FOLDER] [--robustness] [--json]

Needs no DeepSpeed. RUN is a run directory (its newest whole checkpoint counts) or one checkpoint. Other datasets than
the run's may be given, and must be for imported weights, which come with none. With --report: accuracy by class and
the confusion matrix (report.py). With --robustness: the same scores for damaged files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bfsys import dist
from bfsys.batch import ByteBatch
from bfsys.checkpoint.loading import load_model
from bfsys.config import Config, Source
from bfsys.confusion import Report
from bfsys.data.streaming.byte_transforms import parse_transforms, with_key
from bfsys.data.streaming.datasets import Sources, check_transforms, index_problems, open_evaluation
from bfsys.data.streaming.loader import evaluation_rounds
from bfsys.data.streaming.quarantine import Quarantine
from bfsys.data.streaming.run_data import short_files
from bfsys.errors import UserError, run_command, summary_of
from bfsys.loss import COLUMNS, SAMPLES, loss_and_sums
from bfsys.metrics import describe_scores, scores

# What befalls files: bytes change, the end or the start is missing
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
    report: Report | None = None,
) -> dict:
    """Scores as `metrics.scores` gives them, over all ranks; collective. `forward` must be in eval mode.

    Files that cannot be read are left out, and told to `quarantine` as found at `step`. `report` is told this rank's
    answers.
    """
    sums = torch.zeros(len(sources.splits), COLUMNS, dtype=torch.float64)
    total = sum(len(split) for split in sources.splits)
    for batch, counts in evaluation_rounds(config, sources, ranks, quarantine, step):
        batch = batch.to(ranks.device)
        logits = forward(batch)
        _, batch_sums = loss_and_sums(logits, batch, len(sources.splits))
        if counts:
            sums += batch_sums.cpu()
        if counts and report:
            report.add(batch.labels, logits)
        progress(int(sums[:, SAMPLES].sum()) * ranks.world_size, total)
    dist.sum_over_ranks(sums)
    if not sums[:, SAMPLES].any():
        quarantine.share(ranks, sources.sizes, config.data.max_bad_share)  # says why, if too many are bad
        raise dist.AgreedError(f"not one file of {', '.join(s.dataset.location for s in sources.splits)} can be read")
    return scores(sums, sources.names)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bfsys.evaluate", description=summary_of(__doc__))
    add = parser.add_argument
    add("run", type=Path, help="run directory (runs/NAME) or one of its checkpoints")
    add("--split", help="split to evaluate (default: the config's data.eval_split)")
    datasets = "packed dataset, instead of the run's; repeatable"
    add("--data", action="append", default=[], metavar="DATASET", help=datasets)
    add("--weights", choices=("ema", "last"), default="ema", help="averaged weights, or the last")
    add("--permute", metavar="KEYFILE", help="where the key lies that the run was trained with")
    add("--report", type=Path, metavar="FOLDER", help="write accuracy by class and the confusion matrix")
    add("--robustness", action="store_true", help="evaluate damaged files too")
    add("--json", action="store_true", help="print the scores as JSON")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    model, config, manifest = load_model(args.run, average=args.weights == "ema")
    transforms = with_key(config.data.byte_transforms, args.permute)
    config = replace(config, data=replace(config.data, byte_transforms=transforms))
    config = with_datasets(config, args.data, args.run)
    ranks = dist.Ranks()
    split = args.split or config.data.eval_split
    sources = open_evaluation(config, split, manifest["classes"])
    if not sources.splits:
        raise UserError(f"no source of {args.run} has a split {split!r}; choose another with --split")
    check_transforms(sources.transforms, manifest)
    damaged = {
        damage: replace(sources, transforms=(*parse_transforms([damage]), *sources.transforms))
        for damage in (DAMAGE if args.robustness else ())
    }
    if problems := index_problems(sources, 0, 1) + short_files(config, sources):
        raise UserError(*problems)
    for damage in [damage for damage, files in damaged.items() if short_files(config, files)]:
        print(f"left out: {damage}, after which files are too short for this model", file=sys.stderr)
        del damaged[damage]
    bad_files, report = Quarantine(), Report(sources.classes, args.report) if args.report else None
    model.to(ranks.device)
    result = evaluate(model, config, sources, ranks, bad_files, manifest["step"], _show_progress, report)
    for bad in bad_files.share(ranks, sources.sizes, config.data.max_bad_share):
        print(f"left out: {bad.describe()}", file=sys.stderr)
    robustness = {
        damage: evaluate(model, config, files, ranks, Quarantine(), manifest["step"], _show_progress)
        for damage, files in damaged.items()
    }
    written = report.write() if report else []
    if args.json:
        more = {"robustness": robustness} if robustness else {}
        print(json.dumps({"run": str(args.run), "step": manifest["step"], **result, **more}, indent=1))
        return 0
    print(f"{args.run}, step {manifest['step']}, {result['samples']} files: {describe_scores(result)}")
    show_scores(result)
    if robustness:
        show_robustness({"as they are": result, **robustness})
    for line in written:
        print(line)
    return 0


def show_scores(result: dict) -> None:
    width = max(len(name) for name in ("all", *result["sources"]))
    for name, s in (("all", result), *result["sources"].items()):
        print(
            f"  {name:<{width}}  {s['samples']:>8} files   loss {s['loss']:.4f}   "
            f"top-1 {100 * s['top1']:6.2f} %   top-5 {100 * s['top5']:6.2f} %"
        )


def show_robustness(results: dict[str, dict]) -> None:
    names = list(next(iter(results.values()))["sources"])
    names = names if len(names) > 1 else []
    print("top-1 in percent, of files   " + "".join(f"{name:>14}" for name in ("all", *names)))
    for damage, result in results.items():
        values = [result, *(result["sources"][name] for name in names)]
        print(f"  {damage:<27}" + "".join(f"{100 * s['top1']:14.2f}" for s in values))


def with_datasets(config: Config, datasets: Sequence[str], run: Path) -> Config:
    """The config with these datasets for its sources, if there are any."""
    if not datasets and not config.data.sources:
        raise UserError(f"{run}: imported weights, which come without data; give a packed dataset with --data DATASET")
    if not datasets:
        return config
    return replace(config, data=replace(config.data, sources=tuple(Source(path) for path in datasets)))


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done >= total else ""
        print(f"\r{done:,} of {total:,} files", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)

"""Compute loss, top-1 and top-5 over a whole split, each file once, jointly and per source."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from bfsys.commands.arguments import add_precision, add_weights, local_path
from bfsys.errors import UserError, counted, one_line

NOTES = """\
For a run directory, the newest intact checkpoint is evaluated. Imported weights
have no data of their own, so they need --data."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s RUN [OPTION …]", NOTES
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory (runs/NAME) or one of its checkpoints")
    add("--split", help="split to evaluate (default: the config's data.eval_split)")
    datasets = "packed dataset, instead of the run's; repeatable"
    add("--data", action="append", default=[], metavar="DATASET", help=datasets)
    add_weights(parser)
    add_precision(parser)
    add("--permute", metavar="KEYFILE", help="path of the key file used in training")
    add("--report", type=local_path, metavar="FOLDER", help="write accuracy by class and the confusion matrix")
    add("--robustness", action="store_true", help="evaluate damaged files too")
    add("--json", action="store_true", help="print the scores as JSON")


def run(args: argparse.Namespace) -> int:
    from bfsys.checkpoint.loading import load_model
    from bfsys.confusion import Answers, Report
    from bfsys.data.streaming.byte_transforms import parse_transforms, with_key
    from bfsys.data.streaming.datasets import check_transforms, index_problems, no_such_split, open_evaluation
    from bfsys.data.streaming.quarantine import Quarantine
    from bfsys.data.streaming.run_data import short_files
    from bfsys.evaluate import DAMAGE, evaluate, with_datasets
    from bfsys.loss import describe_scores
    from bfsys.model.precision import set_precision
    from bfsys.ranks import Ranks

    model, config, manifest = load_model(args.run, average=args.weights == "ema")
    transforms = with_key(config.data.byte_transforms, args.permute)
    config = replace(config, data=replace(config.data, byte_transforms=transforms))
    config = with_datasets(config, args.data, args.run)
    ranks = Ranks()
    split = args.split or config.data.eval_split
    sources = open_evaluation(config, split, manifest["classes"])
    if not sources.splits:
        raise no_such_split(config, split)
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
    answers = Answers(len(sources.classes)) if report else None
    model.to(ranks.device)
    set_precision(model, args.precision)
    result = evaluate(model, config, sources, ranks, bad_files, manifest["step"], _show_progress, answers)
    for bad in bad_files.share(ranks, sources.sizes, config.data.max_bad_share):
        print(f"left out: {one_line(bad.describe())}", file=sys.stderr)
    robustness = {
        damage: evaluate(model, config, files, ranks, Quarantine(), manifest["step"], _show_progress)
        for damage, files in damaged.items()
    }
    try:
        written = report.write(answers) if report and answers else []
    finally:  # the scores are shown if the report cannot be written, too
        if args.json:
            more = {"robustness": robustness} if robustness else {}
            print(json.dumps({"run": str(args.run), "step": manifest["step"], **result, **more}, indent=1))
        else:
            files = counted(result["samples"], "file")
            print(one_line(f"{args.run}, step {manifest['step']}, {files}: {describe_scores(result)}"))
            show_scores(result, len(sources.classes))
            if robustness:
                show_robustness({"undamaged": result, **robustness})
    for line in written if not args.json else ():
        print(line)
    return 0


def show_scores(result: dict, classes: int) -> None:
    width = max(len(name) for name in ("all", *result["sources"]))
    for name, s in (("all", result), *result["sources"].items()):
        top5 = f"   top-5 {100 * s['top5']:6.2f} %" if classes > 5 else ""  # otherwise it is always 100 %
        print(
            f"  {name:<{width}}  {s['samples']:>8} files   loss {s['loss']:.4f}   top-1 {100 * s['top1']:6.2f} %{top5}"
        )


def show_robustness(results: dict[str, dict]) -> None:
    names = list(next(iter(results.values()))["sources"])
    names = names if len(names) > 1 else []
    print("top-1 in percent, of files   " + "".join(f"{name:>14}" for name in ("all", *names)))
    for damage, result in results.items():
        values = [result, *(result["sources"][name] for name in names)]
        print(f"  {damage:<27}" + "".join(f"{100 * s['top1']:14.2f}" for s in values))


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done >= total else ""
        print(f"\r{done:,} of {total:,} files", end=end, file=sys.stderr, flush=True)

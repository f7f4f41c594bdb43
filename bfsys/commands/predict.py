"""Classes of any files, from their bytes alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bfsys.commands.arguments import add_weights
from bfsys.errors import UserError

NOTES = """\
Files that cannot be classified are named at the end, with exit code 2.
data.byte_transforms of the run are applied here too, with the key of --permute;
with --transformed the sender of the files has done so, and no key is needed.
A model whose files were packed with --encoding, or augmented, wants files in
that encoding: `bfsys encode` makes them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s RUN FILE… [OPTION …]", NOTES
    add = parser.add_argument
    add("run", type=Path, help="run directory (runs/NAME) or one of its checkpoints")
    add("files", nargs="+", metavar="FILE", help="files, folders, or - for standard input")
    add("--top", type=int, default=3, metavar="K", help="classes to show per file")
    add_weights(parser)
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--permute", metavar="KEYFILE", help="where the key lies that the run was trained with")
    key.add_argument(
        "--transformed", action="store_true", help="the files went through the run's byte_transforms before"
    )
    add("--json", action="store_true", help='print [{"path", "top": [{"class", …}]}]')


def run(args: argparse.Namespace) -> int:
    if args.top < 1:
        raise UserError(f"--top: got {args.top}; at least 1 is needed")
    import torch

    from bfsys.checkpoint.loading import load_model
    from bfsys.data.streaming.byte_transforms import ByteTransform, parse_transforms, with_key
    from bfsys.data.streaming.datasets import check_transforms
    from bfsys.predict import batches_of, predict, read_files

    model, config, manifest = load_model(args.run, average=args.weights == "ema")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    classes = manifest["classes"]
    problems: list[str] = []
    answers = []
    transforms: tuple[ByteTransform, ...] = ()
    if not args.transformed:
        transforms = parse_transforms(with_key(config.data.byte_transforms, args.permute))
        check_transforms(transforms, manifest)
    elif not config.data.byte_transforms:
        raise UserError(f"--transformed: {args.run} was trained on files as they are; leave the option out")
    samples = read_files(args.files, problems, transforms, config.model.least_bytes)
    for batch in batches_of(samples, config.data.eval_batch_bytes, model.architecture.rounding_bytes):
        top = predict(model, batch).topk(min(args.top, len(classes)))
        for sample, values, indices in zip(batch, top.values.tolist(), top.indices.tolist(), strict=True):
            ranked = [{"class": classes[i], "index": i, "probability": p} for p, i in zip(values, indices, strict=True)]
            answers.append({"path": sample.key, "top": ranked})
            if not args.json:
                shown = "   ".join(f"{r['class']} {100 * r['probability']:.1f} %" for r in ranked)
                print(f"{sample.key}: {shown}", flush=True)
    if args.json:
        print(json.dumps(answers, indent=1))
    if problems:
        total = f"{len(problems):,} problems; {len(answers):,} files were classified"
        raise UserError(*problems, *([total] if len(problems) > 1 else []))
    return 0

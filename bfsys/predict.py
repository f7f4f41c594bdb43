"""Classes of any files, from their bytes alone.

    python -m bfsys.predict RUN FILE… [--top K] [--permute KEYFILE | --transformed] [--json]

FILE may be a file, a folder (all files in it) or - (standard input). Needs no DeepSpeed. Files that cannot be
classified are named at the end, after the others' answers, with exit code 2. What the run does to the bytes of every
file (data.byte_transforms) is done here too, with the key from --permute if it lies elsewhere than in training; with
--transformed it was done before, by whoever sent the files, and no key is needed here (docs/privacy.md). A model whose
files were packed with --encoding, or augmented, wants files in that encoding, such as tools/encode.py makes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from bfsys.batch import ByteBatch, Sample
from bfsys.checkpoint.loading import load_model
from bfsys.data.packing.listing import regular_files
from bfsys.data.streaming.byte_transforms import ByteTransform, apply, parse_transforms, with_key
from bfsys.data.streaming.datasets import check_transforms
from bfsys.data.streaming.plan import within_budget
from bfsys.errors import UserError, run_command, summary_of
from bfsys.model.byteformer import ByteFormer

STDIN = "-"


@torch.no_grad()
def predict(model: ByteFormer, samples: list[Sample]) -> torch.Tensor:
    """Probabilities [files, classes], float32 on the CPU; `model` must be in eval mode."""
    device = next(model.parameters()).device
    return model(ByteBatch.from_samples(samples).to(device)).float().softmax(1).cpu()


def read_files(
    paths: list[str],
    problems: list[str],
    transforms: Sequence[ByteTransform] = (),
    least_bytes: int = 1,
) -> Iterator[Sample]:
    """Files of `paths` one by one, transformed; what cannot be used is described in `problems`."""
    for path in paths:
        names = [path]
        if path != STDIN and os.path.isdir(path):
            names = regular_files(path, problems)
        for name in names:
            try:
                content = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
            except MemoryError:
                problems.append(f"{name}: memory does not suffice to read it")
                continue
            except OSError as error:
                problems.append(f"{name}: cannot be read: {error.strerror}")
                continue
            data = apply(transforms, np.frombuffer(content, np.uint8), np.random.default_rng(0))
            if not len(data):
                problems.append(f"{name}: empty; there is nothing to classify")
            elif len(data) < least_bytes:
                problems.append(f"{name}: {len(data)} bytes; this model needs at least {least_bytes} (model.mode)")
            else:
                yield Sample(name, data)


def batches_of(samples: Iterator[Sample], budget_bytes: int, least_bytes: int = 1) -> Iterator[list[Sample]]:
    """Samples in their order, in lists of at most `budget_bytes` (or of one larger sample); shorter ones than
    `least_bytes` count as so many."""
    return within_budget(((max(len(sample.data), least_bytes), sample) for sample in samples), budget_bytes)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bfsys.predict", description=summary_of(__doc__))
    parser.add_argument("run", type=Path, help="run directory (runs/NAME) or one of its checkpoints")
    parser.add_argument("files", nargs="+", metavar="FILE", help="files, folders, or - for standard input")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="classes to show per file")
    parser.add_argument("--weights", choices=("ema", "last"), default="ema", help="averaged weights, or the last")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--permute", metavar="KEYFILE", help="where the key lies that the run was trained with")
    key.add_argument(
        "--transformed", action="store_true", help="the files went through the run's byte_transforms before"
    )
    parser.add_argument("--json", action="store_true", help='print [{"path", "top": [{"class", …}]}]')
    args = parser.parse_args()
    if args.top < 1:
        raise UserError(f"--top: got {args.top}; at least 1 is needed")

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


if __name__ == "__main__":
    run_command(main)

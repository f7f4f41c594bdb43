"""Write a trained model for use elsewhere: its weights, and programs that run without bfsys."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from bfsys.commands.arguments import add_weights, local_path
from bfsys.errors import UserError, one_line
from bfsys.files import exists

FORMATS = ("safetensors", "torch", "onnx")
NEEDED_FOR_ONNX = ("onnx", "onnxscript", "onnxruntime")
NOTES = """\
OUT then holds a model card (README.md), model.json (the architecture, the
classes, checksums) and
  model.safetensors  weights, float32
  model.pt2          torch.export.load(path).module()(bytes)
  model.onnx         for ONNX Runtime: input `bytes`, output `probabilities`
Both programs take the bytes of a file, uint8 [n], and give float32 [classes]."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s RUN OUT [OPTION …]", NOTES
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory, one of its checkpoints, or imported weights")
    add("out", type=local_path, metavar="OUT", help="folder that is empty or does not exist")
    add_weights(parser)
    add(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=["safetensors", "torch"],
        metavar="F",
        help="one or more of safetensors, torch, onnx (default: safetensors torch)",
    )


def run(args: argparse.Namespace) -> int:
    if "onnx" in args.format:
        missing = [name for name in NEEDED_FOR_ONNX if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"--format onnx: {', '.join(missing)} missing; pip install {' '.join(missing)}")
    from safetensors import SafetensorError

    from bfsys.checkpoint.files import MANIFEST, filling
    from bfsys.checkpoint.loading import load_model
    from bfsys.checkpoint.retention import evaluations
    from bfsys.export import export
    from bfsys.model_card import NAME

    model, config, manifest = load_model(args.run, average=args.weights == "ema")
    run_dir = args.run.resolve().parent.parent if exists(args.run / MANIFEST) else args.run
    scores = evaluations(run_dir).get(manifest["step"])  # a checkpoint is saved before its step is evaluated
    try:
        with filling(args.out):
            facts = export(model, config, manifest, args.out, args.format, args.weights, scores)
    except (OSError, SafetensorError) as error:
        where = getattr(error, "filename", None) or args.out  # perhaps a cache of PyTorch
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{where}: cannot be written: {reason}; nothing was exported") from None
    for name, entry in facts["files"].items():
        print(one_line(f"{args.out / name}: {entry['bytes']:,} bytes, sha256 {entry['sha256']}"))
    print(one_line(f"{args.out / NAME}: the model card"))
    if facts["byte_transforms"]:
        print(
            f"the programs take bytes as they are after data.byte_transforms: {', '.join(facts['byte_transforms'])}",
            file=sys.stderr,
        )
    return 0

"""Turn CoreNet's ByteFormer weights into a directory that works like a run."""

from __future__ import annotations

import argparse

from bfsys.commands.arguments import local_path
from bfsys.model.sizes import HEAD_DIM, PUBLISHED_SHIFT

NOTES = """\
Nothing in the file is executed. All settings but window, shift and heads are
read from the names and shapes of the tensors.

  bfsys import-corenet imagenet_k4_w128.pt imported --classes names.txt
  bfsys import-corenet speech_commands.pt imported/speech --window 32
  bfsys predict imported photo.jpg
  bfsys evaluate imported --data packed/imagenet-jpeg60"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s WEIGHTS.pt OUT [OPTION …]", NOTES
    add = parser.add_argument
    add("weights", metavar="WEIGHTS.pt", type=local_path, help="state dict as CoreNet saves it")
    add("out", metavar="OUT", type=local_path, help="folder that is empty or does not exist")
    add("--classes", type=local_path, metavar="FILE", help="a class name per line (default: numbers)")
    add("--window", type=int, default=128, metavar="N", help="tokens that attend to each other (default: 128)")
    add("--shift", type=int, default=PUBLISHED_SHIFT, metavar="N", help="shift of every second layer (default: 64)")
    add("--heads", type=int, metavar="N", help=f"attention heads (default: one per {HEAD_DIM} channels)")
    add(
        "--byte-transform",
        action="append",
        default=[],
        metavar="T",
        help="byte transform of the training, such as reverse or keep:0.05; repeatable, see bfsys/config.py",
    )


def run(args: argparse.Namespace) -> None:
    from bfsys.import_corenet import import_weights

    import_weights(
        args.weights,
        args.out,
        classes_file=args.classes,
        window=args.window,
        shift=args.shift,
        heads=args.heads,
        byte_transforms=args.byte_transform,
    )

"""Get the published datasets, or check the copy that you have."""

from __future__ import annotations

import argparse

from bfsys.commands.arguments import local_path
from bfsys.errors import UserError

NOTES = """\
speech_commands is downloaded (2.4 GB) into OUT/SpeechCommands, unless its
archive is in OUT. OUT/twelve/{train,val,test} holds the published classes: ten
words, _unknown_ and _silence_. OUT/background holds the noise recordings,
without the parts that became _silence_ of val and test.

imagenet needs an account at image-net.org. Put ILSVRC2012_img_train.tar,
ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz into OUT; they are
verified and unpacked. Existing folders train/ and val/ are only checked."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = NOTES
    parser.add_argument("dataset", choices=("speech_commands", "imagenet"))
    parser.add_argument("out", metavar="OUT", type=local_path, help="the folder of the dataset")


def run(args: argparse.Namespace) -> None:
    from bfsys.fetch import imagenet, speech_commands

    out = args.out.expanduser()
    try:
        if args.dataset == "speech_commands":
            speech_commands(out)
        else:
            imagenet(out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}") from error

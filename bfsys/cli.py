"""The console command `bfsys`, and the code that all ways to call one of its commands share.

    bfsys pack photos data/shards --name mine
    bfsys train configs/own_files.yaml optim.lr=3e-4

Each command is a module of bfsys/commands/ with `add_arguments(parser)` and `run(args)`. Only the requested command is
imported. Its `run` checks what can be checked without PyTorch before it imports PyTorch, so a help text or an error
message takes a fraction of a second. `python tools/pack.py`, `python -m bfsys.predict`, `deepspeed bfsys/train.py` and
others call the same commands, and each prints its own name.

Rejected alternatives: argparse's subparsers, which need the arguments of all commands for each of them, and accept no
options between overrides (`CONFIG --ranks 2 optim.lr=3e-4`); click and typer, which add a dependency and no function.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from bfsys import __version__, console
from bfsys.errors import UserError, did_you_mean, run_command, summary_of

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

COMMANDS = {
    "fit": "train and evaluate a model on a folder of files",
    "pack": "pack files into shards with an index",
    "inspect": "show, check or rebuild the index of a packed dataset",
    "plan": "estimate the memory, time and disk space of a run",
    "train": "train as one rank; deepspeed and torchrun start it",
    "launch": "train on all GPUs or cores of a machine, with restarts",
    "slurm": "train on a SLURM cluster; jobs: slurm status, logs, stop",
    "check-gpu": "check that a GPU or a cluster computes correctly and fast",
    "compare": "compare the differing settings and the scores of runs",
    "checkpoint": "list, verify, show, copy or prune a run's checkpoints",
    "evaluate": "compute loss and accuracy of a run on a whole split",
    "predict": "predict the classes of files from their bytes",
    "explain": "show which bytes of a file decide its class; find shortcuts",
    "serve": "serve a trained model on the web, with a page to drop files on",
    "export": "write a model as safetensors, torch.export program or ONNX",
    "encode": "encode and transform files as a model reads them",
    "fetch": "download or check the published datasets",
    "make-key": "make a key file for the byte transform permute:KEYFILE",
    "import-corenet": "turn CoreNet's ByteFormer weights into a run directory",
}
TAKE_OVERRIDES = ("plan", "train", "launch", "slurm")
INTERMIXED = (*TAKE_OVERRIDES, "explain")  # positional arguments may be among options, and may be absent
# Their result is not their output, so they continue if the console is closed or full.
WORK = ("fit", "pack", "launch", "check-gpu", "export", "encode", "fetch", "make-key", "import-corenet")
OF_SLURM_JOBS = ("status", "logs", "stop")  # `bfsys slurm status RUN`; other arguments of `slurm` submit a job
WIDTH = 78  # columns of text that argparse does not wrap
SHELLS = ("bash", "zsh", "tcsh")
# Arguments that the shell completes with file names, besides those whose type is a path.
FILES = ("config", "dataset", "files", "permute", "run", "to")
SLURM_RUN = ("slurm", "overrides")  # RUN of `bfsys slurm status RUN`


def main(name: str | None = None, prog: str | None = None) -> None:
    """Run the command `name`, which was called as `prog`, or else the one that the first argument names; exits."""
    arguments = sys.argv[1:]
    run_command(lambda: call(name, arguments, prog) if name else dispatch(arguments))


def dispatch(arguments: Sequence[str]) -> int | None:
    """Run `bfsys ARGUMENT…`. Returns the exit code."""
    if arguments and arguments[0] in COMMANDS:
        return call(arguments[0], arguments[1:])
    if arguments and not arguments[0].startswith("-"):
        hint = did_you_mean(arguments[0], COMMANDS)
        raise UserError(f"{arguments[0]!r}: no such command{hint}; `bfsys --help` lists all")
    parser = _top_level_parser()
    parser.add_argument("-h", "--help", action="store_true")
    args = parser.parse_args(arguments)
    if args.version:
        print("bfsys", __version__)
    elif args.print_completion:
        print(completion(args.print_completion))
    else:
        print(overview())
    return 0


def _top_level_parser(*, add_help: bool = False) -> argparse.ArgumentParser:
    parser = _Parser(prog="bfsys", usage="bfsys COMMAND [ARGUMENT …]", add_help=add_help)
    parser.add_argument("--version", action="store_true", help="show the version")
    parser.add_argument("--print-completion", choices=SHELLS, help="print a script for completion with TAB")
    return parser


def overview() -> str:
    """The text of `bfsys --help`."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        (
            "usage: bfsys COMMAND [ARGUMENT …]",
            "Train classifiers on raw file bytes, from a laptop to a SLURM cluster.\n",
            *(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()),
            "\nHelp: `bfsys COMMAND --help`. Completion: `bfsys --print-completion SHELL`.",
        )
    )


def call(name: str, arguments: Sequence[str], prog: str | None = None) -> int | None:
    """Parse the arguments of a command and run it. Returns its exit code. Exceptions are not caught.

    `prog` is the command's name in its usage text.
    """
    module = module_of("slurm_jobs" if name == "slurm" and arguments[:1] and arguments[0] in OF_SLURM_JOBS else name)
    parser = parser_of(module, prog or f"bfsys {name}")
    parse = parser.parse_intermixed_args if name in INTERMIXED else parser.parse_args
    args = parse(arguments)
    args.arguments = list(arguments)
    if name in WORK:
        console.go_on_without()
    return module.run(args)


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"bfsys.commands.{name.replace('-', '_')}")


def parser_of(module: ModuleType, prog: str) -> argparse.ArgumentParser:
    # The first column is as wide as most options need.
    form = partial(argparse.RawDescriptionHelpFormatter, max_help_position=26)
    parser = _Parser(prog=prog, description=textwrap.fill(summary_of(module.__doc__), WIDTH), formatter_class=form)
    module.add_arguments(parser)
    return parser


def completion(shell: str) -> str:
    """A shell script that completes commands, options and file names."""
    import shtab

    from bfsys.commands.arguments import local_path

    root = _top_level_parser(add_help=True)
    subparsers = root.add_subparsers(metavar="COMMAND")
    for name, summary in COMMANDS.items():
        parser = subparsers.add_parser(name, help=summary)
        module_of(name).add_arguments(parser)
        for action in parser._actions:
            if shell == "bash" and (name, action.dest) == ("slurm", "config"):  # for zsh, shtab has no such choices
                action.choices = [*OF_SLURM_JOBS, *shtab.Optional.FILE]
            elif action.type in (Path, local_path) or action.dest in FILES or (name, action.dest) == SLURM_RUN:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(root, shell)


class _Parser(argparse.ArgumentParser):
    """A parser that fails if its help cannot be written: argparse ignores that."""

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        (file or sys.stderr).write(message)

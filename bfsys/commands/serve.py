"""Serve a trained model as a web service, with a page to drop files on."""

from __future__ import annotations

import argparse
import math
import sys
from importlib.util import find_spec
from pathlib import Path

from bfsys.commands.arguments import add_weights
from bfsys.errors import UserError
from bfsys.serve.limits import Limits

PACKAGES = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}
LIMITS = {
    "--max-file-bytes": ("file_bytes", "bytes of one file"),
    "--max-model-bytes": ("model_bytes", "bytes of one file as the model reads it"),
    "--max-request-bytes": ("request_bytes", "bytes of one request"),
    "--max-files": ("files", "files in one request"),
    "--max-requests": ("requests", "requests at a time; others are refused"),
    "--timeout": ("seconds", "seconds for a request"),
}
HIGHEST_PORT = 65_535


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s RUN [OPTION …]", "docs/serve.md explains the service."
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory, one of its checkpoints, or an export")
    add("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    add("--port", type=int, default=8000, help="port (default: 8000; 0: any free one)")
    add_weights(parser)
    add("--device", help="device, such as cpu or cuda:1")
    add("--permute", metavar="KEYFILE", help="path of the key file used in training")
    for option, (name, text) in LIMITS.items():
        default = getattr(Limits, name)
        shown = "the run's budget" if default is None else f"{default:,g}" if name == "seconds" else f"{default:,}"
        kind = float if name == "seconds" else int
        add(option, dest=name, type=kind, default=default, metavar="N", help=f"{text} (default: {shown})")


def run(args: argparse.Namespace) -> int:
    limits = _limits(args)
    if missing := [package for module, package in PACKAGES.items() if find_spec(module) is None]:
        raise UserError(f"serve needs {', '.join(missing)}, not installed here; use pip install 'bfsys[serve]'")
    from bfsys.serve.listener import bind, is_loopback

    listener = bind(args.host, args.port)
    if not is_loopback(listener):
        print(f"warning: {args.host} can be reached from other machines, and there is no authentication",
              file=sys.stderr, flush=True)  # fmt: skip
    from bfsys.predict import load
    from bfsys.serve.server import serve
    from bfsys.serve.service import Service

    model = load(args.run, weights=args.weights, device=args.device, permute=args.permute)
    serve(Service(model, limits), listener, args.host)
    return 0


def _limits(args: argparse.Namespace) -> Limits:
    problems = []
    if not 0 <= args.port <= HIGHEST_PORT:
        problems.append(f"--port: got {args.port}; 0 to {HIGHEST_PORT:,} are allowed")
    values = {name: getattr(args, name) for name, _ in LIMITS.values()}
    for option, (name, _) in LIMITS.items():
        if values[name] is not None and not (values[name] > 0 and math.isfinite(values[name])):
            problems.append(f"{option}: got {values[name]}; a number above 0 is needed")
    if problems:
        raise UserError(*problems)
    return Limits(**values)

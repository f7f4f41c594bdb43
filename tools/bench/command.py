"""What the command lines of benchmarks share: how they end, and arguments whose numbers have a lower limit."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable

from bfsys.errors import run_command

STOPPED = 128 + signal.SIGTERM  # exit code


def run_benchmark(main: Callable[[], int | None]) -> None:
    """Run a benchmark's `main`, and exit. SIGTERM, which `timeout` sends, is an exit too, so that folders are removed
    and processes are ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    run_command(main)


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at least `least`."""

    def whole_number(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}; a whole number of at least {least} is needed")
        return int(text)

    return whole_number


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}; a number above 0 is needed")
    return number

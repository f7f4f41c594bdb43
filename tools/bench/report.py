"""What benchmarks report: facts about the machine, and a table of the rows that they have measured."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def machine() -> dict:
    cpu = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.platform()}, load {os.getloadavg()[0]:.1f} before",
    }


def show(
    rows: Sequence[dict],
    columns: Mapping[str, tuple[str, str]],
    *,
    headings: Sequence[str],
    names_of: Callable[[dict], Sequence[str]],
) -> None:
    """Print the values of `columns`, {key of a row: (title, format)}, after the names of each row."""
    is_terminal = sys.stdout.isatty()
    table = Table(*headings, box=box.SIMPLE if is_terminal else None)
    for key, (title, _) in columns.items():
        table.add_column(title, justify="left" if key == "problem" else "right", overflow="fold")
    for row in rows:
        values = ["" if row[key] is None else form.format(row[key]) for key, (_, form) in columns.items()]
        table.add_row(*names_of(row), *map(Text, values))
    Console(width=None if is_terminal else 280).print(table)  # a log file has no width, and rich would use 80

"""JSON lines that a process appends to, and how they are read after faults.

A kill may truncate the last line, and a crash of the machine or an edit may damage any line. Invalid lines are ignored,
because these files are records, and a damaged record must not end a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType

from bfsys.files import read_regular

NUMBER = int | float
Fields = Mapping[str, type | UnionType]


def read_json_lines(path: Path, fields: Fields) -> Iterator[dict]:
    """The objects in a file, one per line, that have these fields of these types; none if the file does not exist."""
    content = read_regular(path) if path.exists() else b""
    return parse_json_lines(content.split(b"\n"), fields)


def parse_json_lines(lines: list[bytes], fields: Fields) -> Iterator[dict]:
    for text in lines:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and all(isinstance(line.get(name), kind) for name, kind in fields.items()):
            yield line

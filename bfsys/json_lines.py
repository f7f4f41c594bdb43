"""Records in JSON: files of lines that a process appends to, and files of one object. How they are read after faults.

A kill may truncate the last line, and a crash of the machine or an edit may damage any part. Invalid records are
ignored, because a damaged record must not end a run.

Files of lines are read in parts. Those of a long run have millions of lines, which may not fit into the memory at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType

from bfsys.files import CHUNK_BYTES, exists, open_regular

NUMBER = int | float
Fields = Mapping[str, type | UnionType]


def read_json_lines(path: Path, fields: Fields) -> Iterator[dict]:
    """The objects in a file, one per line, that have these fields of these types; none if the file does not exist."""
    if exists(path):
        with open_regular(path) as file:
            yield from parse_json_lines(file, fields)


def read_json_lines_backwards(path: Path, fields: Fields) -> Iterator[dict]:
    """Like `read_json_lines`, the last object first. Only the part of the file that is asked for is read."""
    if not exists(path):
        return
    with open_regular(path) as file:
        end = file.seek(0, os.SEEK_END)
        later: list[bytes] = []  # parts of a line whose beginning is not read yet, the last part first
        while end:
            start = max(0, end - CHUNK_BYTES)
            file.seek(start)
            beginning, *lines = file.read(end - start).split(b"\n")
            if lines:
                lines[-1] += b"".join(reversed(later))
                yield from parse_json_lines(reversed(lines), fields)
                later = []
            later.append(beginning)
            end = start
        yield from parse_json_lines([b"".join(reversed(later))], fields)


def parse_json_lines(lines: Iterable[bytes], fields: Fields) -> Iterator[dict]:
    return (line for line in (parse_json_object(text, fields) for text in lines) if line is not None)


def parse_json_object(text: bytes, fields: Fields) -> dict | None:
    """The object in a text, if it has these fields of these types."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_valid = isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in fields.items())
    return record if is_valid else None

"""Named ranges of bytes, and how they are extended to cover a file from the first byte to the last.

The parsers of the formats (formats/*.py) report what they find, in any order. Their findings may be wrong, because
files are truncated, damaged or hostile. `covering` cuts the ranges to the file, gives bytes that two ranges claim to
the range that begins first, and names the bytes that no range covers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind = Literal["header", "metadata", "content"]
KINDS: tuple[Kind, ...] = ("header", "metadata", "content")
Found: TypeAlias = tuple[int, int, str, Kind]
"""First byte, end, name, kind."""
Parser: TypeAlias = Callable[[bytes], Iterator[Found]]
LONGEST_NAME = 40
UNNAMED = "other bytes"


@dataclass(frozen=True)
class Range:
    """Bytes of a file that belong together."""

    first: int
    end: int
    name: str
    """The name of the part, such as `IDAT`."""
    kind: Kind
    """header: needed by a reader of the format; metadata: may be ignored; content: pixels, samples, text."""


@dataclass(frozen=True)
class Structure:
    """The format of a file, and its ranges in their order."""

    format: str
    """The file format, such as `PNG`; `text` or `unknown` if no parser knows the file."""
    ranges: tuple[Range, ...]


def covering(found: Iterable[Found], length: int) -> list[Range]:
    """Ranges that cover [0, length) exactly. Neighbours of the same name and kind are merged."""
    ranges: list[Range] = []

    def add(first: int, end: int, name: str, kind: Kind) -> None:
        last = ranges[-1] if ranges else None
        if last and (last.name, last.kind) == (name, kind):
            ranges[-1] = Range(last.first, end, name, kind)
        else:
            ranges.append(Range(first, end, name, kind))

    at = 0
    for first, end, name, kind in sorted(found, key=lambda one: one[0]):
        first, end = max(first, at), min(end, length)
        if first >= end:
            continue
        if first > at:
            add(at, first, UNNAMED, "content")
        add(first, end, printable(name), kind)
        at = end
    if at < length:
        add(at, length, UNNAMED, "content")
    return ranges


def printable(name: str) -> str:
    """A name from a file, made printable."""
    return "".join(c if c.isprintable() else "?" for c in name[:LONGEST_NAME]).strip() or "?"

"""ZIP, gzip, ELF, PE and, roughly, PDF."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from bfsys.explain.ranges import Found, Kind

AFTER_ENTRY = re.compile(rb"PK(?:\x07\x08|\x03\x04|\x01\x02)")
SIZE_FOLLOWS = 8  # flag of an entry whose length follows it
MOST_SECTIONS = 1000
METADATA_SECTIONS = (".symtab", ".strtab", ".dynstr", ".shstrtab", ".comment", ".note", ".debug", ".gnu", ".rsrc")
PDF_STREAM = re.compile(rb"stream\r?\n")


def zip_archive(content: bytes) -> Iterator[Found]:
    at = 0
    while at < len(content):
        signature = content[at : at + 4]
        if signature == b"PK\3\4":
            flags, size, name, extra = struct.unpack_from("<6xH10xI4xHH", content, at)
            first = at + 30 + name + extra
            yield at, first, "local header", "header"
            end = first + size
            if flags & SIZE_FOLLOWS and not size:
                found = AFTER_ENTRY.search(content, first)
                end = found.start() if found else len(content)
            yield first, end, "entry", "content"
        elif signature == b"PK\7\x08":
            end = at + 16
            yield at, end, "data descriptor", "header"
        elif signature == b"PK\1\2":
            name, extra, comment = struct.unpack_from("<28xHHH", content, at)
            end = at + 46 + name + extra + comment
            yield at, end, "central directory", "header"
        elif signature == b"PK\5\6":
            end = at + 22
            yield at, end, "end record", "header"
            yield end, len(content), "comment", "metadata"
            return
        else:
            return
        at = end


def gzip(content: bytes) -> Iterator[Found]:
    yield 0, 10, "header", "header"
    flags, at = content[3], 10
    if flags & 4:
        (length,) = struct.unpack_from("<H", content, at)
        yield at, at + 2 + length, "extra field", "metadata"
        at += 2 + length
    for flag, name in ((8, "file name"), (16, "comment")):
        if flags & flag:
            end = content.find(b"\0", at) + 1 or len(content)
            yield at, end, name, "metadata"
            at = end
    if flags & 2:
        yield at, at + 2, "header checksum", "header"
        at += 2
    if len(content) - 8 > at:
        yield at, len(content) - 8, "compressed data", "content"
        at = len(content) - 8
    yield at, len(content), "checksum and length", "header"


def elf(content: bytes) -> Iterator[Found]:
    wide, order = content[4] == 2, "<" if content[5] == 1 else ">"
    programs, sections = struct.unpack_from(order + ("QQ" if wide else "II"), content, 32 if wide else 28)
    sizes = struct.unpack_from(order + "6H", content, 52 if wide else 40)
    yield 0, sizes[0], "ELF header", "header"
    yield programs, programs + sizes[1] * sizes[2], "program headers", "header"
    yield sections, sections + sizes[3] * sizes[4], "section headers", "header"
    shape, step = order + ("II16xQQ" if wide else "II8xII"), max(sizes[3], 1)
    rows = [struct.unpack_from(shape, content, sections + step * i) for i in range(min(sizes[4], MOST_SECTIONS))]
    names = rows[sizes[5]][2] if sizes[5] < len(rows) else len(content)
    for name, section_type, first, length in rows:
        if section_type not in (0, 8):  # those take no space in the file
            yield first, first + length, *_section(content[names + name : names + name + 40].partition(b"\0")[0])


def pe(content: bytes) -> Iterator[Found]:
    yield 0, 64, "DOS header", "header"
    (at,) = struct.unpack_from("<I", content, 60)
    if content[at : at + 4] != b"PE\0\0":
        return
    yield 64, at, "DOS program", "header"
    sections, optional = struct.unpack_from("<H12xH", content, at + 6)
    table = at + 24 + optional
    yield at, table, "PE header", "header"
    yield table, table + 40 * sections, "section table", "header"
    last = table + 40 * sections
    for i in range(min(sections, MOST_SECTIONS)):
        name, length, first = struct.unpack_from("<8s8xII", content, table + 40 * i)
        yield first, first + length, *_section(name.rstrip(b"\0"))
        last = max(last, first + length)
    yield last, len(content), "after the sections", "metadata"


def _section(name: bytes) -> tuple[str, Kind]:
    text = name.decode("latin-1") or "section"
    return text, "metadata" if text.startswith(METADATA_SECTIONS) else "content"


def pdf(content: bytes) -> Iterator[Found]:
    """The ranges of a PDF: streams, which are content (XMP streams are metadata), and the objects between them."""
    at = searched = 0
    while found := PDF_STREAM.search(content, searched):
        first = found.end()
        end = content.find(b"endstream", first)
        end = len(content) if end < 0 else end
        yield at, first, "objects", "header"
        is_metadata = b"/Metadata" in content[max(at, found.start() - 300) : first]
        yield first, end, "XMP" if is_metadata else "stream", "metadata" if is_metadata else "content"
        at, searched = end, end + len(b"endstream")
    yield at, len(content), "objects", "header"

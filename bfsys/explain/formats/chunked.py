"""Formats that are a sequence of chunks with length and type: PNG, RIFF, AIFF, ISO media (MP4, M4A, HEIC), JPEG 2000.

The length and type before a chunk of content are a separate header, because a length may reveal a class.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from bfsys.explain.ranges import Found, Kind

PNG_HEADERS = {b"IHDR", b"PLTE", b"tRNS", b"IEND", b"sRGB", b"gAMA", b"cHRM", b"sBIT", b"acTL", b"fcTL"}
PNG_CONTENT = {b"IDAT", b"fdAT"}
RIFF_HEADERS = {b"fmt ", b"fact", b"ds64", b"VP8X", b"ANIM", b"hdrl", b"idx1", b"COMM", b"FVER"}
RIFF_CONTENT = {b"data", b"VP8 ", b"VP8L", b"ALPH", b"ANMF", b"movi", b"SSND"}
ISO_CONTAINERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"dinf", b"edts", b"moof", b"traf", b"mvex"}
ISO_METADATA = {b"udta", b"uuid", b"free", b"skip", b"XMP_", b"ilst"}
ISO_CONTENT = {b"mdat", b"jp2c"}
UNKNOWN_LENGTH = 0xFFFFFFFF  # written by RF64 and by recorders that were cut off


def png(content: bytes) -> Iterator[Found]:
    yield 0, 8, "signature", "header"
    at = 8
    while at < len(content):
        length, chunk = struct.unpack_from(">I4s", content, at)
        if not chunk.isalpha():
            return
        end, name = at + 12 + length, chunk.decode()
        if chunk in PNG_CONTENT:
            yield at, at + 8, f"{name} length", "header"
            yield at + 8, end, name, "content"
        else:
            yield at, end, name, "header" if chunk in PNG_HEADERS else "metadata"
        at = end


def riff(content: bytes) -> Iterator[Found]:
    """WAV, WebP, AVI and AIFF."""
    order = "<" if (content[:3] == b"RIF" and content[3:4] == b"F") or content[:4] in (b"RF64", b"BW64") else ">"
    yield 0, 12, content[:4].decode("latin-1"), "header"
    at = 12
    while at < len(content):
        chunk, length = struct.unpack_from(order + "4sI", content, at)
        if not all(32 <= byte < 127 for byte in chunk):
            return
        end, name = at + 8 + length + length % 2, chunk.decode()
        kind: Kind = "metadata"
        if chunk == b"LIST":
            form = content[at + 8 : at + 12]
            chunk, name = form, f"LIST {form.decode('latin-1')}"
        if chunk in RIFF_HEADERS:
            kind = "header"
        if chunk in RIFF_CONTENT:
            if length == UNKNOWN_LENGTH:
                end = len(content)
            yield at, at + 8, f"{name} length", "header"
            yield at + 8, end, name, "content"
        else:
            yield at, end, name, kind
        at = end


def iso_boxes(content: bytes) -> Iterator[Found]:
    """Boxes of boxes as one row: the length and type of a container, then its content."""
    at = 0
    while at < len(content):
        length, box = struct.unpack_from(">I4s", content, at)
        head = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", content, at + 8)
            head = 16
        elif length == 0:
            length = len(content) - at
        if length < head:
            return
        name = box.decode("latin-1")
        if box in ISO_CONTAINERS:
            yield at, at + head, name, "header"
            at += head
            continue
        if box in ISO_CONTENT:
            yield at, at + head, f"{name} length", "header"
            yield at + head, at + length, name, "content"
        else:
            yield at, at + length, name, "metadata" if box in ISO_METADATA else "header"
        at += length

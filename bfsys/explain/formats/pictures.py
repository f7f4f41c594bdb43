"""TIFF, JPEG, GIF, BMP and PNM."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from bfsys.explain.ranges import Found, Kind

# --- TIFF
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
STRIPS = {273: 279, 324: 325}  # tag of the offsets: tag of the lengths
EXIF, GPS, SUB_IFDS = 34665, 34853, 330
READ_TAGS = {*STRIPS, *STRIPS.values(), EXIF, GPS, SUB_IFDS}
METADATA_TAGS = {
    269: "DocumentName", 270: "ImageDescription", 271: "Make", 272: "Model", 285: "PageName", 305: "Software",
    306: "DateTime", 315: "Artist", 316: "HostComputer", 700: "XMP", 33432: "Copyright", 33723: "IPTC",
    34377: "Photoshop", 34675: "ICC profile", 37510: "UserComment", 37500: "MakerNote",
}  # fmt: skip
# A hostile file may have IFDs at all of its bytes.
MOST_IFDS, MOST_ENTRIES, MOST_STRIPS = 32, 512, 16_384

# --- JPEG
STANDALONE = {0x01, *range(0xD0, 0xD8)}
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
SEGMENTS = {0xC4: "DHT", 0xCC: "DAC", 0xDB: "DQT", 0xDC: "DNL", 0xDD: "DRI", 0xFE: "COM"}
AFTER_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def tiff(content: bytes) -> Iterator[Found]:
    order = "<" if content[:2] == b"II" else ">"
    yield 0, 8, "TIFF header", "header"
    (offset,) = struct.unpack_from(order + "I", content, 4)
    waiting: list[tuple[int, str, Kind]] = [(offset, "IFD", "header")]
    seen: set[int] = set()
    while waiting and len(seen) < MOST_IFDS:
        at, name, kind = waiting.pop()
        if at in seen or not 8 <= at < len(content):
            continue
        seen.add(at)
        (count,) = struct.unpack_from(order + "H", content, at)
        yield at, at + 2 + 12 * count + 4, name, kind
        count = min(count, (len(content) - at - 2) // 12, MOST_ENTRIES)
        values: dict[int, tuple[int, ...]] = {}
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, value_type, number = struct.unpack_from(order + "HHI", content, entry)
            size = TYPE_BYTES.get(value_type, 1) * number
            where = entry + 8
            if size > 4:
                (where,) = struct.unpack_from(order + "I", content, where)
                known = METADATA_TAGS.get(tag)
                yield (
                    where,
                    where + size,
                    known or f"tag {tag}",
                    "metadata" if known or kind == "metadata" else "header",
                )
            if tag in READ_TAGS and tag not in values:
                values[tag] = _integers(content, order, value_type, number, where)
        for offsets, lengths in STRIPS.items():
            pairs = zip(values.get(offsets, ()), values.get(lengths, ()), strict=False)
            yield from _strips(list(pairs), "strips" if offsets == 273 else "tiles")
        waiting += [(offset, "EXIF", "metadata") for tag in (EXIF, GPS) for offset in values.get(tag, ())]
        waiting += [(offset, "SubIFD", "header") for offset in values.get(SUB_IFDS, ())]
        end = at + 2 + 12 * count
        if kind == "header" and end + 4 <= len(content):
            waiting.append((struct.unpack_from(order + "I", content, end)[0], "IFD", kind))


def _integers(content: bytes, order: str, value_type: int, number: int, where: int) -> tuple[int, ...]:
    letter = {3: "H", 4: "I", 13: "I"}.get(value_type)
    if letter is None:
        return ()
    fits = max(0, len(content) - where) // struct.calcsize(letter)
    return struct.unpack_from(f"{order}{min(number, fits, MOST_STRIPS)}{letter}", content, min(where, len(content)))


def _strips(pairs: list[tuple[int, int]], name: str) -> Iterator[Found]:
    """Adjacent strips are one range."""
    pairs.sort()
    run: tuple[int, int] | None = None
    for first, length in pairs:
        if run and first <= run[1] + 1:  # they begin at even bytes
            run = run[0], max(run[1], first + length)
            continue
        if run:
            yield *run, name, "content"
        run = first, first + length
    if run:
        yield *run, name, "content"


def jpeg(content: bytes) -> Iterator[Found]:
    yield 0, 2, "SOI", "header"
    at = 2
    while at < len(content):
        if content[at] != 0xFF:
            return
        marker = content[at + 1]
        if marker == 0xFF:  # filling
            yield at, at + 1, "filling", "header"
            at += 1
            continue
        if marker == 0xD9:
            yield at, at + 2, "EOI", "header"
            yield at + 2, len(content), "after the end", "metadata"
            return
        if marker in STANDALONE or marker == 0xD8:
            yield at, at + 2, "marker", "header"
            at += 2
            continue
        (length,) = struct.unpack_from(">H", content, at + 2)
        end = at + 2 + max(length, 2)
        name, kind = _segment(marker, content[at + 4 : at + 16])
        yield at, end, name, kind
        at = end
        if marker == 0xDA:
            found = AFTER_SCAN.search(content, at)
            end = found.start() if found else len(content)
            yield at, end, "scan", "content"
            at = end


def _segment(marker: int, start: bytes) -> tuple[str, Kind]:
    if marker in FRAMES:
        return f"SOF{marker - 0xC0}", "header"
    if marker == 0xDA:
        return "SOS", "header"
    if 0xE0 <= marker <= 0xEF:
        name = f"APP{marker - 0xE0}"
        for magic, known in ((b"JFIF", "JFIF"), (b"Adobe", "Adobe")):
            if start.startswith(magic):
                return f"{name} {known}", "header"
        for magic, known in ((b"Exif", "EXIF"), (b"http", "XMP"), (b"ICC_", "ICC profile"), (b"Phot", "Photoshop")):
            if start.startswith(magic):
                return f"{name} {known}", "metadata"
        return name, "metadata"
    return SEGMENTS.get(marker, f"segment {marker:02X}"), "metadata" if marker == 0xFE else "header"


def gif(content: bytes) -> Iterator[Found]:
    end = 13 + _colours(content[10])
    yield 0, end, "screen", "header"
    at = end
    while content[at] != 0x3B:
        introducer = content[at]
        if introducer == 0x21:
            label = content[at + 1]
            name, kind = {
                0xF9: ("graphic control", "header"),
                0xFE: ("comment", "metadata"),
                0x01: ("plain text", "content"),
            }.get(label, ("application", "metadata"))
            head = 2
        elif introducer == 0x2C:
            head = 10 + _colours(content[at + 9])
            yield at, at + head, "image descriptor", "header"
            at += head
            name, kind, head = "image", "content", 1  # the width of codes
        else:
            return
        end = at + head
        while content[end]:
            end += 1 + content[end]
            if end >= len(content):
                break
        yield at, end + 1, name, kind  # type: ignore[misc]
        at = end + 1
    yield at, at + 1, "trailer", "header"
    yield at + 1, len(content), "after the end", "metadata"


def _colours(flags: int) -> int:
    """Bytes of the table of colours that a descriptor announces."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def bmp(content: bytes) -> Iterator[Found]:
    yield 0, 14, "file header", "header"
    pixels, size = struct.unpack_from("<II", content, 10)
    yield 14, 14 + size, "picture header", "header"
    if pixels >= 14:
        yield 14 + size, pixels, "colours", "header"
        yield pixels, len(content), "pixels", "content"


def pnm(content: bytes) -> Iterator[Found]:
    wanted = 2 if content[1:2] in b"14" else 3
    at = first = 2
    yield 0, 2, "header", "header"
    while wanted:
        if content[at] == 0x23:  # a comment
            end = content.find(b"\n", at) + 1 or len(content)
            yield first, at, "header", "header"
            yield at, end, "comment", "metadata"
            at = first = end
        elif content[at : at + 1].isspace():
            at += 1
        elif content[at : at + 1].isdigit():
            while content[at : at + 1].isdigit():
                at += 1
            wanted -= 1
        else:
            return
    yield first, at + 1, "header", "header"
    yield at + 1, len(content), "pixels", "content"

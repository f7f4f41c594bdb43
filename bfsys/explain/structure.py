"""The structure of a file: its format, and named ranges of bytes that cover it without gap or overlap.

Parsers read forward only, so their time grows linearly with the file, and the number of their findings is limited.

Rejected alternative: libraries that read these formats. No common one returns the offsets of the parts that it finds in
the file.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from bfsys.data.media.sounds import without_tags
from bfsys.explain.formats import chunked, pictures, programs, sounds
from bfsys.explain.ranges import Found, Parser, Structure, covering

MOST_FOUND = 4096
LOOKED_AT = 65_536  # bytes that decide whether a file is text

# The first format that matches the start of a file is used.
FORMATS: tuple[tuple[str, re.Pattern[bytes], Parser], ...] = tuple(
    (name, re.compile(magic, re.DOTALL), parser)
    for name, magic, parser in (
        ("PNG", rb"\x89PNG\r\n\x1a\n", chunked.png),
        ("WAV", rb"(?:RIFF|RIFX|RF64|BW64).{4}WAVE", chunked.riff),
        ("WebP", rb"RIFF.{4}WEBP", chunked.riff),
        ("AVI", rb"RIFF.{4}AVI ", chunked.riff),
        ("RIFF", rb"RIFF.{8}", chunked.riff),
        ("AIFF", rb"FORM.{4}AIF[FC]", chunked.riff),
        ("ISO media", rb"\0.{3}(?:ftyp|moov|free|wide|skip|pnot)|.{4}mdat", chunked.iso_boxes),
        ("TIFF", rb"II\*\0|MM\0\*", pictures.tiff),
        ("JPEG", rb"\xff\xd8\xff", pictures.jpeg),
        ("GIF", rb"GIF8[79]a", pictures.gif),
        ("BMP", rb"BM.{4}\0{4}", pictures.bmp),
        ("PNM", rb"P[1-6]\s+[\d#]", pictures.pnm),
        ("JPEG 2000", rb"\0\0\0\x0cjP  \r\n", chunked.iso_boxes),
        ("FLAC", rb"fLaC", sounds.flac),
        ("AU", rb"\.snd|dns\.", sounds.announced),
        ("W64", rb"riff\x2e\x91\xcf\x11", sounds.announced),
        ("CAF", rb"caff\0\x01", sounds.announced),
        ("NIST SPHERE", rb"NIST_1A\s", sounds.announced),
        ("Ogg", rb"OggS", sounds.ogg),
        ("MP3", rb"ID3[\x02-\x04]|\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xef]", sounds.mp3),
        ("ZIP", rb"PK(?:\x03\x04|\x05\x06)", programs.zip_archive),
        ("gzip", rb"\x1f\x8b\x08", programs.gzip),
        ("ELF", rb"\x7fELF", programs.elf),
        ("PE", rb"MZ.{,62}\0", programs.pe),
        ("PDF", rb"%PDF-", programs.pdf),
    )
)
NOT_TEXT = bytes({*range(32), 127} - {7, 8, 9, 10, 11, 12, 13, 27})


def structure(data: np.ndarray, length: int | None = None) -> Structure:
    """The structure of a file, uint8 [n], or of its first `length` bytes. An unknown file is one range of content."""
    content = data.tobytes()
    sound = without_tags(content)
    tag = len(content) - len(sound)
    name, parser = _parser_of(sound)
    found: list[Found] = [(0, tag, "APE tag" if content.startswith(b"APETAGEX") else "ID3v2", "metadata")]
    found += [(tag + first, tag + end, part, kind) for first, end, part, kind in _found(parser, sound)]
    return Structure(name, tuple(covering(found, len(content) if length is None else length)))


def _found(parser: Parser, content: bytes) -> list[Found]:
    """The ranges that the parser finds before the first one that it cannot read."""
    found: list[Found] = []
    with suppress(struct.error, IndexError, OverflowError):  # the file is truncated or has wrong lengths
        for first, end, name, kind in parser(content):
            if found and found[-1][1:] == (first, name, kind):  # such as the frames of a sound
                found[-1] = found[-1][0], end, name, kind
            elif len(found) < MOST_FOUND:
                found.append((first, end, name, kind))  # keeps the ranges before an error
            else:
                break
    return found


def _parser_of(content: bytes) -> tuple[str, Parser]:
    """The format of a file, and its parser."""
    for name, magic, parser in FORMATS:
        if magic.match(content):
            return name, parser
    return ("text", _text) if _is_text(content[:LOOKED_AT]) else ("unknown", _unknown)


def _is_text(start: bytes) -> bool:
    """Whether this is UTF-8 without control characters; the last character may be incomplete."""
    if not start or start.translate(None, NOT_TEXT) != start:
        return False
    try:
        start.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


def _text(content: bytes) -> Iterator[Found]:
    yield 0, len(content), "text", "content"


def _unknown(content: bytes) -> Iterator[Found]:
    yield 0, len(content), "bytes", "content"

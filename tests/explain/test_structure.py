"""Ranges cover any file from the first byte to the last, and have the names that the formats give them."""

from __future__ import annotations

import gzip
import io
import struct
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from bfsys.explain.ranges import Range, Structure
from bfsys.explain.structure import FORMATS, structure
from tests.explain.tiny import png_file, wav_file


def picture(format: str, **options: object) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def sound(format: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    wave = 0.3 * np.random.default_rng(0).standard_normal(16_000)
    with soundfile.SoundFile(file, "w", 16_000, 1, subtype, format=format) as out:
        if format not in ("AU", "W64", "NIST"):  # which hold no texts
            out.title = "a title"
        out.write(wave.clip(-1, 1))
    return file.getvalue()


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + name + content


def with_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[271] = "a maker of cameras"
    return exif


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "text " * 40)
        archive.writestr("b.txt", b"more")
    return file.getvalue()


def portable_executable() -> bytes:
    head = b"MZ" + bytes(58) + struct.pack("<I", 64)
    coff = b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, 1, 0, 0, 0, 16, 0) + bytes(16)
    first = len(head) + len(coff) + 40
    section = struct.pack("<8sIIII16x", b".text", 32, 0, 32, first)
    return head + coff + section + bytes(range(32))


APE = b"".join((b"hello", b"APETAGEX", struct.pack("<4I", 1000, 5 + 32, 1, 0), bytes(8)))
FILES = {
    "PNG": png_file(np.zeros((4, 4), np.uint8), "who"),
    "WAV": wav_file(np.arange(200, dtype=np.uint8), b"who"),
    "WebP": picture("WEBP"),
    "AIFF": sound("AIFF"),
    "ISO media": box(b"ftyp", b"M4A 0000") + box(b"moov", box(b"trak", box(b"tkhd", bytes(9))) + box(b"udta", b"me"))
    + box(b"mdat", bytes(50)),
    "TIFF": picture("TIFF", description="a picture of something", compression="raw"),
    "JPEG": picture("JPEG", comment=b"hello", exif=with_exif()) + b"trailing",
    "GIF": picture("GIF", comment=b"hello"),
    "BMP": picture("BMP"),
    "PNM": b"P5 # a comment\n4 4\n255\n" + bytes(16),
    "FLAC": sound("FLAC"),
    "Ogg": sound("OGG", "VORBIS"),
    "JPEG 2000": picture("JPEG2000"),
    "AU": sound("AU"),
    "W64": sound("W64"),
    "CAF": sound("CAF"),
    "NIST SPHERE": sound("NIST"),
    "MP3": b"ID3\4\0\0\0\0\0\5hello" + sound("MP3") + APE + b"TAG" + bytes(125),
    "ZIP": zipped(),
    "gzip": gzip.compress(bytes(1000)),
    "ELF": Path(sys.executable).resolve().read_bytes()[:3000],
    "PE": portable_executable(),
    "PDF": b"%PDF-1.4\n1 0 obj\n<</Length 9>>\nstream\n123456789\nendstream\nendobj\nxref\ntrailer\n%%EOF",
    "text": "Grüße aus der Datei\n".encode(),
    "unknown": bytes(range(256)),
}  # fmt: skip
NAMES = {
    "PNG": [("signature", "header"), ("IHDR", "header"), ("tEXt", "metadata"), ("IDAT length", "header"),
            ("IDAT", "content"), ("IEND", "header")],
    "WAV": [("RIFF", "header"), ("fmt", "header"), ("LIST INFO", "metadata"), ("data length", "header"),
            ("data", "content")],
    "ISO media": [("ftyp", "header"), ("moov", "header"), ("trak", "header"), ("tkhd", "header"), ("udta", "metadata"),
                  ("mdat length", "header"), ("mdat", "content")],
    "PNM": [("header", "header"), ("comment", "metadata"), ("header", "header"), ("pixels", "content")],
    "BMP": [("file header", "header"), ("picture header", "header"), ("pixels", "content")],
    "PE": [("DOS header", "header"), ("PE header", "header"), ("section table", "header"), (".text", "content")],
    "PDF": [("objects", "header"), ("stream", "content"), ("objects", "header")],
    **{name: [("header", "header"), ("samples", "content")] for name in ("AU", "W64", "CAF", "NIST SPHERE")},
    "text": [("text", "content")],
    "unknown": [("bytes", "content")],
}  # fmt: skip
AMONG = {
    "TIFF": {("ImageDescription", "metadata"), ("strips", "content"), ("IFD", "header"), ("TIFF header", "header")},
    "JPEG": {("SOI", "header"), ("APP1 EXIF", "metadata"), ("COM", "metadata"), ("DQT", "header"), ("SOF0", "header"),
             ("DHT", "header"), ("SOS", "header"), ("scan", "content"), ("EOI", "header"),
             ("after the end", "metadata")},
    "GIF": {("screen", "header"), ("comment", "metadata"), ("image", "content"), ("trailer", "header")},
    "FLAC": {("STREAMINFO", "header"), ("VORBIS_COMMENT", "metadata"), ("frames", "content")},
    "Ogg": {("codec header", "header"), ("comments", "metadata"), ("page header", "header"), ("audio", "content")},
    "JPEG 2000": {("jp2h", "header"), ("jp2c length", "header"), ("jp2c", "content")},
    "MP3": {("ID3v2", "metadata"), ("frames", "content"), ("APE tag", "metadata"), ("ID3v1", "metadata")},
    "ZIP": {("local header", "header"), ("entry", "content"), ("central directory", "header"),
            ("end record", "header")},
    "gzip": {("header", "header"), ("compressed data", "content"), ("checksum and length", "header")},
    "ELF": {("ELF header", "header"), ("program headers", "header")},
    "WebP": {("RIFF", "header"), ("VP8", "content")},
    "AIFF": {("FORM", "header"), ("COMM", "header"), ("SSND", "content")},
}  # fmt: skip


def ranges_of(content: bytes) -> Structure:
    found = structure(np.frombuffer(content, np.uint8))
    ends = [0, *(r.end for r in found.ranges)]
    assert [r.first for r in found.ranges] == ends[:-1]
    assert ends[-1] == len(content)
    assert all(r.first < r.end and r.name and r.kind in ("header", "metadata", "content") for r in found.ranges)
    return found


@pytest.mark.parametrize("format", FILES)
def test_parts_have_the_names_of_the_format(format: str) -> None:
    found = ranges_of(FILES[format])
    assert found.format == format
    named = [(r.name, r.kind) for r in found.ranges]
    if format in NAMES:
        assert named == NAMES[format]
    else:
        assert AMONG[format] <= set(named), named


def test_every_format_is_tried() -> None:
    assert {name for name, _, _ in FORMATS} - {"AVI", "RIFF"} <= set(FILES)


@pytest.mark.parametrize("format", ["WAV", "AIFF", "FLAC", "Ogg"])
def test_a_sound_after_an_id3_tag_has_its_own_parts(format: str) -> None:
    tag = b"ID3\4\0\0\0\0\0\5hello"
    plain, tagged = ranges_of(FILES[format]), ranges_of(tag + FILES[format])
    assert tagged.format == format
    moved = tuple(replace(r, first=r.first + len(tag), end=r.end + len(tag)) for r in plain.ranges)
    assert tagged.ranges == (Range(0, len(tag), "ID3v2", "metadata"), *moved)


@pytest.mark.parametrize("name", [b"RF64", b"BW64"])
def test_a_long_wav_has_the_parts_of_a_wav(name: bytes) -> None:
    found = ranges_of(name + FILES["WAV"][4:])
    assert found.format == "WAV"
    assert [r.name for r in found.ranges[1:]] == [name for name, _ in NAMES["WAV"][1:]]


@pytest.mark.parametrize("start", ["The free ", "How wide ", "MZ ", "P1 P2 ", "ID3 "])
def test_texts_that_begin_as_other_formats_do_are_text(start: str) -> None:
    assert ranges_of((start + "and more words. " * 10).encode()).format == "text"


def test_content_is_where_it_is() -> None:
    (data,) = (r for r in ranges_of(FILES["WAV"]).ranges if r.name == "data")
    assert FILES["WAV"][data.first : data.end] == bytes(range(200))
    (strips,) = (r for r in ranges_of(FILES["TIFF"]).ranges if r.name == "strips")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    assert FILES["TIFF"][strips.first : strips.end] == pixels.tobytes()


@given(st.binary(max_size=300))
def test_any_bytes(content: bytes) -> None:
    ranges_of(content)


STARTS = [content[:n] for content in FILES.values() for n in (12, 40)]


@given(st.sampled_from(STARTS), st.binary(max_size=400))
@example(FILES["MP3"][:15], b"\xff\xfb" * 200)
def test_any_bytes_after_the_start_of_a_format(start: bytes, content: bytes) -> None:
    ranges_of(start + content)


@settings(max_examples=400)
@given(
    st.sampled_from(sorted(FILES)),
    st.integers(0, 20_000),
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), max_size=6),
)
@example("ELF", 75, [(5, 0)])  # its 8-byte offsets, read in the wrong byte order, are larger than memory
def test_cut_and_changed_files(format: str, length: int, changes: list[tuple[int, int]]) -> None:
    content = bytearray(FILES[format][:length] if length < len(FILES[format]) else FILES[format])
    for place, value in changes:
        if content:
            content[place % min(len(content), 600)] = value
    ranges_of(bytes(content))


@pytest.mark.parametrize(
    "unit",
    [
        b"OggS" + bytes(22) + b"\0", b"ID3" + bytes(7), b"\xff\xd0", b"\xff\xff", b"PK\3\4" + bytes(26), b"stream\n",
        struct.pack(">I4s", 8, b"moov"), struct.pack(">I4s", 8, b"free"), b"\0\0\0\0tEXt\0\0\0\0", b"LIST\0\0\0\0",
        b"\x21\xfe\0", b"\xff\xfb\x90\0", b"\xff\xfb\x90\0\0", b"\x01\0\0\0", b"# \n",
        struct.pack("<HHII", 273, 4, 100_000, 8),
    ],
)  # fmt: skip
def test_hostile_repetition_ends(unit: bytes) -> None:
    """A parser that reads the file again for each unit would take hours."""
    for content in FILES.values():
        ranges_of(content[:60] + unit * (500_000 // len(unit)))

"""What a survey finds in the headers of files, or in the files themselves if the headers do not say it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from bfsys.data.packing.listing import SourceFile
from bfsys.fitting.survey import survey_of

SECONDS, RATE_HZ = 1.5, 16_000


def stored(kind: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.full(round(SECONDS * RATE_HZ), 0.1), RATE_HZ, format=kind)
    return file.getvalue()


def without_length(content: bytes) -> bytes:
    """The sound as a program writes it to a pipe."""
    if content.startswith(b"fLaC"):
        return content[:21] + bytes([content[21] & 0xF0, 0, 0, 0, 0]) + content[26:]
    at = content.index(b"data") + 4
    return content[:at] + bytes(4) + content[at + 4 :]


def as_bw64(content: bytes) -> bytes:
    return b"BW64" + content[4:]


def tagged(content: bytes) -> bytes:
    """The sound after an ID3 tag with a picture of 100 kB."""
    return b"ID3\4\0\0\0\6\x0d\x20" + bytes(100_000) + content


@pytest.mark.parametrize(
    ("kind", "write"),
    [
        *(("WAV", bytes), ("FLAC", bytes), ("WAV", without_length), ("FLAC", without_length), ("RF64", as_bw64)),
        *(("W64", bytes), ("CAF", bytes), ("NIST", bytes)),
        *(("WAV", tagged), ("FLAC", tagged), ("OGG", tagged), ("AIFF", tagged)),
    ],
)
def test_the_length_of_sounds_is_known(tmp_path: Path, kind: str, write) -> None:
    content = write(stored(kind))
    files = []
    for number, split in enumerate(("train", "train", "val")):
        path = tmp_path / f"{number}.{kind.lower()}"
        path.write_bytes(content)
        files.append(SourceFile(str(path), "ab"[number % 2], split, f"{number}", kind.lower(), len(content)))
    found = survey_of(files, ["a", "b"])
    assert (found.modality, found.typical_size, found.rate_hz) == ("audio", SECONDS, RATE_HZ)
    assert "an MP3" not in found.kinds


@pytest.mark.parametrize(("compression", "compressed"), [("raw", False), ("tiff_lzw", True), ("group4", True)])
def test_compressed_tiffs_are_recognised(tmp_path: Path, compression: str, compressed: bool) -> None:
    """Scanners write them. Models learn slowly from them, as from PNG."""
    files = []
    for number, split in enumerate(("train", "train", "val")):
        path = tmp_path / f"{number}.tif"
        Image.new("1", (30, 20)).save(path, compression=compression)
        files.append(SourceFile(str(path), "ab"[number % 2], split, f"{number}", "tif", path.stat().st_size))
    found = survey_of(files, ["a", "b"])
    assert (found.modality, found.typical_size, found.is_compressed) == ("image", 20.0, compressed)


@pytest.mark.parametrize(
    ("kind", "options", "compressed"),
    [("AVIF", {}, True), ("JPEG2000", {}, True), ("TIFF", {"big_tiff": True}, False)],
)
def test_less_common_pictures_are_pictures(tmp_path: Path, kind: str, options: dict, compressed: bool) -> None:
    """`bfsys pack` decodes them, so `bfsys fit` re-encodes them too."""
    files = []
    for number, split in enumerate(("train", "train", "val")):
        path = tmp_path / f"{number}.picture"
        Image.new("RGB", (30, 20)).save(path, kind, **options)
        files.append(SourceFile(str(path), "ab"[number % 2], split, f"{number}", "picture", path.stat().st_size))
    found = survey_of(files, ["a", "b"])
    assert (found.modality, found.typical_size, found.is_compressed) == ("image", 20, compressed)


def test_files_beside_most_pictures_are_noted(tmp_path: Path) -> None:
    """Notes of a camera or a program beside each picture, for example, keep all pictures from being re-encoded."""
    picture = io.BytesIO()
    Image.new("L", (30, 20)).save(picture, "PNG")
    files = []
    for number in range(10):
        path = tmp_path / f"{number}.{'json' if number % 3 == 2 else 'png'}"
        path.write_bytes(b"{}" if number % 3 == 2 else picture.getvalue())
        files.append(SourceFile(str(path), "ab"[number % 2], "train", f"{number}", path.suffix[1:], 9))
    found = survey_of(files, ["a", "b"])
    assert found.modality is None
    note = "note: 70 % of the files are pictures, and the others are not, so no file is re-encoded"
    assert any(line.startswith(note) for line in found.describe())
    assert not any("note" in line for line in survey_of(files[::3], ["a", "b"]).describe())

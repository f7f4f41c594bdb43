"""A file is recognised as having a format by the bytes that all files of the format share."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import pytest

from bfsys.data.media.encodings import ENCODINGS, parse_encoding
from bfsys.data.media.input_formats import input_format, kind_of
from bfsys.data.media.sounds import Clip

PICTURES = ["tiff", "png", "jpeg:60", "jpeg:100", "fhwc"]
SOUNDS = ["wav:uint8", "wav:int16", "wav:int32", "wav:float32", "mp3", "flac"]


def as_array(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def pictures(height: int, width: int) -> Iterator[np.ndarray]:
    """uint8 [height, width, 3], smooth in one direction."""
    rng = np.random.default_rng(1)
    for axis in (0, 1, 0, 1):
        pixels = rng.uniform(0, 255, 3) + np.cumsum(rng.normal(0, 3, (height, width, 1)), axis=axis)
        yield pixels.clip(0, 255).astype(np.uint8)


def waves(samples: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(1)
    for loudness in (0.01, 0.3, 0.9):
        tone = loudness * np.sin(np.cumsum(rng.uniform(0, 0.2, samples)))
        yield (tone + rng.normal(0, 0.01, samples)).astype(np.float32)


@pytest.fixture(scope="module")
def files() -> list[tuple[str, dict, np.ndarray]]:
    """(encoding, sizes, file)"""
    found = []
    for name in PICTURES:
        for height, width in ((24, 24), (64, 64), (90, 200)):
            sizes = {"image_size": height} if height == width else {}
            found += [(name, sizes, as_array(parse_encoding(name).file_of(p))) for p in pictures(height, width)]
    for name in SOUNDS:
        for rate, seconds in ((16_000, 0.5), (16_000, 1.2), (44_100, 0.5)):
            sizes = {"sample_rate_hz": rate, "seconds": seconds}
            made = (parse_encoding(name).file_of(Clip(wave, rate)) for wave in waves(round(rate * seconds)))
            found += [(name, sizes, as_array(content)) for content in made]
    return found


@pytest.mark.parametrize("name", [*PICTURES, *SOUNDS])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"image_size": 64}, {"sample_rate_hz": 16_000}, {"sample_rate_hz": 44_100, "seconds": 0.5}],
    ids=str,
)
def test_files_of_a_format_are_distinguished_from_all_others(name: str, sizes: dict, files) -> None:
    wanted = input_format(name, sizes)
    sizes = {key: value for key, value in sizes.items() if getattr(wanted.fitting, key)}
    for encoding, of_file, data in files:
        is_of_it = encoding == name and all(of_file.get(key) == value for key, value in sizes.items())
        assert wanted.matches(data) == is_of_it, (encoding, of_file)


def test_damaged_and_other_files_are_in_no_format() -> None:
    others = [b"", b"R", b"RIFF", b"some text", bytes(100), b"\xff\xd8\xff\xe0", b"fLaC\0\0\0\x22", b"II*\0\x08"]
    for name in [*PICTURES, *SOUNDS]:
        for sizes in ({}, {"image_size": 8, "sample_rate_hz": 1_000, "seconds": 0.1}):
            found = [other for other in others if input_format(name, sizes).matches(as_array(other))]
            pixels_of_any_number = [b"", b"R", b"RIFF", b"some text", bytes(100)]
            assert found == (pixels_of_any_number if name == "fhwc" and not sizes else []), (name, sizes)


@pytest.mark.parametrize("name", sorted(set(ENCODINGS) - {"fhwc", "fchw"}))
def test_kinds_are_known_by_their_first_bytes(name: str) -> None:
    row = ENCODINGS[name]
    encoding = parse_encoding(f"{name}:{row.options[0]}" if row.options else name)
    content = next(pictures(8, 8)) if row.modality == "image" else Clip(next(waves(400)), 8_000)
    kind = kind_of(as_array(encoding.file_of(content)))
    assert kind is not None
    assert (kind.name.split()[-1].lower(), kind.modality) == (name, row.modality)


def test_other_files_are_of_no_kind() -> None:
    assert kind_of(as_array(b"BMxt")) is None
    assert kind_of(np.full(100, 255, np.uint8)) is None  # white pixels, not an MP3
    assert kind_of(as_array(b"RIFF\0\0\0\0WEBPVP8 ")).name == "a WebP"  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["ID3 is a format of tags", "P1 P2 P3\n1 2 3\n", "P6\tname\n"])
def test_texts_that_begin_as_pictures_or_sounds_do_are_of_no_kind(text: str) -> None:
    assert kind_of(as_array(text.encode())) is None


TAG = b"ID3\4\0\0\0\0\0\5hello"


APE = b"APETAGEX" + struct.pack("<4I", 2000, 5, 0, 0xA0000000) + bytes(8) + b"hello"


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"fLaC", "a FLAC"), (b"RIFF\0\0\0\0WAVE", "a WAV"), (b"OggS", "an Ogg"), (b"\xff\xfb\x90", "an MP3")],
)
def test_a_sound_after_tags_is_of_its_own_kind(content: bytes, name: str) -> None:
    for tags in (TAG, TAG + TAG, APE, TAG + APE):
        assert kind_of(as_array(tags + content)).name == name  # type: ignore[union-attr]
    for other in (b"", b"\xff\xfb\x90", b"\x89PNG\r\n\x1a\n"):
        assert kind_of(as_array(TAG + other)).name == "an MP3"  # type: ignore[union-attr]


def test_unknown_formats_and_sizes_are_ignored() -> None:
    assert not input_format("jpeg2000:9", {}).is_known
    assert not input_format("as_stored", {"image_size": 8}).is_known
    odd = input_format("png", {"image_size": "8", "seconds": 3, "more": []})
    assert odd == input_format("png", {})
    assert input_format("wav:int16", {"seconds": float("inf"), "sample_rate_hz": -1}).describe() == "wav:int16"
    assert not input_format("mp3", {"sample_rate_hz": 7, "seconds": 1}).matches(as_array(b"text"))


def test_a_format_is_described() -> None:
    text = input_format("wav:uint8", {"seconds": 1.0, "sample_rate_hz": 16_000}).describe()
    assert text == "wav:uint8 of 1 s at 16,000 Hz"
    assert input_format("jpeg", {"image_size": 224}).describe() == "jpeg:100 of 224 × 224 pixels"

"""The formats in which a model reads pictures and sounds, and whether a file is in one of them.

A format is an encoding and the size to which files are brought. This module encodes a few examples to find what all
files of a format have in common: the header bytes that never differ and, if the encoding does not compress and the size
is known, the length. This distinguishes a JPEG of another quality, a WAV of another sample type and a TIFF of another
size without a parser for each encoding. Rejected alternative: Pillow and libsndfile, which do not say how a file was
written.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from bfsys.data.media.encodings import AS_STORED, Encoding, Fitting, parse_encoding
from bfsys.data.media.sounds import Clip, size_of_tags
from bfsys.errors import UserError

# Sizes of examples for formats without a fixed size. Together they differ in every header byte that can differ.
PICTURE_SIZES = ((24, 40), (300, 700))  # height and width, in pixels
SOUND_SIZES = ((8_000, 500), (16_000, 70_000), (44_100, 2_000), (192_000, 5_000))  # Hz, samples
# The largest examples that are made in the size of the format. Of larger formats, only bytes that do not depend on the
# size are compared.
LARGEST_PICTURE = 1_024  # pixels, of a square
LONGEST_SOUND = 2**22  # samples


class FileKind(NamedTuple):
    """The kind of a file, judged by its first bytes."""

    name: str  # name with an article
    modality: str
    magic: re.Pattern[bytes]


KINDS = tuple(
    FileKind(name, modality, re.compile(magic, re.DOTALL))
    for name, modality, magic in (
        ("a JPEG", "image", rb"\xff\xd8\xff"),
        ("a PNG", "image", rb"\x89PNG\r\n\x1a\n"),
        ("a TIFF", "image", rb"II[*+]\0|MM\0[*+]"),
        ("a GIF", "image", rb"GIF8[79]a"),
        ("a BMP", "image", rb"BM.{4}\0{4}"),
        ("a PNM", "image", rb"P[1-6]\s+[\d#]"),
        ("a WebP", "image", rb"RIFF.{4}WEBP"),
        ("an AVIF", "image", rb".{4}ftypavi[fs]"),
        ("a JPEG 2000", "image", rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
        ("a WAV", "audio", rb"(?:RIFF|RIFX|RF64|BW64).{4}WAVE"),
        ("an AIFF", "audio", rb"FORM.{4}AIF[FC]"),
        ("a FLAC", "audio", rb"fLaC"),
        ("an Ogg", "audio", rb"OggS"),
        ("an AU", "audio", rb"\.snd"),
        ("a W64", "audio", rb"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb"),
        ("a CAF", "audio", rb"caff\0\x01"),
        ("a NIST SPHERE file", "audio", rb"NIST_1A"),
        ("an MP3", "audio", rb"ID3[\x02-\x04]|\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xef]"),
    )
)
LONGEST_MAGIC = 12
FLAC_HEADER_BYTES = 26  # up to the checksum of the samples; includes the sizes of frames, which vary


def kind_of(data: np.ndarray) -> FileKind | None:
    """The kind of picture or sound that the first bytes of a file (uint8 [n]) indicate; None for any other file. Of a
    sound with a tag before it, the bytes after the tag decide; the other files with an ID3 tag count as MP3."""
    kind, tag = _kind_of_bytes(data), size_of_tags(data)
    tagged = _kind_of_bytes(data[tag:]) if tag else None
    return tagged if tagged and tagged.modality == "audio" else kind


def _kind_of_bytes(data: np.ndarray) -> FileKind | None:
    start = data[:LONGEST_MAGIC].tobytes()
    return next((kind for kind in KINDS if kind.magic.match(start)), None)


@dataclass(frozen=True)
class InputFormat:
    """An encoding, and the size to which files are fitted before it. `as_stored` means files of any format."""

    encoding: Encoding
    fitting: Fitting

    @property
    def is_known(self) -> bool:
        return self.encoding.modality is not None

    def describe(self) -> str:
        """The format as text, such as `wav:uint8 of 1 s at 16,000 Hz`."""
        size, rate, seconds = self.fitting.image_size, self.fitting.sample_rate_hz, self.fitting.seconds
        text = self.encoding.text
        text += f" of {size} × {size} pixels" if size else ""
        text += f" of {seconds:g} s" if seconds else ""
        return text + (f" at {rate:,} Hz" if rate else "")

    def to_tree(self) -> dict:
        """The format as a tree for a checkpoint's manifest."""
        return {"encoding": self.encoding.text, **asdict(self.fitting)}

    def matches(self, data: np.ndarray) -> bool:
        """Whether a file (uint8 [n]) appears to have this format. Not for `as_stored`."""
        common = _common_to_all(self.encoding.text, self.fitting)
        if common.length is not None:
            if len(data) != common.length:
                return False
        elif not len(common.places):  # the format has no header and no fixed size
            return kind_of(data) is None
        if len(common.places) and common.places[-1] >= len(data):
            return False
        return bool(np.array_equal(data[common.places], common.values))


def input_format(encoding: str, sizes: Mapping[str, object]) -> InputFormat:
    """The format that a manifest, a dataset.json or a config describes. `sizes` holds the fields of a Fitting; other
    keys are ignored.

    An unknown encoding counts as `as_stored`, since a user or another program may have written it.
    """
    try:
        parsed = parse_encoding(encoding)
    except UserError:
        parsed = parse_encoding(AS_STORED)
    image_size, sample_rate_hz, seconds = (
        _size(sizes.get(name)) for name in ("image_size", "sample_rate_hz", "seconds")
    )
    if parsed.modality == "image":
        return InputFormat(parsed, Fitting(image_size=int(image_size) if image_size else None))
    if parsed.modality == "audio":
        return InputFormat(
            parsed, Fitting(sample_rate_hz=int(sample_rate_hz) if sample_rate_hz else None, seconds=seconds)
        )
    return InputFormat(parsed, Fitting())


def _size(value: object) -> float | None:
    return value if isinstance(value, int | float) and 0 < value < math.inf else None


class _Common(NamedTuple):
    """The header bytes, and the length if it is fixed, that all files of a format share."""

    places: np.ndarray  # int64 [n], ascending, in the header
    values: np.ndarray  # uint8 [n]
    length: int | None  # bytes; None: it varies


@functools.lru_cache(maxsize=64)
def _common_to_all(encoding_text: str, fitting: Fitting) -> _Common:
    encoding = parse_encoding(encoding_text)
    of_sizes = list(_examples(encoding, fitting)) or list(_examples(encoding, Fitting()))  # a rate it lacks
    files = [file for of_size in of_sizes for file in of_size]
    header = FLAC_HEADER_BYTES if encoding.text == "flac" else min(map(_common_start, of_sizes))
    stacked = _stacked(files, header)
    places = np.flatnonzero((stacked == stacked[0]).all(axis=0))
    fixed = len(of_sizes) == 1 and not encoding.compresses
    return _Common(places, stacked[0][places], len(files[0]) if fixed else None)


def _common_start(files: list[bytes]) -> int:
    """The number of bytes before the first one in which the files differ."""
    stacked = _stacked(files, min(map(len, files)))
    differs = (stacked != stacked[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else stacked.shape[1]


def _stacked(files: list[bytes], length: int) -> np.ndarray:
    """uint8 [files, length]: their first bytes."""
    return np.stack([np.frombuffer(file, np.uint8, length) for file in files])


def _examples(encoding: Encoding, fitting: Fitting) -> Iterator[list[bytes]]:
    """Lists of files of one size and different content."""
    if encoding.modality == "image":
        size = fitting.image_size or 0
        for height, width in ((size, size),) if 0 < size <= LARGEST_PICTURE else PICTURE_SIZES:
            yield [encoding.file_of(pixels) for pixels in _pictures(height, width)]
        return
    rate = fitting.sample_rate_hz
    for rate_hz, samples in SOUND_SIZES:
        rate_hz = rate or rate_hz
        fitted = max(1, round((fitting.seconds or 0) * rate_hz))
        is_fitted = fitting.seconds is not None and fitted <= LONGEST_SOUND
        try:
            yield [encoding.file_of(Clip(wave, rate_hz)) for wave in _waves(fitted if is_fitted else samples)]
        except ValueError:  # the format does not support this rate
            continue
        if rate and is_fitted:
            return


def _pictures(height: int, width: int) -> Iterator[np.ndarray]:
    """uint8 [height, width, 3]: dark and bright, noisy and smooth."""
    rng = np.random.default_rng(0)
    across = np.linspace(40, 200, width)[None, :, None] + np.zeros((height, 1, 3))
    for pixels in (across * 0, across * 0 + 255, across, across + rng.normal(0, 30, across.shape)):
        yield pixels.clip(0, 255).astype(np.uint8)


def _waves(samples: int) -> Iterator[np.ndarray]:
    """float32 [samples]: silence, a tone, noise."""
    rng = np.random.default_rng(0)
    yield np.zeros(samples, np.float32)
    yield (0.4 * np.sin(0.3 * np.arange(1, samples + 1))).astype(np.float32)
    yield rng.uniform(-0.9, 0.9, samples).astype(np.float32)

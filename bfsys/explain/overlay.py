"""Evidence over the pixels of pictures that are stored without compression, and over PCM samples."""

from __future__ import annotations

import base64
import io
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bfsys.data.media.pictures import opened
from bfsys.explain.ranges import Range
from bfsys.explain.structure import structure

if TYPE_CHECKING:
    from PIL import Image

MOST_BYTES = 4_000_000  # largest file that is shown as a picture
SIDE = 512  # pixels of a shown picture's longer side
BINS = 240  # along a waveform
PICTURES = {"PNG": "png", "JPEG": "jpeg", "GIF": "gif", "WebP": "webp", "BMP": "bmp"}  # formats that browsers show
# Sample types by (format tag, bits per sample)
SAMPLES = {(1, 8): "u1", (1, 16): "i2", (1, 32): "i4", (3, 32): "f4"}
EXTENSIBLE = 0xFFFE


@dataclass(frozen=True)
class Picture:
    """A picture as a data: URI, and the evidence of its pixels."""

    uri: str
    width: int
    height: int
    evidence: np.ndarray | None
    """float64 [height, width], at the picture's size or reduced; None if bytes do not correspond to pixels."""


@dataclass(frozen=True)
class Waveform:
    """A sound in BINS or fewer runs of samples: lowest and highest sample between -1 and 1, and the evidence."""

    lowest: np.ndarray
    highest: np.ndarray
    evidence: np.ndarray


def picture_of(format: str, stored: np.ndarray, gradients: np.ndarray | None) -> Picture | None:
    """The picture in a file (uint8 [n]), if browsers or Pillow can show it.

    gradients: float32 [n], or None if they do not belong to the bytes of the file
    """
    if format not in (*PICTURES, "TIFF", "PNM") or len(stored) > MOST_BYTES:
        return None
    pixels = _decoded(stored)
    if pixels is None:
        return None
    evidence = None if gradients is None else _evidence_of_pixels(stored, pixels, gradients)
    height, width = pixels.shape[:2]
    if evidence is None and format in PICTURES:
        return Picture(_uri(PICTURES[format], stored.tobytes()), width, height, None)
    with opened(stored.tobytes()) as image:
        return Picture(_png_uri(image.convert("RGB")), width, height, evidence)


def _decoded(stored: np.ndarray) -> np.ndarray | None:
    """The pixels as Pillow gives them, [height, width] or [height, width, channels]; None if it cannot read them."""
    try:
        with opened(stored.tobytes()) as image:
            return np.asarray(image) if image.width * image.height <= MOST_BYTES else None
    except Exception:  # decoders raise any exception on a damaged file
        return None


def _evidence_of_pixels(stored: np.ndarray, pixels: np.ndarray, gradients: np.ndarray) -> np.ndarray | None:
    """[height, width]; None if pixels are not bytes of the file.

    The decoder maps bytes to pixels: each byte is replaced by its offset in the file, digit by digit, and the file is
    decoded again. So the layout of rows, planes and colours need not be known.
    """
    if pixels.dtype != np.uint8 or pixels.size > len(stored):
        return None
    place = np.arange(len(stored))
    for content in _contents(stored, pixels.size):
        index = np.zeros(pixels.shape, np.int64)
        for digit in range(3):
            numbered = stored.copy()
            numbered[content] = (place[content] >> (8 * digit)) & 255
            decoded = _decoded(numbered)
            if decoded is None or decoded.shape != pixels.shape:
                break
            index += decoded.astype(np.int64) << (8 * digit)
        else:
            if index.max() < len(stored) and np.array_equal(stored[index], pixels):
                values = gradients[index]
                return values.sum(2) if values.ndim == 3 else values
    return None


def _contents(stored: np.ndarray, size: int) -> list[slice]:
    """The parts of a file that may hold `size` pixels."""
    return [slice(r.first, r.end) for r in structure(stored).ranges if r.kind == "content" and r.end - r.first >= size]


def overlay_uri(colours: np.ndarray) -> str:
    """uint8 [height, width, 4] as a PNG."""
    from PIL import Image

    return _png_uri(Image.fromarray(colours))


def _png_uri(image: Image.Image) -> str:
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return _uri("png", file.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def waveform_of(format: str, stored: np.ndarray, gradients: np.ndarray, ranges: tuple[Range, ...]) -> Waveform | None:
    """The waveform of a WAV file of PCM samples (uint8 [n], float32 [n]); the mean of its channels."""
    if format != "WAV" or any(r.name == "RIFX" for r in ranges):
        return None
    heads = [r for r in ranges if r.name == "fmt" and r.end - r.first >= 24]
    data = [r for r in ranges if r.name == "data" and r.kind == "content"]
    if not heads or not data:
        return None
    tag, channels, _, _, _, bits = struct.unpack_from("<HHIIHH", stored.tobytes(), heads[0].first + 8)
    dtype = SAMPLES.get((1 if tag == EXTENSIBLE else tag, bits))
    if dtype is None or not 1 <= channels <= 64:
        return None
    frame = np.dtype(dtype).itemsize * channels
    first, frames = data[0].first, (data[0].end - data[0].first) // frame
    if not frames:
        return None
    part = slice(first, first + frames * frame)
    samples = np.frombuffer(stored[part].tobytes(), f"<{dtype}").astype(np.float64).reshape(frames, channels)
    if dtype == "u1":
        samples = (samples - 128) / 128
    elif dtype != "f4":
        samples /= 2.0 ** (bits - 1)
    wave = np.nan_to_num(samples.mean(1)).clip(-1, 1)
    evidence = gradients[part].reshape(frames, frame).sum(1)
    starts = np.unique(np.linspace(0, frames, min(BINS, frames), endpoint=False).astype(np.int64))
    return Waveform(
        np.minimum.reduceat(wave, starts), np.maximum.reduceat(wave, starts), np.add.reduceat(evidence, starts)
    )

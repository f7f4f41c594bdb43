"""What kinds of files can be decoded: a modality is a row in this table.

The model never decodes and is never told the modality. Decoding serves packing into another encoding
and augmentation in the decoded domain only. Alternative refused: decoding through torchvision and
torchaudio, whose results and back ends change between releases.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Clip(NamedTuple):
    """A sound with one channel."""

    wave: np.ndarray  # float32 [samples], in -1 … 1
    rate_hz: int


@dataclass(frozen=True)
class Modality:
    extensions: tuple[str, ...]  # lower case; tells a misplaced file before anything is decoded
    decode: Callable[[bytes], np.ndarray | Clip]


def decode_image(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]. The orientation noted by a camera (EXIF) is not applied, as in ImageNet training."""
    from PIL import Image  # slow to import, and unused by runs on files as stored

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def decode_audio(data: bytes) -> Clip:
    """Channels are averaged, as published."""
    import soundfile

    wave, rate_hz = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    return Clip(wave.mean(axis=1), rate_hz)


MODALITIES = {
    "image": Modality(("jpg", "jpeg", "png", "tif", "tiff", "bmp", "gif", "webp", "ppm", "pgm"), decode_image),
    "audio": Modality(("wav", "flac", "mp3", "ogg", "opus", "aif", "aiff", "au"), decode_audio),
}

"""What kinds of files can be decoded: a modality is a row in this table.

The model never decodes and is never told the modality. Decoding serves packing into another encoding
and augmentation in the decoded domain only. Alternative refused: decoding through torchvision and
torchaudio, whose results and back ends change between releases.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bfsys.data.pictures import PECULIARITIES, decode_image, peculiarities_of_image
from bfsys.data.sounds import Clip, decode_audio

__all__ = ["MODALITIES", "PECULIARITIES", "Clip", "Modality", "decode_audio", "decode_image", "peculiarities_of"]


@dataclass(frozen=True)
class Modality:
    extensions: tuple[str, ...]  # lower case; tells a misplaced file before anything is decoded
    decode: Callable[..., np.ndarray | Clip]  # takes the file's bytes; raises on a damaged file


MODALITIES = {
    "image": Modality(("jpg", "jpeg", "png", "tif", "tiff", "bmp", "gif", "webp", "ppm", "pgm"), decode_image),
    "audio": Modality(("wav", "flac", "mp3", "ogg", "opus", "aif", "aiff", "au"), decode_audio),
}


def peculiarities_of(data: bytes, modality: str) -> tuple[str, ...]:
    """Which keys of PECULIARITIES a file of this modality has: what decoding leaves out of it."""
    return peculiarities_of_image(data) if modality == "image" else ()

"""The kinds of files that can be decoded: a modality is a row in this table.

The model never decodes a file and is never told the modality. Files are decoded only to write them in another encoding,
to augment or jitter them, and for the content loss. Rejected alternative: decoding through torchvision and torchaudio,
whose results and back ends change between releases.
"""

from dataclasses import dataclass

from bfsys.data.media.pictures import PECULIARITIES, decode_image, peculiarities_of_image
from bfsys.data.media.sounds import Clip, decode_audio

__all__ = ["MODALITIES", "PECULIARITIES", "Clip", "Modality", "decode_audio", "decode_image", "peculiarities_of"]


@dataclass(frozen=True)
class Modality:
    extensions: tuple[str, ...]  # lower case; a file with another extension is rejected without decoding


MODALITIES = {
    "image": Modality(("jpg", "jpeg", "png", "tif", "tiff", "bmp", "gif", "webp", "ppm", "pgm")),
    "audio": Modality(("wav", "flac", "mp3", "ogg", "opus", "aif", "aiff", "au")),
}


def peculiarities_of(data: bytes, modality: str | None) -> tuple[str, ...]:
    """The keys of PECULIARITIES that apply to a file of this modality: content that decoding drops."""
    return peculiarities_of_image(data) if modality == "image" else ()

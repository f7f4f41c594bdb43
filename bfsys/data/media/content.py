"""The content of a picture or sound as a small table, whose rows follow the order of the file. For the content loss
(model/content_head.py), tokens learn to predict this table.

A picture becomes strips from top to bottom, and a sound becomes short spectra from its beginning to its end. Nearly all
formats store content in this order. The place of a token in the file therefore corresponds roughly to the place of what
it shows, also in compressed files, which have no exact places.

Only training decodes files for this. Rejected alternative: exact places from a parser of each format, which knows the
pixels of a TIFF but not those of a progressive JPEG, and which gained nothing on PNG (docs/experiments.md).
"""

from __future__ import annotations

import functools
import warnings
from contextlib import suppress

import numpy as np

from bfsys.batch import CONTENT_COLUMNS as COLUMNS
from bfsys.batch import CONTENT_ROWS as ROWS
from bfsys.data.media.input_formats import kind_of
from bfsys.data.media.pictures import decode_image, opened
from bfsys.data.media.sounds import (
    UNKNOWN_FRAMES,
    Clip,
    announced_samples,
    decode_audio,
    open_sound,
    without_tags,
)

COLOURS = 3
WINDOW_S = 0.032
LOWEST_HZ = 60.0
# Longer sounds and larger pictures have no table: decoding one would take up to seconds in every epoch
LONGEST_S, MOST_PIXELS = 120.0, 2**24
# Power, relative to the loudest of a sound, below which everything counts as silence
SILENCE, LEAST_POWER = 1e-4, 1e-9
# Added to a table's standard deviation, so that the noise of a uniform picture or of silence is not amplified
LEAST_PICTURE_DEVIATION, LEAST_SOUND_DEVIATION = 0.1, 1e-3
NONE = np.full((ROWS, COLUMNS), np.nan, np.float16)  # the table of a file that has none


def content_of(data: bytes) -> np.ndarray:
    """float16 [ROWS, COLUMNS] with mean 0 and standard deviation 1 or less; NONE for a file that is not a picture or
    sound, is too large, or cannot be decoded."""
    kind = kind_of(np.frombuffer(data, np.uint8))
    try:
        if kind and kind.modality == "image" and not _is_large(data):
            return _normalised(_strips(decode_image(data)), LEAST_PICTURE_DEVIATION)
        if kind and kind.modality == "audio" and not _is_long(without_tags(data)):
            clip = decode_audio(data, LONGEST_S)  # of an unknown length, no more than is needed is decoded
            if len(clip.wave) <= LONGEST_S * clip.rate_hz:
                with np.errstate(all="ignore"):  # samples of a float file may be huge
                    return _normalised(_spectra(clip), LEAST_SOUND_DEVIATION)
    except MemoryError:
        raise
    except Exception:  # decoders raise any exception; the model also reads files that cannot be decoded
        pass
    return NONE


def _is_large(data: bytes) -> bool:
    with opened(data) as image:
        return image.width * image.height > MOST_PIXELS


def _is_long(data: bytes) -> bool:
    import soundfile  # slow to import

    with suppress(soundfile.LibsndfileError), open_sound(data, announced_samples(data)) as file:
        return LONGEST_S * file.samplerate < file.frames < UNKNOWN_FRAMES
    return False  # decode_audio reads some files that libsndfile does not, and reports the problem of the others


def _normalised(table: np.ndarray, least_deviation: float) -> np.ndarray:
    return ((table - table.mean()) / (table.std() + least_deviation)).astype(np.float16)


def _strips(pixels: np.ndarray) -> np.ndarray:
    """float32 [ROWS, COLUMNS]: the means of 16 cells per strip, in three colours."""
    from PIL import Image

    small = Image.fromarray(pixels).resize((COLUMNS // COLOURS, ROWS), Image.Resampling.BOX)
    return np.asarray(small, np.float32).reshape(ROWS, COLUMNS) / 255


def _spectra(clip: Clip) -> np.ndarray:
    """float32 [ROWS, COLUMNS]: logarithms of the power in mel bands, in windows whose centres are evenly spaced."""
    width = max(2, round(WINDOW_S * clip.rate_hz))
    padded = np.pad(clip.wave, (width, width))
    middle = (np.arange(ROWS) + 0.5) / ROWS * len(clip.wave) + width
    frames = padded[(middle - width / 2).astype(int)[:, None] + np.arange(width)]
    spectrum = np.fft.rfft(frames * np.hanning(width).astype(np.float32), n=2 * width, axis=1)
    power = np.abs(spectrum).astype(np.float32) ** 2
    # Not a matrix product: its last bits depend on the number of threads, which differs between machines
    power = np.einsum("rf,fc->rc", power, _mel_bands(clip.rate_hz, width))
    return np.log(power + SILENCE * power.max() + LEAST_POWER)


@functools.lru_cache(maxsize=8)
def _mel_bands(rate_hz: int, width: int) -> np.ndarray:
    """float32 [width + 1, COLUMNS]"""
    from torchaudio.functional import melscale_fbanks

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # low rates leave some bands empty
        return melscale_fbanks(width + 1, LOWEST_HZ, rate_hz / 2, COLUMNS, rate_hz).numpy()

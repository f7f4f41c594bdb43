"""File encodings: the bytes of a picture or a sound that the model reads.

A file encoding is a function and a row in ENCODINGS. File sizes equal the published ones to the byte, because they
determine the number of tokens. A picture of 224 × 224 has 150,668 bytes as TIFF, 150,864 as (stored) PNG, and 150,528
as fhwc or fchw. One second at 16 kHz has 64,058 bytes as float32, 64,080 as int32, 32,044 as int16, 16,044 as uint8 and
3,240 as mp3. WAV headers are written here, because libsndfile's differ in length.

Integer samples are truncated towards zero as in the paper, but values beyond ±1 are clipped, where the published
code wraps around. MP3 has 24 kbit/s at 16 kHz, as sox writes it. Both use LAME, so lengths are equal, but the bytes may
differ with LAME's version. At 32 kHz and above, libsndfile adds an information frame that sox does not write.
"""

import io
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from bfsys.data.media.pictures import MOST_PIXELS, decode_image
from bfsys.data.media.sounds import MOST_SAMPLES, Clip, check_finite, decode_audio
from bfsys.errors import UserError, did_you_mean, is_out_of_memory

AS_STORED = "as_stored"

# Ratio of resizing to cropping, as in 256 and 224 pixels, for any size
RESIZE_OVER_CROP = 256 / 224
BICUBIC_REACH = 3  # pixels on each side, when a picture is enlarged

# Largest kernel of torchaudio's resampling (64 MB): old rate times new rate, both divided by their common divisor.
MOST_KERNEL = 2**24
# As in torchaudio: zero crossings of the sinc on each side, and the share of the band that is kept
ZERO_CROSSINGS, ROLLOFF = 6, 0.99
# Weights that resampling without that kernel computes at a time
BLOCK_WEIGHTS = 2**20

MP3_BITS_PER_SAMPLE = 1.5  # 24 kbit/s at 16 kHz
PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
PCM_GUID = struct.pack("<H", PCM) + bytes.fromhex("000000001000800000aa00389b71")
FRONT_CENTRE = 4

# Float files may exceed full scale, which is 1. Samples beyond this are numbers of another scale, such as ±32,767.
MOST_FULL_SCALE = 100

# A sample in -1 … 1 becomes a number of each type by (x + shift) · scale
WAV_TYPES = {
    "uint8": ("u1", 1.0, 127.5),
    "int16": ("<i2", 0.0, 2**15 - 1),
    "int32": ("<i4", 0.0, 2**31 - 1),
    "float32": ("<f4", 0.0, 1.0),
}


class WrongRateError(ValueError):
    """A format does not support the sample rate of a sound."""


@dataclass(frozen=True)
class Encoding:
    """An encoding. Two encodings of the same text are equal. `as_stored` has no modality, extension or function."""

    text: str  # in full: jpeg:100, not jpeg
    modality: str | None = None
    extension: str | None = None
    encode: Callable[[np.ndarray | Clip], bytes] | None = field(default=None, compare=False)

    @property
    def compresses(self) -> bool:
        """Whether the length of a file depends on its content, not only on its size in pixels or samples."""
        return self.text.partition(":")[0] in ("jpeg", "flac")

    def file_of(self, content: np.ndarray | Clip) -> bytes:
        """The bytes of a file of this encoding. Not for `as_stored`."""
        assert self.encode is not None, "what stays as stored is not decoded"
        return self.encode(content)


@dataclass(frozen=True)
class Row:
    modality: str
    extension: str
    encode: Callable[..., bytes]  # arguments: the option, if there are options, then the decoded content
    options: tuple[str, ...] = ()
    default: str | None = None


def encode_fchw(pixels: np.ndarray) -> bytes:
    """The pixels as one plane per channel."""
    return pixels.transpose(2, 0, 1).tobytes()


def encode_jpeg(quality: str, pixels: np.ndarray) -> bytes:
    """Encode with Pillow's defaults (colour at half resolution, standard Huffman tables), as published."""
    return _written_by_pillow(pixels, format="JPEG", quality=int(quality))


def _written_by_pillow(pixels: np.ndarray, **kind) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **kind)
    return file.getvalue()


def encode_wav(sample_type: str, clip: Clip) -> bytes:
    dtype, shift, scale = WAV_TYPES[sample_type]
    if sample_type == "float32":
        check_finite(clip.wave)
        samples = clip.wave.astype(dtype)
    else:
        samples = ((_clipped(clip.wave.astype(np.float64)) + shift) * scale).astype(dtype)
    width = samples.itemsize
    rates = struct.pack("<IIHH", clip.rate_hz, clip.rate_hz * width, width, 8 * width)
    fact = _chunk(b"fact", struct.pack("<I", len(samples)))
    if sample_type == "float32":
        head = _chunk(b"fmt ", struct.pack("<HH", FLOAT, 1) + rates + struct.pack("<H", 0)) + fact
    elif sample_type == "int32":
        extension = struct.pack("<HHI", 22, 8 * width, FRONT_CENTRE) + PCM_GUID
        head = _chunk(b"fmt ", struct.pack("<HH", EXTENSIBLE, 1) + rates + extension) + fact
    else:
        head = _chunk(b"fmt ", struct.pack("<HH", PCM, 1) + rates)
    return _chunk(b"RIFF", b"WAVE" + head + _chunk(b"data", samples.tobytes()))


def _clipped(wave: np.ndarray) -> np.ndarray:
    """Samples in -1 … 1. Raises ValueError for non-finite ones, on which LAME aborts the process, and for those of
    another scale, which would become a square wave."""
    check_finite(wave)
    if len(wave) and (greatest := np.abs(wave).max()) > MOST_FULL_SCALE:
        raise ValueError(
            f"holds samples of up to {greatest:,.0f}, and full scale is 1; divide them by their scale, such as 32,768"
        )
    return np.clip(wave, -1, 1)


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def encode_mp3(clip: Clip) -> bytes:
    lowest, highest = (32, 320) if clip.rate_hz >= 32000 else (8, 160) if clip.rate_hz >= 16000 else (8, 64)
    kbit_per_s = MP3_BITS_PER_SAMPLE * clip.rate_hz / 1000
    return _written_by_libsndfile(
        clip,
        format="MP3",
        bitrate_mode="CONSTANT",
        # libsndfile's scale: 0 is the highest bit rate of this sample rate, 1 the lowest
        compression_level=1 - (max(kbit_per_s, lowest) - lowest) / (highest - lowest),
    )


def _written_by_libsndfile(clip: Clip, **kind) -> bytes:
    """The clip as a file. Values beyond ±1 are clipped. Raises WrongRateError, and ValueError as `_clipped` does."""
    import soundfile

    file = io.BytesIO()
    try:
        soundfile.write(file, _clipped(clip.wave), clip.rate_hz, **kind)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.removeprefix("Error : ").rstrip(".")
        raise WrongRateError(f"{kind['format']} of {clip.rate_hz:,} Hz cannot be written ({reason})") from None
    return file.getvalue()


ENCODINGS = {
    "tiff": Row("image", "tiff", partial(_written_by_pillow, format="TIFF")),
    "png": Row("image", "png", partial(_written_by_pillow, format="PNG", compress_level=0)),  # stored, as published
    "jpeg": Row("image", "jpg", encode_jpeg, tuple(str(quality) for quality in range(1, 101)), "100"),
    "fhwc": Row("image", "fhwc", np.ndarray.tobytes),
    "fchw": Row("image", "fchw", encode_fchw),
    "wav": Row("audio", "wav", encode_wav, tuple(WAV_TYPES)),
    "mp3": Row("audio", "mp3", encode_mp3),
    "flac": Row("audio", "flac", partial(_written_by_libsndfile, format="FLAC", subtype="PCM_16")),
}


def parse_encoding(text: str) -> Encoding:
    """Parse an encoding such as `as_stored`, `png`, `jpeg:60` or `wav:int16`."""
    name, colon, option = text.partition(":")
    if text == AS_STORED:
        return Encoding(AS_STORED)
    if name not in ENCODINGS:
        hint = did_you_mean(name.lower(), [AS_STORED, *ENCODINGS])
        allowed = ", ".join([AS_STORED, *map(_spelling, ENCODINGS)])
        raise UserError(f"encoding {text!r}: there is no {name!r}{hint}; allowed are {allowed}")
    row = ENCODINGS[name]
    if not colon and row.default:
        option = row.default
    if option not in (row.options or ("",)) or (colon and not row.options):
        raise UserError(f"encoding {text!r}: {name} must be written as {_spelling(name)}")
    if not row.options:
        return Encoding(name, row.modality, row.extension, row.encode)
    encode = partial(row.encode, option)
    return Encoding(f"{name}:{option}", row.modality, row.extension, encode)


def _spelling(name: str) -> str:
    options = ENCODINGS[name].options
    if not options:
        return name
    choice = "|".join(options) if len(options) < 10 else f"{options[0]}…{options[-1]}"
    return f"{name}[:{choice}]" if ENCODINGS[name].default else f"{name}:{choice}"


def library_version(encoding: Encoding) -> str:
    """The library, with its version, that determines the encoded bytes; empty if there is none."""
    if encoding.modality == "image":
        import PIL

        return f"Pillow {PIL.__version__}"
    if encoding.modality == "audio":
        import soundfile

        return f"libsndfile {soundfile.__libsndfile_version__}"
    return ""


@dataclass(frozen=True)
class Fitting:
    """The size that decoded files get before they are encoded again; None leaves a property unchanged."""

    image_size: int | None = None  # pixels, of a square
    sample_rate_hz: int | None = None
    seconds: float | None = None


def reencode(data: bytes, encoding: Encoding, fitting: Fitting) -> bytes:
    """A file's bytes in another encoding. Raises the decoder's error for a damaged file."""
    if encoding.modality == "image":
        pixels = decode_image(data)
        return encoding.file_of(resize_and_crop(pixels, fitting.image_size) if fitting.image_size else pixels)
    clip = decode_audio(data, fitting.seconds)
    if fitting.sample_rate_hz:
        clip = resample(clip, fitting.sample_rate_hz)
    try:
        return encoding.file_of(set_length(clip, fitting.seconds) if fitting.seconds else clip)
    except WrongRateError as error:
        raise WrongRateError(f"{error}; resample it first (--sample-rate of bfsys pack and encode)") from None


def resize_and_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize a picture so that its shorter side is a little longer than `size`, and crop the middle square.

    uint8 [H, W, 3] → uint8 [size, size, 3]. If resizing would make a huge picture, as for a narrow strip, only the
    middle is resized. Rounding may then change a value by up to 2.
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    shorter = round(size * RESIZE_OVER_CROP)
    scale = shorter / min(height, width)
    new_width, new_height = max(shorter, int(width * scale)), max(shorter, int(height * scale))
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    if new_width * new_height <= MOST_PIXELS:
        resized = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BICUBIC)
        return np.asarray(resized.crop((left, top, left + size, top + size)))
    columns, from_column = _around(left * width / new_width, (left + size) * width / new_width, width)
    rows, from_row = _around(top * height / new_height, (top + size) * height / new_height, height)
    part = Image.fromarray(pixels[rows, columns])
    # Horizontally first, as Pillow does when it enlarges a picture
    part = part.resize((size, part.height), Image.Resampling.BICUBIC, (from_column[0], 0, from_column[1], part.height))
    return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC, (0, from_row[0], size, from_row[1])))


def _around(start: float, end: float, length: int) -> tuple[slice, tuple[float, float]]:
    """The pixels of a row that an enlarged part of it depends on, and the position of the part among them."""
    first = max(0, math.floor(start) - BICUBIC_REACH)
    return slice(first, min(length, math.ceil(end) + BICUBIC_REACH)), (start - first, end - first)


def resample(clip: Clip, rate_hz: int) -> Clip:
    """The clip at another sample rate. The number of samples is rounded up.

    torchaudio resamples it, unless the common divisor of the rates is so small (44,101 and 16,000 Hz) that its kernel
    would take gigabytes. Raises ValueError for more than MOST_SAMPLES.
    """
    if clip.rate_hz == rate_hz:
        return clip
    divisor = math.gcd(clip.rate_hz, rate_hz)
    old, new = clip.rate_hz // divisor, rate_hz // divisor
    samples = -(-len(clip.wave) * new // old)
    if samples > MOST_SAMPLES:
        raise ValueError(f"has {samples:,} samples at {rate_hz:,} Hz; allowed are {MOST_SAMPLES:,}")
    by = _resample_by_torchaudio if old * new <= MOST_KERNEL else _resample_one_by_one
    return Clip(by(clip.wave, old, new), rate_hz)


def _resample_by_torchaudio(wave: np.ndarray, old: int, new: int) -> np.ndarray:
    import torch
    from torchaudio.functional import resample as resample_wave

    # The last bits of the sums depend on the number of threads, which differs between machines and processes.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return resample_wave(torch.from_numpy(wave), old, new).numpy()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from None
        raise
    finally:
        torch.set_num_threads(threads)


def _resample_one_by_one(wave: np.ndarray, old: int, new: int) -> np.ndarray:
    """The same sums, with weights computed separately for each new sample: float32 [ceil(n · new / old)]."""
    samples = -(-len(wave) * new // old)
    band = ROLLOFF * min(old, new) / old  # share of the old band
    reach = math.ceil(ZERO_CROSSINGS / band)  # old samples on each side of a new one
    around = np.arange(-reach, reach + 2)
    padded = np.pad(wave, (reach, reach + 1))
    result = np.empty(samples, np.float32)
    step = max(1, BLOCK_WEIGHTS // len(around))
    for first in range(0, samples, step):
        before, rest = np.divmod(np.arange(first, min(first + step, samples)) * old, new)
        crossings = np.clip((around - rest[:, None] / new) * band, -ZERO_CROSSINGS, ZERO_CROSSINGS)
        weights = np.sinc(crossings) * np.cos(crossings * (np.pi / 2 / ZERO_CROSSINGS)) ** 2 * band
        result[first : first + step] = np.einsum("ij,ij->i", padded[before[:, None] + around + reach], weights)
    return result


def set_length(clip: Clip, seconds: float) -> Clip:
    """Truncate the clip, or pad it with silence."""
    samples = round(seconds * clip.rate_hz)
    if samples < 1:
        raise ValueError(f"{seconds} s at {clip.rate_hz:,} Hz is less than one sample")
    if samples > MOST_SAMPLES:
        raise ValueError(f"{seconds} s at {clip.rate_hz:,} Hz is more than {MOST_SAMPLES:,} samples")
    wave = clip.wave[:samples]
    return Clip(np.pad(wave, (0, samples - len(wave))), clip.rate_hz)

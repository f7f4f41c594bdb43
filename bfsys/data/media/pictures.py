"""Decoding of pictures to three channels of 8 bits, and notes on what is lost.

When Pillow converts grey pictures of more than 8 bits, it clips their values to 0 … 255, so they become white or black.
Here they are converted by their range instead.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

# Pillow warns above this number. A file of a few kilobytes can hold more.
MOST_PIXELS = 89_478_485
# Values of a deep picture that are converted at a time
BLOCK_VALUES = 2**20
# Tags of TIFF and EXIF
BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION, PLANES, PALETTE, SAMPLE_FORMAT = 258, 262, 274, 284, 320, 339
WHITE_IS_ZERO, SEPARATE, UNSIGNED, SIGNED, FLOATING_POINT = 0, 2, 1, 2, 3
# Without a handler, Python would print Pillow's log messages. They do not name the file, and an error reports the same.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# Pillow would run Ghostscript, which executes an EPS file. An IPTC file contains another picture, which may be one.
MAY_HOLD_PROGRAMS = ("EPS", "IPTC")

# The greatest upper byte of a picture whose values use 12 of 16 bits
NEARLY_BLACK = 15
PECULIARITIES = {
    "frames": "more frames than the first, which is the only one that is used",
    "orientation": "an EXIF orientation, which is not applied",
    "dark": "values that use at most 12 of 16 bits and become nearly black, since only the upper 8 bits are read",
}


def decode_image(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3], of the first frame. Raises ValueError for a file that is not a picture or is too large, and
    Pillow's error for a damaged one.

    Alpha is dropped. The orientation that a camera records (EXIF) is not applied, as in ImageNet training; Pillow
    applies that of a TIFF. Pictures of more than 8 bits:

    unsigned 16 bits   0 … 65,535 becomes 0 … 255, by the upper byte; so does 0 … 4,095 in a TIFF of 12 bits. Grey
                       values that all lie in 0 … 255 stay, since their upper bytes would be black. Such colours are
                       refused, since Pillow reads only their upper bytes; so are all values in 0 … 511 otherwise.
    float              0 … 1 becomes 0 … 255, if all values are in this range
    other              (32 bits, signed, float): integers that all lie in 0 … 255 stay; otherwise the picture's least
                       value becomes 0 and its greatest 255
    """
    with opened(data) as image:
        if image.format == "TIFF" and (layout := _misread_layout(image)):
            raise ValueError(f"is a TIFF of {layout}, which Pillow misreads; write it in another layout")
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            return _three_channels(_upper_byte(image))
        if image.mode in ("I", "F"):
            return _three_channels(_white_is_high(image, _by_range(_values(image))))
        pixels = np.asarray(image.convert("RGB"))
        if _has_16_bits(image, data):
            _check_upper_byte(pixels, "colours")
        return pixels


def _misread_layout(image) -> str:
    """The layout of a TIFF that Pillow decodes to wrong pixels without an error; empty for all others."""
    bits, sample_format = (max(image.tag_v2.get(tag, (1,))) for tag in (BITS_PER_SAMPLE, SAMPLE_FORMAT))
    is_compressed = image.info.get("compression", "raw") != "raw"
    if bits == 8 and sample_format == SIGNED:
        return "signed values of 8 bits"
    if bits == 16 and image.tag_v2.get(PLANES) == SEPARATE and not is_compressed:
        return "uncompressed planes of 16 bits"
    if is_compressed and image.tag_v2.prefix == b"MM" and sample_format in (SIGNED, FLOATING_POINT):
        kind = "numbers with a sign" if sample_format == SIGNED else "floating-point numbers"
        return f"compressed big-endian {kind}"
    if 0 < max(image.tag_v2.get(PALETTE, (0,))) <= 255:  # Pillow takes the upper bytes, which are black
        return "a palette of 8 bits"
    return ""


def _has_16_bits(image, data: bytes) -> bool:
    """Whether a PNG, TIFF or PPM has 16 bits per channel."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (1,))) == 16
    return data[24] == 16 if image.format == "PNG" else image.format == "PPM" and b"65535" in data[:100]


def _check_upper_byte(pixels: np.ndarray, kind: str) -> None:
    if pixels.max() <= 1:
        raise ValueError(
            f"has {kind} of 16 bits; only the upper 8 bits are read, and they are all black; store it in 8 bits"
        )


def peculiarities_of(data: bytes, modality: str | None) -> tuple[str, ...]:
    """The keys of PECULIARITIES that apply to a file of this modality: content that decoding drops. None apply to a
    sound, or to a picture that cannot be read. Pixels are decoded only if they may have 16 bits."""
    from PIL import Image

    if modality != "image":
        return ()
    try:
        with opened(data) as image:
            has_frames = getattr(image, "is_animated", False)
            # Not image.getexif, which decodes a whole PNG to read the chunks after the pixels
            is_dark = _has_16_bits(image, data) and decode_image(data).max() <= NEARLY_BLACK
            turned = image.format != "TIFF" and Image.Image.getexif(image).get(ORIENTATION, 1) in range(2, 9)
    except MemoryError:
        raise
    except Exception:  # Pillow raises any exception on a damaged file; such files are reported elsewhere
        return ()
    found = {"frames": has_frames, "orientation": turned, "dark": is_dark}
    return tuple(key for key in PECULIARITIES if found[key])


@contextmanager
def opened(data: bytes) -> Iterator:
    """A Pillow image; its warnings are not shown, since they do not name the file."""
    from PIL import Image, UnidentifiedImageError  # slow to import, and unused by runs on files as stored

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.format in MAY_HOLD_PROGRAMS:
                    raise ValueError(f"is an {image.format} file, which may hold a program; convert it to PNG")
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(
                        f"has {image.width:,} × {image.height:,} pixels; allowed are {MOST_PIXELS:,} in all"
                    )
                yield image
        except UnidentifiedImageError:
            raise ValueError("is not an image that Pillow can read") from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ValueError(f"has too many pixels; allowed are {MOST_PIXELS:,}") from None


def _three_channels(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _upper_byte(image) -> np.ndarray:
    """uint8 [H, W], from unsigned values of 16 bits (12 in TIFF), by the rules of `decode_image`."""
    values = np.asarray(image)
    bits = image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0] if image.format == "TIFF" else 16
    if values.max() > 255:
        values = values >> (bits - 8)
        _check_upper_byte(values, "grey values")
    return _white_is_high(image, values.astype(np.uint8))


def _white_is_high(image, grey: np.ndarray) -> np.ndarray:
    """uint8 [H, W], inverted if a TIFF declares that white is 0."""
    return 255 - grey if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey


def _values(image) -> np.ndarray:
    """int32, uint32 or float32 [H, W]."""
    values = np.asarray(image)
    # Pillow has no unsigned type of 32 bits, and reads such a TIFF as signed
    if image.format == "TIFF" and image.tag_v2.get(BITS_PER_SAMPLE) == (32,) and image.mode == "I":
        return values.view(np.uint32) if image.tag_v2.get(SAMPLE_FORMAT, (1,))[0] == UNSIGNED else values
    return values


def _by_range(values: np.ndarray) -> np.ndarray:
    """uint8 [H, W], by the rules of `decode_image`."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("holds non-finite pixels (NaN or infinite)")
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255 and (values.dtype.kind != "f" or np.array_equal(values, np.trunc(values))):
        return values.astype(np.uint8)
    scale = 255 / (high - low) if high > low else 0.0
    flat = values.ravel()
    blocks = (flat[i : i + BLOCK_VALUES].astype(np.float64) for i in range(0, flat.size, BLOCK_VALUES))
    grey = [np.rint((block - low) * scale).astype(np.uint8) for block in blocks]
    return np.concatenate(grey).reshape(values.shape)

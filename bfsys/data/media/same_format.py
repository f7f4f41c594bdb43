"""Decode pictures and sounds, change them, and write them again in the format of the stored file.

A model of bytes sees how a file was written, so as much as possible of the stored file is kept: the mode and palette of
a picture, the quantisation tables and metadata of a JPEG and what follows it, all chunks of a PNG besides its pixels,
the rate and sample type of a sound, everything besides its samples. Files that cannot be written in this way are
refused, and the callers leave them unchanged: lossy sounds, animations, interlaced or deep pictures, pictures of a
layout that Pillow does not write (big-endian or rotated TIFF, JPEG 4:4:0, BMP of 4 bits), formats that Pillow and
libsndfile do not write.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bfsys.data.media.input_formats import kind_of
from bfsys.data.media.pictures import ORIENTATION, opened
from bfsys.data.media.sounds import Clip, Content, announced_samples, without_tags

if TYPE_CHECKING:
    from PIL import Image

PICTURE_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF")
PIXELS_KNOWN = ("BMP", "PPM", "TIFF")  # formats in which the place of the pixels is known
PICTURE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
# Lossless formats of libsndfile, and their sample types
SOUND_FORMATS = ("AIFF", "AU", "FLAC", "WAV", "WAVEX")
SOUND_TYPES = ("ALAW", "DOUBLE", "FLOAT", "PCM_16", "PCM_24", "PCM_32", "PCM_S8", "PCM_U8", "ULAW")
LONGEST_S = 120.0  # longer sounds are not changed, since each would be decoded and written in every epoch
COARSEST = 255  # largest value of a quantisation table that every JPEG reader accepts
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_AND_DEPTH, INTERLACED = slice(24, 26), 28  # bytes of a PNG
# Tags of TIFF with their defaults: bits, compression, whether white is 0, order of bits, samples, planes, predictor
TIFF_LAYOUT = {258: (1,), 259: 1, 262: None, 266: 1, 277: 1, 284: 1, 317: 1}
STRIPS, STRIP_BYTES = 273, 279
# The beginning of a Huffman table that the JPEG standard suggests. Most programs compute their own tables.
USUAL_TABLES = bytes.fromhex("01020300041105122131410613516107")
# Second bytes of markers in a JPEG: frames that Pillow writes (sequential, progressive), restarts, the scan
FRAMES, RESTARTS, SCAN = {0xC0, 0xC2}, 0xDD, 0xDA
METADATA = {*range(0xE0, 0xF0), 0xFE}  # segments of programs (JFIF, EXIF, XMP, ICC, …) and comments
MARKER_IN_SCAN = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)  # of a new segment, or of the end
END = b"\xd9"
# FLAC: the types of the blocks with facts about the samples, and with offsets; the flag of the last block; no offset
STREAMINFO, SEEKTABLE, LAST = 0, 3, 0x80
EMPTY_OFFSET = b"\xff" * 8 + bytes(10)


class NotRewritableError(ValueError):
    """A file that cannot be written again in its own format."""


def change_picture(data: bytes, change: Callable[[Image.Image], Image.Image]) -> bytes:
    """A picture of the same size and mode, changed and written as its file was.

    Raises NotRewritableError, or Pillow's error for a damaged file.
    """
    with opened(data) as image:
        kind, mode = image.format, image.mode
        if kind not in PICTURE_FORMATS or mode not in PICTURE_MODES or getattr(image, "is_animated", False):
            raise NotRewritableError(f"{kind} of mode {mode}")
        if kind == "PNG" and data[INTERLACED]:
            raise NotRewritableError("interlaced PNG")
        if kind == "TIFF" and image.tag_v2.get(ORIENTATION, 1) != 1:  # Pillow would turn the pixels
            raise NotRewritableError("TIFF with an orientation")
        if kind == "JPEG":
            _check_jpeg(image, data)
        options = _options(image, data)
        before = _Pixels.of(image, data) if kind in PIXELS_KNOWN else None  # decoding forgets their place
        changed = change(image)
        if mode == "P":
            changed.putpalette(image.getpalette(image.palette.mode), image.palette.mode)
    file = io.BytesIO()
    changed.save(file, kind, **options)
    written = file.getvalue()
    if before:
        return _with_pixels_of(kind, data, before, written)
    return _with_chunks_of(data, written) if kind == "PNG" else _with_metadata_of(data, written)


def _check_jpeg(image, data: bytes) -> None:
    """Raise NotRewritableError for a JPEG that Pillow would write in another form."""
    from PIL import JpegImagePlugin

    if max(map(max, image.quantization.values())) > COARSEST:
        raise NotRewritableError("JPEG with tables of 16 bits")
    markers = {marker for marker, _ in _segments(data)}
    if RESTARTS in markers or not markers & FRAMES:
        raise NotRewritableError("JPEG with restart markers, or of a frame that Pillow does not write")
    if image.mode != "RGB":  # grey
        return
    if JpegImagePlugin.get_sampling(image) < 0:
        raise NotRewritableError("JPEG of a sampling that Pillow does not write")
    if image.info.get("adobe_transform") == 0 or [component[0] for component in image.layer] == [82, 71, 66]:
        raise NotRewritableError("JPEG of red, green and blue")


def _with_pixels_of(kind: str, stored: bytes, before: _Pixels, written: bytes) -> bytes:
    """The stored file with the pixels of the written one if they are not compressed, and else the written file."""
    with opened(written) as image:
        after = _Pixels.of(image, written)
    if before.layout != after.layout:
        raise NotRewritableError(f"{kind} of a layout that Pillow does not write")
    if before.places is None or after.places is None:
        if stored[:4] != written[:4]:
            raise NotRewritableError("big-endian TIFF, or BigTIFF")
        return written
    content = b"".join(written[place] for place in after.places)
    if sum(place.stop - place.start for place in before.places) != len(content):
        raise NotRewritableError(f"{kind} of another size")
    file = bytearray(stored)
    for place in before.places:
        file[place], content = content[: place.stop - place.start], content[place.stop - place.start :]
    return bytes(file)


class _Pixels(NamedTuple):
    """The pixels of a TIFF, BMP or PNM in its file."""

    layout: tuple
    """Everything that decides the meaning of a byte of a pixel."""
    places: list[slice] | None
    """None if they are compressed."""

    @classmethod
    def of(cls, image, data: bytes) -> _Pixels:
        """`image` is opened and not decoded yet, and `data` is its file."""
        if image.format == "TIFF":
            tags = image.tag_v2
            layout = tuple(tags.get(tag, default) for tag, default in TIFF_LAYOUT.items())
            if image.info.get("compression", "raw") != "raw":
                return cls(layout, None)
            if STRIPS not in tags:
                raise NotRewritableError("TIFF of tiles")
            strips = zip(tags[STRIPS], tags[STRIP_BYTES], strict=True)
            return cls(layout, [slice(first, first + size) for first, size in strips])
        codec, _, start, _ = image.tile[0]
        if codec != "raw":
            raise NotRewritableError(f"{image.format} of a layout that Pillow does not write")
        if image.format == "PPM":
            return cls((data[:2],), [slice(start, len(data))])
        (height,), bits_and_compression = struct.unpack_from("<i", data, 22), data[28:34]
        row_bytes = (image.width * data[28] + 31) // 32 * 4
        return cls((height > 0, bits_and_compression), [slice(start, start + row_bytes * image.height)])


def _options(image, data: bytes) -> dict:
    """Arguments of Pillow's `save` that write a picture as its file was, as far as Pillow reports it."""
    if image.format == "JPEG":
        from PIL import JpegImagePlugin

        return {
            "qtables": image.quantization,
            "subsampling": max(0, JpegImagePlugin.get_sampling(image)),  # grey pictures have none
            "progressive": bool(image.info.get("progressive")),
            "optimize": USUAL_TABLES not in data,
        }
    if image.format == "TIFF":
        texts = {tag: text for tag, text in image.tag_v2.items() if isinstance(text, str)}  # such as a description
        return {"compression": image.info.get("compression", "raw"), "tiffinfo": texts}
    if image.format == "PNG":
        return {"compress_level": _compression_level(data)}
    return {}


def _segments(jpeg: bytes) -> list[tuple[int, slice]]:
    """(second byte of the marker, place) of each segment before the first scan."""
    segments, place = [], 2
    while (marker := jpeg[place + 1]) != SCAN:
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        end = place + 2 + struct.unpack_from(">H", jpeg, place + 2)[0]
        segments.append((marker, slice(place, end)))
        place = end
    return segments


def _with_metadata_of(stored: bytes, written: bytes) -> bytes:
    """The written JPEG with the metadata of the stored one, and with what follows its end."""
    metadata = [stored[place] for marker, place in _segments(stored) if marker in METADATA]
    segments = _segments(written)
    others = [written[place] for marker, place in segments if marker not in METADATA]
    scans = slice(segments[-1][1].stop, _end_of(written))
    return b"".join([written[:2], *metadata, *others, written[scans], stored[_end_of(stored) :]])


def _end_of(jpeg: bytes) -> int:
    """The offset after the picture. Phones store videos and more pictures there."""
    place = _segments(jpeg)[-1][1].stop
    while (found := MARKER_IN_SCAN.search(jpeg, place)) and found[1] != END:
        place = found.end() + struct.unpack_from(">H", jpeg, found.end())[0]
    return found.end() if found else len(jpeg)


def _compression_level(data: bytes) -> int:
    """The compression level in the zlib header of a PNG: 1, 6 (zlib's default) or 9; 0 for stored pixels."""
    start = data.find(b"IDAT") + 4
    level = (1, 1, 6, 9)[data[start + 1] >> 6]
    is_stored = not data[start + 2] >> 1 & 3  # type of the first deflate block
    return 0 if level == 1 and is_stored else level


def _with_chunks_of(stored: bytes, written: bytes) -> bytes:
    """The stored PNG with the pixels of the written one."""
    if stored[COLOUR_AND_DEPTH] != written[COLOUR_AND_DEPTH]:
        raise NotRewritableError("PNG of a depth that Pillow does not write")
    first, last = _pixels_of(stored)
    pixels = slice(*_pixels_of(written))
    return stored[:first] + written[pixels] + stored[last:]


def _pixels_of(png: bytes) -> tuple[int, int]:
    """The offsets at which the IDAT chunks begin and end."""
    place, first = len(PNG_SIGNATURE), 0
    while True:
        length, name = struct.unpack_from(">I4s", png, place)
        if name == b"IDAT":
            first = first or place
        elif first:
            return first, place
        place += 12 + length


def change_sound(data: bytes, change: Callable[[Clip], Clip]) -> bytes:
    """A sound of the same rate and sample type, changed channel by channel and written as its file was.

    All changed channels must have the same length. Raises NotRewritableError, or soundfile.LibsndfileError for a
    damaged file.
    """
    import soundfile

    sound = kind_of(np.frombuffer(data, np.uint8))
    if sound and sound.name == "an MP3":  # libmpg123 would print warnings about it
        raise NotRewritableError("MP3")
    tag, data = data[: len(data) - len(without_tags(data))], without_tags(data)
    with soundfile.SoundFile(Content(data)) as file:
        rate_hz, kind = file.samplerate, {"format": file.format, "subtype": file.subtype, "endian": file.endian}
        # libsndfile writes the current time into floating-point AIFF files
        has_time = file.format == "AIFF" and file.subtype in ("FLOAT", "DOUBLE")
        if file.format not in SOUND_FORMATS or file.subtype not in SOUND_TYPES or has_time:
            raise NotRewritableError(f"{file.format} of {file.subtype}")
        if not 0 < file.frames <= LONGEST_S * rate_hz:
            raise NotRewritableError(f"{file.frames:,} samples")
        # Samples of 32 bits and more keep their lower bits
        dtype = "float64" if file.subtype in ("DOUBLE", "PCM_32") else "float32"
        waves = file.read(dtype=dtype, always_2d=True)
        is_bounded = file.subtype not in ("DOUBLE", "FLOAT")
    changed = np.stack([change(Clip(wave, rate_hz)).wave for wave in waves.T], axis=1)
    written = io.BytesIO()
    soundfile.write(written, np.clip(changed, -1, 1) if is_bounded else changed, rate_hz, **kind)
    if kind["format"] == "FLAC":
        return tag + _with_blocks_of_flac(data, written.getvalue())
    return tag + _with_samples_of(data, written.getvalue(), len(changed))


def _with_samples_of(stored: bytes, written: bytes, samples: int) -> bytes:
    """The stored WAV, AIFF or AU with the samples of the written one, and the sizes that depend on them."""
    before, after = announced_samples(stored), announced_samples(written)
    if not before or not 0 < before.size <= len(stored) - before.start:
        raise NotRewritableError("sound that does not say how long it is")
    assert after
    content = written[after.start : after.start + after.size]
    end = before.start + before.size
    size = struct.Struct("<I" if stored[:4] in (b"RIFF", b"dns.") else ">I")
    if stored[:4] in (b".snd", b"dns."):
        return stored[:8] + size.pack(len(content)) + stored[12 : before.start] + content + stored[end:]
    file = bytearray(stored[: before.start] + content + bytes(len(content) % 2) + stored[end + end % 2 :])
    size.pack_into(file, 4, len(file) - 8)
    size.pack_into(file, before.start - 4, len(content))
    place = 12
    while place + 8 <= len(file):
        name, (length,) = bytes(file[place : place + 4]), size.unpack_from(file, place + 4)
        if name == b"fact" and length >= size.size:
            size.pack_into(file, place + 8, samples)
        if name == b"COMM" and length >= 18:  # in an AIFF, after the number of channels
            size.pack_into(file, place + 10, samples)
        place += 8 + length + length % 2
    return bytes(file)


def _with_blocks_of_flac(stored: bytes, written: bytes) -> bytes:
    """The stored FLAC with the frames of the written one, and the facts about them. Offsets are left empty."""
    blocks, new = _blocks_of_flac(stored), _blocks_of_flac(written)
    file = bytearray(stored[: blocks[-1].stop])
    for block in blocks:
        kind, content = file[block.start] & ~LAST, slice(block.start + 4, block.stop)
        if kind == STREAMINFO:
            file[content] = written[new[0].start + 4 : new[0].stop]
        elif kind == SEEKTABLE:
            file[content] = EMPTY_OFFSET * ((block.stop - block.start - 4) // len(EMPTY_OFFSET))
    return bytes(file) + written[new[-1].stop :]


def _blocks_of_flac(flac: bytes) -> list[slice]:
    """The places of the blocks before the frames. A block is its type with a flag, its size in three bytes, content."""
    blocks = [slice(4, 4)]
    while len(blocks) == 1 or not flac[blocks[-1].start] & LAST:
        place = blocks[-1].stop
        blocks.append(slice(place, place + 4 + int.from_bytes(flac[place + 1 : place + 4], "big")))
    return blocks[1:]

"""Decoding of sounds to the samples of one channel.

A truncated, empty or non-finite sound is a bad file, like a truncated picture. libsndfile reads the rest of a
truncated file without an error, so the length in the header is compared with the bytes of the file. Headers without a
length, which programs write to a pipe, are accepted.

The cost of a file is limited by the bytes that are read, not by the sizes in its header.
"""

import codecs
import io
import math
import re
import struct
from typing import NamedTuple

import numpy as np

# Samples of a channel (268 MB). Longer sounds are refused, unless only their beginning is needed.
MOST_SAMPLES = 2**26
# Up to this length a whole sound is decoded, even if only its beginning is needed: resampling a part gives other last
# bits.
WHOLE_SAMPLES = 2**24
# Seconds of a longer sound that are decoded beyond the needed ones, since resampling needs them at the edge.
EDGE_S = 2.0
# Samples of all channels that are decoded at a time.
BLOCK_SAMPLES = 2**20
LOWEST_RATE_HZ, HIGHEST_RATE_HZ = 1_000, 1_000_000
# If a header announces 0 bytes, or at least this many, its writer did not know the length.
UNKNOWN_BYTES = 0x7F000000
# libsndfile reports about the largest integer for a stream of unknown length.
UNKNOWN_FRAMES = 2**62
W64_SAMPLES = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")
CHUNKS_LOOKED_AT = 10_000
UTF16_LOOKED_AT = 65_536  # bytes
# The header of a tag: the version, flags, and the size without header and footer, 7 bits in each byte
ID3 = re.compile(rb"ID3[\x02-\x04].{6}", re.DOTALL)
ID3_HEADER_BYTES, HAS_FOOTER, MOST_TAGS = 10, 0x10, 8
EMPTY_ID3 = b"ID3\x04" + bytes(5) + b"\x0a" + bytes(10)  # a header, and 10 bytes of padding
# The header of an APE tag: the version, the size without this header, the number of items, flags
APE = re.compile(rb"APETAGEX.{24}", re.DOTALL)
APE_HEADER_BYTES = 32
# A frame of MPEG audio of layers 2 and 3, of a defined version and bit rate
MPEG_FRAME = re.compile(rb"\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd][\x10-\xef]")
# The first frame of an MP3, if it holds a Xing or Info tag instead of sound
XING = re.compile(rb"\xff[\xe0-\xff].{7,36}?(?:Xing|Info)", re.DOTALL)


class Clip(NamedTuple):
    """A sound with one channel."""

    wave: np.ndarray  # float32 [samples], in -1 … 1, except in some float files
    rate_hz: int


class Layout(NamedTuple):
    """The layout of the chunks in a container."""

    first: int  # offset of the first chunk
    head: struct.Struct  # name and size, before a chunk's content
    samples: bytes  # name of the chunk that holds the samples
    alignment: int = 2
    size_counts_head: bool = False


LAYOUTS = {
    b"RIFF": Layout(12, struct.Struct("<4sI"), b"data"),
    b"RIFX": Layout(12, struct.Struct(">4sI"), b"data"),
    b"RF64": Layout(12, struct.Struct("<4sI"), b"data"),
    b"BW64": Layout(12, struct.Struct("<4sI"), b"data"),
    b"FORM": Layout(12, struct.Struct(">4sI"), b"SSND"),
    b"riff": Layout(40, struct.Struct("<16sQ"), W64_SAMPLES, 8, True),
    b"caff": Layout(8, struct.Struct(">4sQ"), b"data", 1),
}


class Announced(NamedTuple):
    """The range of bytes that a header announces for the samples."""

    start: int  # offset of the first byte
    size: int  # bytes
    at: int = 0  # offset of the size in an MP3


class Content(io.BytesIO):
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Seek; negative offsets become 0. Damaged headers cause them, and soundfile would print a traceback."""
        return super().seek(max(0, offset) if whence == io.SEEK_SET else offset, whence)


def decode_audio(data: bytes, seconds: float | None = None) -> Clip:
    """The mean of the channels, as published.

    With `seconds`, only the first `seconds` + EDGE_S of a long sound (above WHOLE_SAMPLES) are decoded. Raises
    ValueError for a file that is not a sound, is truncated, empty, non-finite or too long, or has an implausible rate.
    """
    import soundfile  # slow to import, and unused by runs on files as stored

    data = without_tags(data)
    announced = announced_samples(data)
    if data[:4] == b"OggS" and _is_chained(data):
        raise ValueError("is a chain of Ogg streams, of which only the first would be decoded; write it as one stream")
    if data[:2] == b"\xf0\x7e":  # of a damaged one, libsndfile decodes wrong samples and writes to standard output
        raise ValueError("is a MIDI sample dump, which is not decoded; write it as WAV")
    if data[:2] == codecs.BOM_UTF16_LE and _is_utf16(data):
        raise ValueError("is text in UTF-16, and not a sound")
    if data[:1] == b"\xff" and not MPEG_FRAME.match(data):  # libmpg123 would print notes
        raise ValueError("is not a sound that libsndfile can read (Format not recognised.)")
    try:
        file = open_sound(data, announced)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"is not a sound that libsndfile can read ({error.error_string})") from None
    with file:
        try:
            wave = _read(file, seconds)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"is truncated or damaged ({error.error_string})") from None
    if not len(wave):
        raise ValueError("holds no samples")
    check_finite(wave)
    return Clip(wave, file.samplerate)


def open_sound(data: bytes, announced: Announced | None):
    """The sound as an open soundfile.SoundFile. Raises soundfile.LibsndfileError, and ValueError for a truncated file,
    about which libmpg123 would print a warning that names no file.

    `announced` is what announced_samples(data) returns.
    """
    import soundfile

    if announced and announced.size < UNKNOWN_BYTES and announced.start + announced.size > len(data):
        raise ValueError(
            f"is truncated: its header announces {announced.size:,} bytes from byte {announced.start:,}, "
            f"but the file has only {max(0, len(data) - announced.start):,}"
        )
    return soundfile.SoundFile(Content(_with_magic(_readable_to_the_end(data, announced))))


def check_finite(wave: np.ndarray) -> None:
    """Raise ValueError for non-finite values in float32 [samples]; LAME aborts the process on them."""
    if not np.isfinite(wave).all():
        raise ValueError("holds non-finite samples (NaN or infinite)")


def _read(file, seconds: float | None) -> np.ndarray:
    """float32 [samples], from an open soundfile.SoundFile."""
    rate_hz, length = file.samplerate, file.frames
    if not LOWEST_RATE_HZ <= rate_hz <= HIGHEST_RATE_HZ:
        raise ValueError(
            f"has a sample rate of {rate_hz:,} Hz; allowed are {LOWEST_RATE_HZ:,} to {HIGHEST_RATE_HZ:,} Hz"
        )
    length_is_known = length < UNKNOWN_FRAMES
    wanted = length if length_is_known else MOST_SAMPLES + 1
    if seconds is not None and length > WHOLE_SAMPLES:
        wanted = min(wanted, math.ceil((seconds + EDGE_S) * rate_hz))
    elif length_is_known and length > MOST_SAMPLES:
        raise _too_long(f"{length:,}")
    if file.seekable() and length_is_known:
        file.seek(0)  # without it, the MP3 decoder gives other last bits
    # After each block, soundfile would seek to its current position. After that, MP3 gives other last bits, and a FLAC
    # of unknown length fails.
    file.seekable = lambda: False
    parts: list[np.ndarray] = []
    got = 0
    with np.errstate(over="ignore", invalid="ignore"):  # the caller checks for non-finite results
        while got < wanted:
            block = min(max(1, BLOCK_SAMPLES // file.channels), wanted - got)
            part = file.read(block, dtype="float32", always_2d=True).mean(axis=1)
            if not len(part):
                break
            parts.append(part)
            got += len(part)
    if seconds is None and got > MOST_SAMPLES:
        raise _too_long(f"more than {MOST_SAMPLES:,}")
    if file.format == "FLAC" and length_is_known and got < length:
        _check_last_sample(file)
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _check_last_sample(file) -> None:
    import soundfile

    try:
        file.seek(file.frames - 1)
    except soundfile.LibsndfileError:
        raise ValueError(
            f"is truncated: its header announces {file.frames:,} samples, but the last one is missing"
        ) from None


def _too_long(samples: str) -> ValueError:
    return ValueError(
        f"has {samples} samples; allowed are {MOST_SAMPLES:,}, or a part of them (--seconds of bfsys pack)"
    )


def announced_samples(data: bytes) -> Announced | None:
    """The position of a file's samples according to its header; None if the header does not state it."""
    magic = data[:4]
    if magic in LAYOUTS:
        return _announced_in_chunk(data, LAYOUTS[magic])
    if magic in (b".snd", b"dns.") and len(data) >= 12:
        return Announced(*struct.unpack(">II" if magic == b".snd" else "<II", data[4:12]))
    if magic == b"NIST":
        return _announced_by_nist(data)
    if magic == b"OggS":
        return _last_page_of_ogg(data)
    return _announced_by_xing(data)


def _announced_in_chunk(data: bytes, layout: Layout) -> Announced | None:
    place, size_in_ds64 = layout.first, None
    for _ in range(CHUNKS_LOOKED_AT):
        if place + layout.head.size > len(data):
            return None
        name, size = layout.head.unpack_from(data, place)
        place += layout.head.size
        size -= layout.head.size * layout.size_counts_head
        if name == b"ds64" and place + 16 <= len(data):
            (size_in_ds64,) = struct.unpack_from("<Q", data, place + 8)
        if name == layout.samples:
            return Announced(place, size_in_ds64 if size_in_ds64 is not None and size == 0xFFFFFFFF else size)
        if size < 0:
            return None
        place += size + -size % layout.alignment
    return None


def _announced_by_nist(data: bytes) -> Announced | None:
    """NIST SPHERE, the format of TIMIT's .wav files: a header in plain text."""
    start = re.match(rb"NIST_1A\s+(\d{1,6})\s", data)
    if not start:
        return None
    size = 1
    for name in (b"sample_count", b"channel_count", b"sample_n_bytes"):
        count = re.search(rb"^%s -i (\d{1,12})\s" % name, data[:4096], re.MULTILINE)
        if not count:
            return None
        size *= int(count[1])
    return Announced(int(start[1]), size)


def _last_page_of_ogg(data: bytes) -> Announced:
    start = data.rfind(b"OggS")
    segments = data[start + 26 : start + 27]
    if not segments:
        return Announced(start, 27)
    lengths = data[start + 27 : start + 27 + segments[0]]
    return Announced(start, 27 + segments[0] + sum(lengths))


def _is_chained(data: bytes) -> bool:
    """Whether a second stream begins in an Ogg file after pages of the first one."""
    place, has_begun = 0, False
    while (head := data[place : place + 27])[:4] == b"OggS" and len(head) == 27:
        begins = bool(head[5] & 2)
        if begins and has_begun:
            return True
        has_begun = not begins
        place += 27 + head[26] + sum(data[place + 27 : place + 27 + head[26]])
    return False


def _is_utf16(data: bytes) -> bool:
    """Whether a file is text in UTF-16. Its byte order mark is also the beginning of a frame of MPEG audio, and
    libmpg123 would print warnings that name no file."""
    try:
        return "\0" not in data[:UTF16_LOOKED_AT].decode("utf-16")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"


def without_tags(data: bytes) -> bytes:
    """The sound, without the ID3 and APE tags before it. Because of them, libsndfile would misread the lengths, or find
    no MP3."""
    start = size_of_tags(data)
    magic = data[start : start + 4]
    is_sound = magic in LAYOUTS or magic in (b"fLaC", b"OggS", b".snd") or MPEG_FRAME.match(magic)
    return data[start:] if start and is_sound else data


def size_of_tags(data: bytes | np.ndarray) -> int:
    """Bytes of the ID3 and APE tags at the beginning; 0 if there are none. A file may have been tagged twice."""
    size = 0
    for _ in range(MOST_TAGS):
        head = bytes(data[size : size + APE_HEADER_BYTES])
        if ID3.match(head):
            size += ID3_HEADER_BYTES * (2 if head[5] & HAS_FOOTER else 1)
            size += sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        elif APE.match(head):
            size += APE_HEADER_BYTES + int.from_bytes(head[12:16], "little")
        else:
            break
    return size


def _announced_by_xing(data: bytes) -> Announced | None:
    """MP3. Its first frame may hold the number of bytes of the stream instead of sound (Xing, LAME)."""
    start = size_of_tags(data)
    tag = XING.search(data, start, start + 4096)
    if not tag:
        return None
    flags, *fields = struct.unpack(">3I", data[tag.end() : tag.end() + 12].ljust(12, b"\0"))
    has_frames, has_size = flags & 1, flags & 2
    at = tag.end() + 4 + 4 * has_frames
    return Announced(tag.start(), fields[has_frames], at) if has_size and flags < 16 else None


def _with_magic(data: bytes) -> bytes:
    """The file. A BW64 gets the magic of the older RF64, which libsndfile knows, and whose chunks are the same. An MP3
    that begins with its first frame gets an empty ID3 tag, by which libsndfile recognises it.

    Without a tag, libsndfile looks for a Mac resource fork in the current folder (._ or .AppleDouble) before it tries
    MP3, and the result would depend on that fork.
    """
    if data[:4] == b"BW64":
        return b"RF64" + data[4:]
    is_mp3_frame = len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0
    return EMPTY_ID3 + data if is_mp3_frame else data


def _readable_to_the_end(data: bytes, announced: Announced | None) -> bytes:
    """The file. A length of 0, which means unknown, is replaced so that libsndfile reads to the end.

    What follows the samples of a W64 or NIST SPHERE file is removed, since libsndfile would decode it as samples. An
    MP3 with tags after the announced bytes gets a length that includes them. Otherwise libmpg123 prints a warning that
    names no file.
    """
    if announced and announced.at and announced.start + announced.size < len(data):
        is_tagged = data[-128:-125] == b"TAG"  # libmpg123 recognises this tag of 128 bytes
        size = len(data) - announced.start - 128 * is_tagged
        return data[: announced.at] + struct.pack(">I", size) + data[announced.at + 4 :]
    if announced and 0 < announced.size < UNKNOWN_BYTES and data[:4] in (b"riff", b"NIST"):
        return data[: announced.start + announced.size]
    if not announced or announced.size or len(data) - announced.start < 8:
        return data
    if data[:4] in (b".snd", b"dns."):
        return data[:8] + b"\xff" * 4 + data[12:]
    if data[:4] in (b"RF64", b"BW64"):
        return data[:28] + struct.pack("<Q", len(data) - announced.start) + data[36:]
    if data[:4] not in (b"RIFF", b"RIFX"):
        return data
    # A chunk that is really empty is followed by another chunk, which has a name and ends within the file
    name, size = LAYOUTS[data[:4]].head.unpack_from(data, announced.start)
    if name.isascii() and name.decode("ascii").isprintable() and announced.start + 8 + size <= len(data):
        return data
    return data[: announced.start - 4] + b"\xff" * 4 + data[announced.start :]

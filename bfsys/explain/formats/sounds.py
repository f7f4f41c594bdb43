"""MP3, FLAC, Ogg, and sounds whose header announces where the samples are."""

from __future__ import annotations

from collections.abc import Iterator

from bfsys.data.media.sounds import UNKNOWN_BYTES, announced_samples
from bfsys.explain.ranges import Found, Kind

# kbit/s by (MPEG 1?, layer 1 … 3)
BIT_RATES = {
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
SAMPLE_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
ID3V1_BYTES, APE_FOOTER_BYTES = 128, 32


def mp3(content: bytes) -> Iterator[Found]:
    at = 0
    while content[at : at + 3] == b"ID3":
        size = sum((byte & 127) << (7 * place) for place, byte in enumerate(reversed(content[at + 6 : at + 10])))
        yield at, at + 10 + size, "ID3v2", "metadata"
        at += 10 + size
    end = len(content)
    if content[-ID3V1_BYTES:][:3] == b"TAG" and end - ID3V1_BYTES >= at:
        end -= ID3V1_BYTES
        yield end, len(content), "ID3v1", "metadata"
    foot = content[end - APE_FOOTER_BYTES : end]
    size = int.from_bytes(foot[12:16], "little") + (APE_FOOTER_BYTES if foot[23:24] >= b"\x80" else 0)  # with a header
    if foot[:8] == b"APETAGEX" and at <= end - size < end:
        yield end - size, end, "APE tag", "metadata"
        end -= size
    is_first = True
    while 0 <= at < end:
        length = _frame_bytes(content[at : at + 4])
        if not length:
            at = content.find(b"\xff", at + 1, end)  # the next byte that may begin a frame
            continue
        if is_first and any(tag in content[at : at + min(length, 64)] for tag in (b"Xing", b"Info", b"VBRI")):
            yield at, at + length, "Xing frame", "header"
        else:
            yield at, min(at + length, end), "frames", "content"
        is_first = False
        at += length


def _frame_bytes(head: bytes) -> int:
    """Length of the frame that begins so; 0 if none does."""
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return 0
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    rate, sampling, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer == 4 or rate in (0, 15) or sampling == 3:
        return 0
    bits, hz = 1000 * BIT_RATES[version == 3, layer][rate - 1], SAMPLE_RATES[version][sampling]
    if layer == 1:
        return (12 * bits // hz + padding) * 4
    return (72 if layer == 3 and version != 3 else 144) * bits // hz + padding


def announced(content: bytes) -> Iterator[Found]:
    """AU, W64, CAF and NIST SPHERE."""
    place = announced_samples(content)
    if not place:
        return
    has_length = 0 < place.size < UNKNOWN_BYTES
    yield 0, place.start, "header", "header"
    yield place.start, place.start + place.size if has_length else len(content), "samples", "content"


def flac(content: bytes) -> Iterator[Found]:
    yield 0, 4, "signature", "header"
    at, is_last = 4, False
    while not is_last:
        kind_of_block, is_last = content[at] & 127, bool(content[at] & 128)
        end = at + 4 + int.from_bytes(content[at + 1 : at + 4])
        name, kind = {
            0: ("STREAMINFO", "header"),
            1: ("PADDING", "metadata"),
            3: ("SEEKTABLE", "header"),
            4: ("VORBIS_COMMENT", "metadata"),
            6: ("PICTURE", "metadata"),
        }.get(kind_of_block, ("block", "metadata"))
        yield at, end, name, kind  # type: ignore[misc]
        at = end
    yield at, len(content), "frames", "content"


def ogg(content: bytes) -> Iterator[Found]:
    name, kind = "audio", "content"
    at = 0
    while content[at : at + 4] == b"OggS":
        segments = content[at + 26]
        first = at + 27 + segments
        end = first + sum(content[at + 27 : first])
        if not content[at + 5] & 1:  # a packet begins here
            name, kind = _packet(content[first : first + 8])
        yield at, first, "page header", "header"
        yield first, end, name, kind  # type: ignore[misc]
        at = end


def _packet(start: bytes) -> tuple[str, Kind]:
    if start.startswith((b"OpusHead", b"\x01vorbis", b"\x05vorbis", b"\x7fFLAC", b"Speex")):
        return "codec header", "header"
    if start.startswith((b"OpusTags", b"\x03vorbis")):
        return "comments", "metadata"
    return "audio", "content"

"""Files that are changed and written again keep their format, as far as a model of bytes can see it."""

import io
import struct
import zlib

import numpy as np
import pytest
import soundfile
from PIL import Image, JpegImagePlugin
from PIL.PngImagePlugin import PngInfo

from bfsys.data.media.input_formats import kind_of
from bfsys.data.media.same_format import USUAL_TABLES, NotRewritableError, change_picture, change_sound
from bfsys.data.media.sounds import Clip

RNG = np.random.default_rng(0)
COLOURS = Image.fromarray(np.kron(RNG.integers(0, 256, (6, 8, 3)), np.ones((4, 4, 1))).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


TEXT = PngInfo()
TEXT.add_text("Title", "kept")
LOSSLESS = {
    "png": saved(COLOURS, "PNG"),
    "png, grey": saved(COLOURS.convert("L"), "PNG"),
    "png, palette": saved(COLOURS.quantize(11), "PNG"),
    "png, transparent": saved(COLOURS.convert("RGBA"), "PNG"),
    "png, one bit": saved(COLOURS.convert("1"), "PNG"),
    "png, not compressed": saved(COLOURS, "PNG", compress_level=0),
    "png, best": saved(COLOURS, "PNG", compress_level=9),
    "png, with text and gamma": saved(COLOURS, "PNG", pnginfo=TEXT, dpi=(72, 72)),
    "tiff": saved(COLOURS, "TIFF"),
    "tiff, deflate": saved(COLOURS, "TIFF", compression="tiff_adobe_deflate"),
    "tiff, with text": saved(COLOURS, "TIFF", tiffinfo={270: "a description", 305: "a program"}),
    "tiff, grey, lzw": saved(COLOURS.convert("L"), "TIFF", compression="tiff_lzw"),
    "bmp": saved(COLOURS, "BMP"),
    "ppm": saved(COLOURS, "PPM"),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_picture_that_is_not_changed_keeps_its_bytes(name: str) -> None:
    assert change_picture(LOSSLESS[name], lambda image: image.copy()) == LOSSLESS[name]


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_changed_picture_keeps_size_mode_and_kind(name: str) -> None:
    stored, changed = LOSSLESS[name], change_picture(LOSSLESS[name], mirrored)
    before, after = picture(stored), picture(changed)
    assert (after.format, after.mode, after.size) == (before.format, before.mode, before.size)
    assert changed[:33] == stored[:33] or before.format != "PNG"  # signature and IHDR
    assert np.array_equal(np.asarray(after.convert("RGBA")), np.asarray(mirrored(before.convert("RGBA"))))


@pytest.mark.parametrize("name", ["big-endian tiff", "pgm with a comment", "bmp of 8 bits"])
def test_all_but_the_pixels_is_kept_as_other_programs_wrote_it(name: str) -> None:
    pixels = bytes(range(64))
    stored = {"big-endian tiff": tiff(">", 1), "pgm with a comment": b"P5\n# by hand\n8 8 255\n" + pixels,
              "bmp of 8 bits": bmp(8, 8)}[name]  # fmt: skip
    assert change_picture(stored, lambda image: image.copy()) == stored
    changed = change_picture(stored, mirrored)
    assert np.array_equal(np.asarray(picture(changed).convert("L")), np.asarray(mirrored(picture(stored).convert("L"))))
    start = stored.rindex(pixels)
    assert (changed[:start], changed[start + 64 :]) == (stored[:start], stored[start + 64 :])


@pytest.mark.parametrize("optimize", [False, True])
def test_a_jpeg_keeps_its_kind_of_huffman_tables(optimize: bool) -> None:
    stored = saved(COLOURS, "JPEG", optimize=optimize)
    assert change_picture(stored, lambda image: image.copy()).count(USUAL_TABLES) == stored.count(USUAL_TABLES)


def test_a_png_keeps_its_other_chunks() -> None:
    changed = picture(change_picture(LOSSLESS["png, with text and gamma"], mirrored))
    assert isinstance(changed.info["dpi"], tuple)
    assert changed.info["Title"] == "kept"


@pytest.mark.parametrize("options", [{}, {"quality": 95, "subsampling": 0}, {"progressive": True, "quality": 30}])
def test_a_jpeg_keeps_its_tables(options: dict) -> None:
    for mode in ("RGB", "L"):
        stored = saved(COLOURS.convert(mode), "JPEG", **options)
        before, after = picture(stored), picture(change_picture(stored, mirrored))
        assert isinstance(before, JpegImagePlugin.JpegImageFile)
        assert isinstance(after, JpegImagePlugin.JpegImageFile)
        assert after.quantization == before.quantization
        assert (after.mode, after.info.get("progressive")) == (mode, before.info.get("progressive"))
        assert JpegImagePlugin.get_sampling(after) == JpegImagePlugin.get_sampling(before)


def test_a_grey_jpeg_of_an_adobe_program_is_changed() -> None:
    """Its segment says that there is no conversion of colours."""
    plain = saved(COLOURS.convert("L"), "JPEG")
    stored = plain[:2] + b"\xff\xee\x00\x0eAdobe\0d\0\0\0\0\0" + plain[2:]
    assert picture(stored).info["adobe_transform"] == 0
    assert picture(change_picture(stored, mirrored)).mode == "L"


def test_a_jpeg_keeps_its_metadata() -> None:
    exif = Image.Exif()
    exif[274] = 6  # an orientation, which is not applied
    plain = saved(COLOURS, "JPEG", exif=exif, dpi=(72, 72), comment=b"by hand", icc_profile=b"colours")
    xmp = b"\xff\xe1\x00\x20http://ns.adobe.com/xap/1.0/\0x"
    stored = plain[:2] + b"\xff" + xmp + plain[2:]  # with a fill byte
    changed = change_picture(stored, mirrored)
    before, after = picture(stored), picture(changed)
    assert xmp in changed
    for name in ("exif", "icc_profile", "dpi", "comment"):
        assert after.info[name] == before.info[name]
    assert changed.count(b"JFIF\0") == 1
    difference = np.asarray(after, np.int16) - np.asarray(mirrored(before), np.int16)
    assert np.abs(difference).mean() < 10


@pytest.mark.parametrize("progressive", [False, True])
def test_what_follows_a_jpeg_is_kept(progressive: bool) -> None:
    """Phones store a film or a second picture after the first one."""
    plain = saved(COLOURS, "JPEG", progressive=progressive)
    for tail in (plain, b"film\xff\xd9"):
        changed = change_picture(plain + tail, mirrored)
        assert changed == change_picture(plain, mirrored) + tail


def interlaced() -> bytes:
    header = LOSSLESS["png"][12:28] + b"\1"  # the pixels are not important here
    return LOSSLESS["png"][:12] + header + zlib.crc32(header).to_bytes(4, "big") + LOSSLESS["png"][33:]


def tiff(order: str, photometric: int) -> bytes:
    """A grey picture of 8 x 8 pixels."""
    fields = ((256, 8), (257, 8), (258, 8), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 8), (279, 64))
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in fields)
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + 64)
    return head + bytes(range(64)) + struct.pack(f"{order}H", len(fields)) + entries + bytes(4)


def big_tiff() -> bytes:
    """A compressed grey picture of 8 x 8 pixels."""
    pixels = zlib.compress(bytes(range(64)))
    fields = ((256, 8), (257, 8), (258, 8), (259, 8), (262, 1), (273, 16), (277, 1), (278, 8), (279, len(pixels)))
    entries = b"".join(struct.pack("<HHQQ", tag, 3, 1, value) for tag, value in fields)
    head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16 + len(pixels))
    return head + pixels + struct.pack("<Q", len(fields)) + entries + bytes(8)


def bmp(bits: int, height: int) -> bytes:
    """A picture with 16 colours that is 8 pixels wide."""
    pixels, start = bytes(range(bits * 8)), 14 + 40 + 64
    header = struct.pack("<IiiHHIIiiII", 40, 8, height, 1, bits, 0, len(pixels), 0, 0, 16, 16)
    return struct.pack("<2sIHHI", b"BM", start + len(pixels), 0, 0, start) + header + bytes(range(64)) + pixels


REFUSED = {
    "animation": lambda: saved(COLOURS, "PNG", save_all=True, append_images=[mirrored(COLOURS)]),
    "deep": lambda: saved(Image.fromarray(np.full((4, 4), 60_000, np.uint16)), "PNG"),
    "webp": lambda: saved(COLOURS, "WEBP"),
    "gif": lambda: saved(COLOURS.quantize(9), "GIF"),
    "cmyk": lambda: saved(COLOURS.convert("CMYK"), "JPEG"),
    "interlaced": interlaced,
    "restarts": lambda: saved(COLOURS, "JPEG", restart_marker_rows=1),
    "pgm of 15 greys": lambda: b"P5 2 1 15 " + bytes(2),
    "tiff in which white is 0": lambda: tiff("<", 0),
    "tiff with a predictor": lambda: saved(COLOURS, "TIFF", compression="tiff_lzw", tiffinfo={317: 2}),
    "compressed BigTIFF": big_tiff,
    "bmp of 4 bits": lambda: bmp(4, 8),
    "bmp that begins at the top": lambda: bmp(8, -8),
    "pgm in text": lambda: b"P2 2 1 255 7 9\n",
    "coarse": lambda: saved(COLOURS, "JPEG", qtables=[[1000] * 64] * 2),
    "turned tiff": lambda: saved(COLOURS, "TIFF", tiffinfo={274: 6}),
    "turned tiff, deflate": lambda: saved(COLOURS, "TIFF", compression="tiff_adobe_deflate", tiffinfo={274: 3}),
    "jpeg of rgb": lambda: saved(COLOURS, "JPEG", keep_rgb=True),
    "jpeg 4:4:0": lambda: saved(COLOURS, "JPEG", subsampling=0).replace(b"\x03\x01\x11", b"\x03\x01\x12"),
    "jpeg, extended": lambda: saved(COLOURS, "JPEG").replace(b"\xff\xc0", b"\xff\xc1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_cannot_be_written_in_their_own_format_are_refused(name: str) -> None:
    with pytest.raises(NotRewritableError):
        change_picture(REFUSED[name](), mirrored)


def test_a_damaged_picture_raises() -> None:
    with pytest.raises((OSError, SyntaxError, ValueError)):
        change_picture(LOSSLESS["png"][:60], mirrored)


def sound(kind: str, subtype: str, channels: int = 1, endian: str = "FILE") -> bytes:
    file, wave = io.BytesIO(), RNG.uniform(-0.7, 0.7, (300, channels))
    soundfile.write(file, wave, 11_025, format=kind, subtype=subtype, endian=endian)
    return file.getvalue()


SOUNDS = (
    ("WAV", "PCM_U8", 1, "FILE"),
    ("WAV", "PCM_16", 2, "FILE"),
    ("WAV", "PCM_16", 1, "BIG"),
    ("WAV", "PCM_24", 1, "FILE"),
    ("WAV", "FLOAT", 2, "FILE"),
    ("WAV", "ULAW", 1, "FILE"),
    ("FLAC", "PCM_16", 2, "FILE"),
    ("AIFF", "PCM_16", 1, "FILE"),
    ("AU", "PCM_16", 1, "FILE"),
    ("AU", "PCM_16", 1, "LITTLE"),
)


@pytest.mark.parametrize(("kind", "subtype", "channels", "endian"), SOUNDS)
def test_a_changed_sound_keeps_rate_channels_and_sample_type(
    kind: str, subtype: str, channels: int, endian: str
) -> None:
    stored = sound(kind, subtype, channels, endian)
    changed = change_sound(stored, lambda clip: Clip(clip.wave[50:250] * np.float32(0.5), clip.rate_hz))
    assert changed[:4] == stored[:4]
    with soundfile.SoundFile(io.BytesIO(stored)) as before, soundfile.SoundFile(io.BytesIO(changed)) as after:
        for fact in ("format", "subtype", "endian", "samplerate", "channels"):
            assert getattr(after, fact) == getattr(before, fact)
        assert np.allclose(after.read(), before.read()[50:250] * 0.5, atol=0.02)


@pytest.mark.parametrize("subtype", ["DOUBLE", "FLOAT"])
def test_floating_point_sounds_keep_all_bits_and_values_above_one(subtype: str) -> None:
    file, dtype = io.BytesIO(), {"DOUBLE": np.float64, "FLOAT": np.float32}[subtype]
    wave = RNG.uniform(-2, 2, (300, 2)).astype(dtype)
    soundfile.write(file, wave, 8000, format="WAV", subtype=subtype)
    changed = change_sound(file.getvalue(), lambda clip: clip)
    assert np.array_equal(soundfile.read(io.BytesIO(changed), dtype=np.dtype(dtype).name)[0], wave)


def test_samples_of_32_bits_use_all_of_them() -> None:
    changed = change_sound(sound("WAV", "PCM_32"), lambda clip: Clip(clip.wave * 0.7, clip.rate_hz))
    samples, _ = soundfile.read(io.BytesIO(changed), dtype="int32")
    assert len(np.unique(samples & 255)) > 100


def test_the_text_in_a_wav_is_kept_and_its_number_of_samples_is_changed() -> None:
    """A text may contain the name of the chunk that holds the number."""
    stored = sound("WAV", "FLOAT")
    text = b"recorded in a factory"
    comment = b"LIST" + struct.pack("<I", len(text) + 1) + text + b"\0"
    start = stored.index(b"fmt ")
    stored = stored[:start] + comment + stored[start:]
    stored = stored[:4] + struct.pack("<I", len(stored) - 8) + stored[8:]
    assert struct.unpack_from("<I", stored, stored.index(b"fact\4") + 8) == (300,)
    changed = change_sound(stored, lambda clip: Clip(clip.wave[:200], clip.rate_hz))
    assert changed[start : start + len(comment)] == comment
    assert struct.unpack_from("<I", changed, changed.index(b"fact\4") + 8) == (200,)


def samples_of(data: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(data), dtype="int16")[0]


def first_half(clip: Clip) -> Clip:
    return Clip(clip.wave[:150], clip.rate_hz)


def test_the_text_in_an_aiff_is_kept_and_its_number_of_samples_is_changed() -> None:
    plain = sound("AIFF", "PCM_16")
    name, author = b"NAME\0\0\0\4song", b"AUTH\0\0\0\3you\0"
    stored = plain[:12] + name + plain[12:] + author
    changed = change_sound(stored[:4] + struct.pack(">I", len(stored) - 8) + stored[8:], first_half)
    assert changed[12 : 12 + len(name)] == name
    assert changed.endswith(author)
    assert struct.unpack_from(">I", changed, 4) == (len(changed) - 8,)
    assert (samples_of(changed) == samples_of(plain)[:150]).all()


def test_the_text_in_an_au_is_kept() -> None:
    plain, text = sound("AU", "PCM_16"), b"by hand\0"
    stored = plain[:4] + struct.pack(">I", 24 + len(text)) + plain[8:24] + text + plain[24:]
    changed = change_sound(stored, first_half)
    assert changed[24 : 24 + len(text)] == text
    assert struct.unpack_from(">I", changed, 8) == (300,)
    assert (samples_of(changed) == samples_of(plain)[:150]).all()


def test_the_blocks_of_a_flac_are_kept_and_its_offsets_are_left_empty() -> None:
    plain = sound("FLAC", "PCM_16")
    table = struct.pack(">QQH", 0, 0, 300) + struct.pack(">QQH", 299, 5, 1)
    offsets = b"\3\0\0\x24" + table
    text = b"\4\0\0\x0c" + struct.pack("<I4sI", 4, b"hand", 0)
    padding = b"\x81\0\1\0" + bytes(256)  # the last block
    facts, frames = plain[4:42], plain[plain.index(b"\xff\xf8", 42) :]
    stored = b"fLaC" + facts + offsets + text + padding + frames
    changed = change_sound(stored, first_half)
    empty = 2 * (b"\xff" * 8 + bytes(10))
    assert changed[42 : 42 + 40 + 16 + 260] == offsets[:4] + empty + text + padding
    assert (samples_of(changed) == samples_of(plain)[:150]).all()
    decoded = soundfile.SoundFile(io.BytesIO(changed))
    decoded.seek(149)  # without the offsets
    assert len(decoded.read()) == 1


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "FLAC"])
def test_the_id3_tag_before_a_sound_is_kept(kind: str) -> None:
    tag = b"ID3\3\0\0\0\0\1\0" + bytes(128)
    plain = sound(kind, "PCM_16")
    assert change_sound(tag + plain, first_half) == tag + change_sound(plain, first_half)


def test_lossy_and_empty_sounds_are_refused() -> None:
    for data in (sound("MP3", "MPEG_LAYER_III"), sound("OGG", "VORBIS")):
        assert kind_of(np.frombuffer(data, np.uint8)) is not None
        with pytest.raises(NotRewritableError):
            change_sound(data, lambda clip: clip)
    empty = io.BytesIO()
    soundfile.write(empty, np.zeros(0), 8000, format="WAV", subtype="PCM_16")
    with pytest.raises(NotRewritableError):
        change_sound(empty.getvalue(), lambda clip: clip)

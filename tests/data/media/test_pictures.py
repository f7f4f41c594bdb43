"""Deep pictures keep their grey values, the others are as Pillow converts them; huge and damaged ones are refused."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, GifImagePlugin, Image

from bfsys.data.media import pictures
from bfsys.data.media.pictures import PECULIARITIES, decode_image, peculiarities_of
from bfsys.explain.overlay import _decoded

LEVELS = np.tile(np.arange(64), (6, 1))
DEEP = (LEVELS * 1040).astype(np.uint16)  # 0 … 65,520
RED, BLUE = (Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))


def saved(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def saved_array(values, file_format="TIFF"):
    return saved(Image.fromarray(values), file_format)


def png(header, rows):
    """Make a PNG of any bit depth and colour type, from `struct.pack(">IIBBBBB", …)` and the bytes of its rows."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_png(channels, colour_type):
    values = np.repeat(DEEP[:, :, None], channels, axis=2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return png(struct.pack(">IIBBBBB", 64, 6, 16, colour_type, 0, 0, 0), rows)


def tiff(content, bits, sample_format=1, white_is_zero=False, order="<", **more):
    """Make a grey TIFF of 64 × 6 pixels, of kinds that Pillow can read but not write; `more` are tags such as t259."""
    tags = {256: 64, 257: 6, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8, 277: 1, 278: 6}
    tags |= {279: len(content), 339: sample_format} | {int(tag[1:]): value for tag, value in more.items()}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(content))
    return head + content + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def twelve_bits(values):
    bits = np.unpackbits(values.astype(">u2").view(np.uint8)).reshape(-1, 16)[:, 4:]
    return np.packbits(bits).tobytes()


RAMPS = {
    "png of 16 bits": saved_array(DEEP, "PNG"),
    "png of 16 bits and three channels": deep_png(3, 2),
    "png of 16 bits with alpha": deep_png(2, 4),
    "tiff of 16 bits": saved_array(DEEP),
    "tiff of 16 bits, big-endian": saved(Image.frombytes("I;16B", (64, 6), DEEP.astype(">u2").tobytes()), "TIFF"),
    "tiff of 16 bits with a sign": tiff((DEEP.astype(int) - 32768).astype("<i2").tobytes(), 16, 2),
    "tiff of 12 bits": tiff(twelve_bits(LEVELS * 65), 12),
    "tiff of 32 bits without a sign": tiff((LEVELS * 68_000_000).astype("<u4").tobytes(), 32),
    "pgm": b"P5 64 6 65535\n" + DEEP.astype(">u2").tobytes(),
    "pgm of 12 bits": b"P5 64 6 4095\n" + (LEVELS * 65).astype(">u2").tobytes(),
    "ppm": b"P6 64 6 65535\n" + np.repeat(DEEP[:, :, None], 3, axis=2).astype(">u2").tobytes(),
    "int32": saved_array((LEVELS * 1000).astype(np.int32)),
    "int32 below zero": saved_array((LEVELS * 30_000_000 - 2**30).astype(np.int32)),
    "int32 far from zero": saved_array((LEVELS * 5 + 2**30).astype(np.int32)),
    "float": saved_array((LEVELS / 63).astype(np.float32)),
    "float beyond 1": saved_array((LEVELS / 20).astype(np.float32)),
    "float below zero": saved_array((LEVELS / 63 - 0.5).astype(np.float32)),
    "float of the widest range": saved_array(((LEVELS / 63 - 0.5) * 6e38).astype(np.float32)),
}


@pytest.mark.parametrize("name", RAMPS)
def test_a_ramp_of_any_depth_stays_one(name):
    pixels = decode_image(RAMPS[name])
    assert (pixels.shape, pixels.dtype) == ((6, 64, 3), np.uint8)
    assert (pixels == pixels[:1, :, :1]).all()
    ramp = pixels[0, :, 0].astype(int)
    assert (ramp[0], ramp[-1]) == (0, 255)
    assert (np.abs(np.diff(ramp) - 255 / 63) <= 1.1).all()


def test_grey_and_colour_of_16_bits_are_converted_alike():
    assert np.array_equal(decode_image(deep_png(1, 0)), decode_image(deep_png(3, 2)))
    assert np.array_equal(decode_image(deep_png(1, 0))[:, :, 0], DEEP >> 8)


def test_grey_values_whose_upper_bytes_are_empty_are_refused():
    """Values up to 255 stay as they are. Of those up to 511, the upper byte is 0 or 1."""
    assert decode_image(saved_array((LEVELS * 4).astype(np.uint16), "PNG"))[0, -1, 0] == 252
    for file_format in ("PNG", "TIFF"):
        with pytest.raises(ValueError, match="has grey values of 16 bits; only the upper 8 bits are read, and they"):
            decode_image(saved_array((LEVELS * 8).astype(np.uint16), file_format))


def test_a_palette_of_8_bits_is_refused():
    """Old programs write palettes of TIFFs so, and Pillow takes their upper bytes."""
    picture = Image.fromarray(LEVELS.astype(np.uint8))
    picture.putpalette([value for level in range(256) for value in (level, level, level)])
    content = saved(picture, "TIFF")
    palette = np.arange(256, dtype="<u2") * 256
    assert content.count(palette.tobytes()) == 3
    assert decode_image(content)[0, -1, 0] == 63
    with pytest.raises(ValueError, match="is a TIFF of a palette of 8 bits, which Pillow misreads"):
        decode_image(content.replace(palette.tobytes(), (palette >> 8).tobytes()))


@pytest.mark.parametrize("channels", [2, 3])
def test_colours_whose_upper_bytes_are_empty_are_refused(channels):
    """Pillow reads only the upper bytes of 16-bit colours, so such a picture would be black."""
    values = np.repeat((LEVELS * 4)[:, :, None], channels, axis=2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    picture = png(struct.pack(">IIBBBBB", 64, 6, 16, {2: 4, 3: 2}[channels], 0, 0, 0), rows)
    with pytest.raises(ValueError, match="colours of 16 bits; only the upper 8 bits are read, and they are all black"):
        decode_image(picture)
    black = Image.new("RGB", (8, 6))
    assert not decode_image(saved(black, "PNG")).any()


def test_values_are_inverted_if_white_is_zero():
    assert decode_image(tiff(DEEP.astype("<u2").tobytes(), 16, white_is_zero=True))[0, [0, -1], 0].tolist() == [255, 0]


MISREAD = {
    "signed values of 8 bits": tiff((LEVELS * 4 - 128).astype(np.int8).tobytes(), 8, 2),
    "uncompressed planes of 16 bits": tiff(DEEP.astype("<u2").tobytes(), 16, t262=2, t277=3, t284=2),
    "compressed big-endian numbers with a sign": tiff(
        zlib.compress((DEEP.astype(int) - 32768).astype(">i2").tobytes()), 16, 2, order=">", t259=8
    ),
    "compressed big-endian floating-point numbers": tiff(
        zlib.compress((LEVELS / 63).astype(">f4").tobytes()), 32, 3, order=">", t259=8
    ),
}


@pytest.mark.parametrize("layout", MISREAD)
def test_a_tiff_that_pillow_decodes_to_wrong_pixels_is_refused(layout):
    with pytest.raises(ValueError, match=f"is a TIFF of {layout}, which Pillow misreads; write it in another layout"):
        decode_image(MISREAD[layout])


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_small_values_in_16_bits_stay(file_format):
    """Masks and labels are stored like this. Their upper bytes are zero."""
    grey = (LEVELS * 4).astype(np.uint16)
    assert np.array_equal(decode_image(saved_array(grey, file_format))[:, :, 0], grey)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_of_8_bits_in_a_deep_picture_stay(dtype):
    assert np.array_equal(decode_image(saved_array((LEVELS + 90).astype(dtype)))[:, :, 1], LEVELS + 90)


@pytest.mark.parametrize("value", [-7, 1000, 2**31 - 1])
def test_a_deep_picture_of_one_value_has_one_colour(value):
    assert len(np.unique(decode_image(saved_array(np.full((6, 64), value, np.int32))))) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_are_refused(value):
    values = LEVELS.astype(np.float32)
    values[2, 3] = value
    with pytest.raises(ValueError, match="non-finite"):
        decode_image(saved_array(values))


def test_deep_pictures_are_converted_alike_in_blocks_of_any_size(monkeypatch):
    expected = decode_image(RAMPS["int32"])
    monkeypatch.setattr(pictures, "BLOCK_VALUES", 7)
    assert np.array_equal(decode_image(RAMPS["int32"]), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_other_pictures_are_as_pillow_converts_them(mode):
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 3), np.uint8)
    image = Image.frombytes("LAB", (64, 6), noise.tobytes()) if mode == "LAB" else Image.fromarray(noise).convert(mode)
    with Image.open(io.BytesIO(saved(image, "TIFF"))) as stored:
        assert stored.mode == mode
        expected = np.asarray(stored.convert("RGB"))
    assert np.array_equal(decode_image(saved(image, "TIFF")), expected)


def test_alpha_is_dropped_and_a_palette_with_alpha_causes_no_warning():
    assert decode_image(saved(Image.new("RGBA", (2, 2), (9, 8, 7, 0)), "PNG"))[0, 0].tolist() == [9, 8, 7]
    palette = saved(RED.convert("P"), "PNG", transparency=bytes(range(200)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(palette)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("side", [9460, 30_000])  # Pillow warns about the first and refuses the second
def test_too_many_pixels_are_refused_before_they_are_decoded(side):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"pixels; allowed are 89,478,485"):
            decode_image(png(struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0), b""))


def test_too_many_pixels_are_refused_whatever_limit_pillow_has(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match="has 9,460 × 9,460 pixels; allowed are 89,478,485"):
        decode_image(png(struct.pack(">IIBBBBB", 9460, 9460, 1, 0, 0, 0, 0), b""))


def test_errors_on_files_that_are_not_pictures_contain_no_object_address():
    for content in (b"", b"no picture", b"RIFF....WAVE"):
        with pytest.raises(ValueError, match=r"^is not an image that Pillow can read$"):
            decode_image(content)
    with pytest.raises(OSError, match="truncated"):
        decode_image(saved(RED.resize((200, 200)), "JPEG")[:-300])


def iptc_around(content):
    """An IPTC file whose "compressed JPEG" is any other picture."""
    fields = [((3, 60), b"\1\0"), ((3, 20), b"\10"), ((3, 30), b"\6"), ((3, 120), b"\5"), ((8, 10), content)]
    return b"".join(struct.pack(">BBBH", 0x1C, *tag, len(data)) + data for tag, data in fields)


@pytest.mark.parametrize("kind", ["EPS", "IPTC"])
def test_a_postscript_program_is_not_run(kind, tmp_path, monkeypatch):
    """Pillow gives EPS files to Ghostscript, also if they are in another file."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/was_run\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it again
    content = saved(RED, "EPS") if kind == "EPS" else iptc_around(saved(RED, "EPS"))
    with pytest.raises(ValueError, match=rf"^is an {kind} file, which may hold a program; convert it to PNG"):
        decode_image(content)
    assert _decoded(np.frombuffer(content, np.uint8)) is None
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_unused_frames_are_noted(file_format):
    assert peculiarities_of(saved(RED, file_format, save_all=True, append_images=[BLUE]), "image") == ("frames",)
    assert peculiarities_of(saved(RED, file_format), "image") == ()
    assert PECULIARITIES["frames"].startswith("more frames than the first")


def test_not_all_frames_are_looked_at(monkeypatch):
    seen, seek = [], GifImagePlugin.GifImageFile._seek
    monkeypatch.setattr(
        GifImagePlugin.GifImageFile, "_seek", lambda self, frame, *rest: seen.append(frame) or seek(self, frame, *rest)
    )
    many = [Image.new("RGB", (8, 6), (i, 0, 200)) for i in range(40)]
    assert peculiarities_of(saved(RED, "GIF", save_all=True, append_images=many), "image") == ("frames",)
    assert max(seen) == 1


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_that_is_not_applied_is_noted(file_format):
    exif = Image.Exif()
    for orientation, expected in ((1, ()), (6, ("orientation",)), (99, ())):
        exif[pictures.ORIENTATION] = orientation
        content = saved(RED, file_format, exif=exif)
        assert peculiarities_of(content, "image") == expected
        assert decode_image(content).shape == (6, 8, 3)


def test_the_orientation_of_a_tiff_is_applied_and_not_noted():
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    content = saved(RED, "TIFF", exif=exif)
    assert decode_image(content).shape == (8, 6, 3)
    assert peculiarities_of(content, "image") == ()


def test_pixels_are_not_decoded_to_find_peculiarities(monkeypatch):
    content = saved(RED, "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("the pixels were decoded"))
    assert peculiarities_of(content, "image") == ()


@pytest.mark.parametrize("colour_type", [0, 2])
def test_values_that_use_few_of_16_bits_are_noted(colour_type):
    """Scanners and microscopes store 12 bits in 16."""
    for greatest, expected in ((1_023, ("dark",)), (4_095, ("dark",)), (65_535, ())):
        values = np.repeat((LEVELS * greatest // 63)[:, :, None], 1 + colour_type, axis=2).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in values)
        picture = png(struct.pack(">IIBBBBB", 64, 6, 16, colour_type, 0, 0, 0), rows)
        assert peculiarities_of(picture, "image") == expected
    assert peculiarities_of(saved_array((LEVELS * 4).astype(np.uint16), "PNG"), "image") == ()


def test_sounds_and_unreadable_files_have_no_peculiarities():
    too_large = png(struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0), b"")
    for content in (b"", b"no picture", saved(RED, "PNG")[:20], too_large):
        assert peculiarities_of(content, "image") == ()
    assert peculiarities_of(saved(RED, "GIF", save_all=True, append_images=[BLUE]), "audio") == ()


def test_running_out_of_memory_is_not_a_peculiarity(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        peculiarities_of(b"", "image")

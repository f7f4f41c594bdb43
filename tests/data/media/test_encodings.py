"""Sizes to the byte, values read back by other libraries, and every wrong spelling of an encoding."""

import io
import pickle

import numpy as np
import pytest
import soundfile
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bfsys.data.media import encodings, sounds
from bfsys.data.media.encodings import (
    ENCODINGS,
    Fitting,
    encode_mp3,
    parse_encoding,
    reencode,
    resample,
    resize_and_crop,
    set_length,
)
from bfsys.data.media.modalities import EXTENSIONS
from bfsys.data.media.pictures import decode_image
from bfsys.data.media.sounds import Clip, decode_audio
from bfsys.errors import UserError

# The published sizes: of 224 × 224 pixels, and of a second at 16 kHz
PICTURE_BYTES = [("tiff", 150_668), ("png", 150_864), ("fhwc", 150_528), ("fchw", 150_528)]
SOUND_BYTES = [
    ("wav:float32", 64_058),
    ("wav:int32", 64_080),
    ("wav:int16", 32_044),
    ("wav:uint8", 16_044),
    ("mp3", 3_240),
]
PIXELS = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
TONE = Clip((0.4 * np.sin(np.arange(16000) * 0.1)).astype(np.float32), 16000)


@pytest.mark.parametrize(("encoding", "size_bytes"), PICTURE_BYTES)
def test_image_sizes_are_the_published_ones(encoding, size_bytes):
    assert len(parse_encoding(encoding).encode(PIXELS)) == size_bytes


@pytest.mark.parametrize(("encoding", "size_bytes"), SOUND_BYTES)
def test_audio_sizes_are_the_published_ones(encoding, size_bytes):
    assert len(parse_encoding(encoding).encode(TONE)) == size_bytes


@pytest.mark.parametrize("encoding", ["tiff", "png"])
def test_pictures_come_back_equal(encoding):
    assert np.array_equal(decode_image(parse_encoding(encoding).encode(PIXELS)), PIXELS)


def test_raw_pixels_are_interleaved_or_planar():
    assert parse_encoding("fhwc").encode(PIXELS)[:3] == bytes(PIXELS[0, 0])
    assert parse_encoding("fchw").encode(PIXELS)[: 224 * 224] == PIXELS[:, :, 0].tobytes()


def test_jpeg_has_the_quality_asked_for_and_colour_at_half_resolution():
    def image(encoding):
        return Image.open(io.BytesIO(parse_encoding(encoding).encode(PIXELS)))

    assert set(image("jpeg").quantization[0]) == {1}  # quality 100
    assert max(image("jpeg:60").quantization[0]) > 50
    assert [layer[1:3] for layer in image("jpeg").layer] == [(2, 2), (1, 1), (1, 1)]


@pytest.mark.parametrize(
    ("sample_type", "subtype", "expected"),
    [
        ("float32", "FLOAT", [-1.0, -0.5, 0.0, 0.25, 1.0]),
        ("int32", "PCM_32", [-(2**31) + 1, -(2**30) + 1, 0, 536870911, 2**31 - 1]),
        ("int16", "PCM_16", [-32767, -16383, 0, 8191, 32767]),
        ("uint8", "PCM_U8", [0, 63, 127, 159, 255]),
    ],
)
@pytest.mark.parametrize("length", [4, 5])  # an odd number of bytes is padded
def test_wav_is_read_back_by_soundfile(sample_type, subtype, expected, length):
    clip = Clip(np.array([-1.0, -0.5, 0.0, 0.25, 1.0], np.float32)[:length], 8000)
    file = io.BytesIO(parse_encoding(f"wav:{sample_type}").encode(clip))
    info = soundfile.info(file)
    assert (info.subtype, info.samplerate, info.channels, info.frames) == (subtype, 8000, 1, length)
    file.seek(0)
    read, _ = soundfile.read(file, dtype="float32" if sample_type == "float32" else "int32")
    if sample_type == "float32":
        assert np.array_equal(read, clip.wave)
    else:  # soundfile stores narrower types in the upper bits
        shift = {"int32": 0, "int16": 16, "uint8": 24}[sample_type]
        assert (read >> shift).tolist() == [v - 128 * (shift == 24) for v in expected[:length]]


def test_values_beyond_one_are_clipped_not_wrapped():
    clip = Clip(np.array([1.5, -1.5], np.float32), 8000)
    read, _ = soundfile.read(io.BytesIO(parse_encoding("wav:int16").encode(clip)), dtype="int16")
    assert read.tolist() == [32767, -32767]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50), st.sampled_from(["float32", "int16"]))
def test_wav_round_trip(values, sample_type):
    clip = Clip(np.array(values, np.float32), 16000)
    read = decode_audio(parse_encoding(f"wav:{sample_type}").encode(clip))
    assert read.rate_hz == 16000
    assert np.abs(read.wave - clip.wave).max() <= (0 if sample_type == "float32" else 2 / 32767)


def test_flac_and_mp3_hold_the_tone():
    assert np.abs(decode_audio(parse_encoding("flac").encode(TONE)).wave - TONE.wave).max() < 1e-4
    mp3 = decode_audio(parse_encoding("mp3").encode(TONE)).wave
    assert abs(np.abs(mp3[2000:14000]).max() - 0.4) < 0.05


@pytest.mark.parametrize("rate_hz", [8000, 11025, 22050, 44100, 48000])
def test_mp3_at_every_rate_is_near_one_and_a_half_bits_per_sample(rate_hz):
    clip = Clip(np.zeros(2 * rate_hz, np.float32), rate_hz)
    assert len(encode_mp3(clip)) * 8 / (2 * rate_hz) == pytest.approx(1.5, rel=0.3)


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (64, 65), (7, 900)])
def test_resize_keeps_the_middle_square(size):
    assert resize_and_crop(np.zeros((*size, 3), np.uint8), 224).shape == (224, 224, 3)


@settings(max_examples=60)
@given(short=st.integers(1, 9), long=st.integers(1, 1500), size=st.integers(8, 48), is_tall=st.booleans())
def test_the_middle_of_a_strip_is_that_of_the_whole(short, long, size, is_tall):
    pixels = np.random.default_rng(long).integers(0, 256, (long, short, 3) if is_tall else (short, long, 3), np.uint8)
    whole = resize_and_crop(pixels, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "MOST_PIXELS", 0)
        middle = resize_and_crop(pixels, size)
    assert np.abs(middle.astype(int) - whole).max() <= 2


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (2, 10_000_000)])
def test_a_strip_becomes_a_square_without_its_length(shape, monkeypatch):
    made = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *rest: made.append(size) or resize(self, size, *rest))
    assert resize_and_crop(np.full((*shape, 3), 200, np.uint8), 224).min() == 200
    assert max(width * height for width, height in made) <= 224 * 224


def test_resize_centres():
    pixels = np.zeros((256, 356, 3), np.uint8)
    pixels[:, 66:290] = 255  # exactly the middle 224 columns
    assert resize_and_crop(pixels, 224).min() == 255


def test_set_length_cuts_or_fills_up_at_the_end():
    clip = Clip(np.ones(10, np.float32), 10)
    assert set_length(clip, 0.5).wave.tolist() == [1] * 5
    assert set_length(clip, 1.2).wave.tolist() == [1] * 10 + [0, 0]


def test_resample_keeps_the_tone():
    out = resample(TONE, 8000)
    assert (len(out.wave), out.rate_hz) == (8000, 8000)
    assert np.abs(out.wave[100:-100] - TONE.wave[::2][100:-100]).max() < 0.01


@settings(max_examples=40)
@given(samples=st.integers(1, 30), old=st.integers(1000, 1_000_000), new=st.integers(1000, 1_000_000))
def test_any_rate_becomes_any_other_and_the_length_follows(samples, old, new):
    out = resample(Clip(np.full(samples, 0.5, np.float32), old), new)
    assert (len(out.wave), out.rate_hz, out.wave.dtype) == (-(-samples * new // old), new, np.float32)
    assert np.isfinite(out.wave).all()


@pytest.mark.parametrize(("old", "new"), [(44_100, 16_000), (16_000, 44_100), (48_000, 16_000), (8000, 48_000)])
@pytest.mark.parametrize("samples", [1, 7, 3001])
def test_resampling_without_torchaudio_gives_the_same(old, new, samples, monkeypatch):
    clip = Clip(np.random.default_rng(0).uniform(-1, 1, samples).astype(np.float32), old)
    theirs = resample(clip, new).wave
    monkeypatch.setattr(encodings, "MOST_KERNEL", 0)
    monkeypatch.setattr(encodings, "BLOCK_WEIGHTS", 1000)
    ours = resample(clip, new).wave
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 2e-5


def test_rates_with_little_in_common_are_resampled_without_a_huge_kernel(monkeypatch):
    monkeypatch.setattr(torchaudio.functional, "resample", lambda *_: pytest.fail("its kernel would take up gigabytes"))
    tone = Clip((0.4 * np.sin(np.arange(44_101) * 2 * np.pi * 440 / 44_101)).astype(np.float32), 44_101)
    out = resample(tone, 16_000).wave
    assert np.abs(out - 0.4 * np.sin(np.arange(16_000) * 2 * np.pi * 440 / 16_000))[100:-100].max() < 1e-3


def test_a_sound_that_resampling_makes_too_long_is_refused():
    with pytest.raises(ValueError, match="has 100,000,000 samples at 1,000,000 Hz; allowed are 67,108,864"):
        resample(Clip(np.zeros(100_000, np.float32), 1000), 1_000_000)


def test_torchs_out_of_memory_error_becomes_a_memory_error(monkeypatch):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(torchaudio.functional, "resample", fail)
    with pytest.raises(MemoryError, match="9 bytes"):
        resample(TONE, 8000)


def test_the_beginning_of_a_long_sound_is_made_from_its_beginning(monkeypatch):
    long = Clip(np.random.default_rng(0).uniform(-0.3, 0.3, 120_000).astype(np.float32), 22_050)
    content = parse_encoding("flac").encode(long)
    fitting = Fitting(sample_rate_hz=16_000, seconds=0.5)
    whole = np.frombuffer(reencode(content, parse_encoding("wav:float32"), fitting)[-32_000:], np.float32)
    monkeypatch.setattr(sounds, "WHOLE_SAMPLES", 1000)
    lengths = []
    monkeypatch.setattr(
        encodings, "resample", lambda clip, rate: lengths.append(len(clip.wave)) or resample(clip, rate)
    )
    part = np.frombuffer(reencode(content, parse_encoding("wav:float32"), fitting)[-32_000:], np.float32)
    assert lengths == [55_125]  # 0.5 s and EDGE_S
    assert np.abs(part - whole).max() < 1e-6


@pytest.mark.parametrize("encoding", ["wav:uint8", "wav:int32", "wav:float32", "mp3", "flac"])
def test_encoders_refuse_samples_that_are_not_finite(encoding):
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="non-finite"):
            parse_encoding(encoding).encode(Clip(np.array([0, value] * 800, np.float32), 16_000))


@pytest.mark.parametrize("encoding", ["wav:uint8", "wav:int16", "mp3", "flac"])
def test_encoders_refuse_samples_of_another_scale(encoding):
    """A program may write the integers of a 16-bit sound as floats. If they were clipped, each would become ±1."""
    with pytest.raises(ValueError, match="holds samples of up to 29,490, and full scale is 1; divide them"):
        parse_encoding(encoding).encode(Clip(np.array([0.9, -0.9] * 800, np.float32) * 32_767, 16_000))


@pytest.mark.parametrize("encoding", ["mp3", "flac"])
def test_samples_beyond_one_are_clipped_before_they_are_compressed(encoding):
    encode = parse_encoding(encoding).encode
    loud = np.where(TONE.wave > 0.3, 10, TONE.wave)
    assert encode(Clip(loud, 16_000)) == encode(Clip(np.clip(loud, -1, 1), 16_000))


@pytest.mark.parametrize(("encoding", "rate_hz"), [("mp3", 44_101), ("flac", 999_983)])
def test_the_error_on_an_unsupported_rate_contains_no_object_address(encoding, rate_hz):
    with pytest.raises(ValueError, match=rf"^{encoding.upper()} of {rate_hz:,} Hz cannot be written \([^<]*\)$"):
        parse_encoding(encoding).encode(Clip(TONE.wave, rate_hz))


def test_lengths_that_no_sound_has_are_refused():
    with pytest.raises(ValueError, match="1e-05 s at 16,000 Hz is less than one sample"):
        set_length(TONE, 0.00001)
    with pytest.raises(ValueError, match=r"1000000000\.0 s at 16,000 Hz is more than 67,108,864 samples"):
        set_length(TONE, 1e9)


def test_stereo_is_averaged():
    file = io.BytesIO()
    soundfile.write(file, np.array([[1.0, 0.0], [0.5, -0.5]]), 8000, format="WAV", subtype="FLOAT")
    assert decode_audio(file.getvalue()).wave.tolist() == [0.5, 0.0]


def test_reencode_fits_then_encodes():
    png = parse_encoding("png").encode(PIXELS[:100, :150])
    assert len(reencode(png, parse_encoding("fhwc"), Fitting(image_size=32))) == 32 * 32 * 3
    wav = parse_encoding("wav:float32").encode(TONE)
    data = reencode(wav, parse_encoding("wav:int16"), Fitting(sample_rate_hz=8000, seconds=2))
    assert len(data) == 44 + 2 * 16000


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_kind_of_picture_becomes_rgb(mode):
    file = io.BytesIO()
    Image.new(mode, (5, 4)).save(file, "TIFF")
    pixels = decode_image(file.getvalue())
    assert (pixels.shape, pixels.dtype) == ((4, 5, 3), np.uint8)


def test_the_full_spelling_and_the_extension():
    assert parse_encoding("jpeg").text == "jpeg:100"
    assert parse_encoding("jpeg:60").extension == "jpg"
    stored = parse_encoding("as_stored")
    assert (stored.modality, stored.extension, stored.encode) == (None, None, None)
    assert pickle.loads(pickle.dumps(parse_encoding("wav:int16"))).encode(TONE)


def test_every_row_has_a_modality():
    assert {row.modality for row in ENCODINGS.values()} <= EXTENSIONS.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jpg", "did you mean 'jpeg'?"),
        ("PNG", "did you mean 'png'?"),
        ("wave:int16", "did you mean 'wav'?"),
        ("stored", "did you mean 'as_stored'?"),
        ("zzz", "allowed are as_stored, tiff, png, jpeg[:1…100], fhwc, fchw, wav:uint8|int16|int32|float32"),
        ("", "allowed are as_stored"),
        ("jpeg:0", "jpeg must be written as jpeg[:1…100]"),
        ("jpeg:", "jpeg must be written as"),
        ("jpeg:high", "jpeg must be written as"),
        ("wav", "wav must be written as wav:uint8|int16|int32|float32"),
        ("wav:int8", "wav must be written as"),
        ("png:9", "png must be written as png"),
        ("png:", "png must be written as png"),
    ],
)
def test_wrong_spellings_are_answered_with_the_right_ones(text, message):
    with pytest.raises(UserError) as error:
        parse_encoding(text)
    assert f"encoding {text!r}" in str(error.value)
    assert message in str(error.value)

"""Sounds are decoded whole or not at all: cut, empty, endless and non-finite ones are refused, at bounded cost."""

import functools
import io
import struct
import sys

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from bfsys.data.media import sounds
from bfsys.data.media.input_formats import kind_of
from bfsys.data.media.sounds import decode_audio, size_of_tags

RNG = np.random.default_rng(0)
NOISE = RNG.uniform(-0.4, 0.4, (20_000, 8)).astype(np.float32)
KINDS = [
    ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAVEX", "PCM_24"), ("WAV", "IMA_ADPCM"), ("RF64", "PCM_16"),
    ("W64", "PCM_16"), ("AIFF", "PCM_16"), ("AIFF", "FLOAT"),
    ("AU", "PCM_16"), ("CAF", "PCM_16"), ("NIST", "PCM_16"), ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
]  # fmt: skip
TWO_AT_MOST = {"MP3", "IMA_ADPCM"}  # channels


@functools.cache
def sound(file_format="WAV", subtype="PCM_16", samples=20_000, channels=1, rate_hz=16_000):
    return stored(NOISE[:samples, :channels], file_format, subtype, rate_hz)


def stored(wave, file_format="WAV", subtype="FLOAT", rate_hz=16_000):
    file = io.BytesIO()
    soundfile.write(file, wave, rate_hz, format=file_format, subtype=subtype)
    return file.getvalue()


def patched(content, place, new):
    return content[:place] + new + content[place + len(new) :]


def of_unknown_length(flac):
    """Make a WAV file as programs write it to a pipe, without a length."""
    return patched(flac, 21, bytes([flac[21] & 0xF0, 0, 0, 0, 0]))


@pytest.mark.parametrize(
    ("file_format", "subtype", "channels"),
    [(*kind, channels) for kind in KINDS for channels in (1, 2, 3, 8) if channels <= 2 or not TWO_AT_MOST & set(kind)],
)
def test_blocks_give_the_bits_of_the_whole(file_format, subtype, channels, monkeypatch):
    content = sound(file_format, subtype, channels=channels)
    whole, rate_hz = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    monkeypatch.setattr(sounds, "BLOCK_SAMPLES", 3001)
    clip = decode_audio(content)
    assert clip.rate_hz == rate_hz
    assert np.array_equal(clip.wave, whole.mean(axis=1))
    assert clip.wave.dtype == np.float32


@settings(max_examples=15)
@given(kind=st.sampled_from(KINDS), share=st.floats(0, 1, exclude_max=True))
def test_a_sound_that_is_cut_anywhere_is_refused(kind, share):
    content = sound(*kind)
    with pytest.raises(ValueError, match=r"^(is truncated|is not a sound|holds no samples)"):
        decode_audio(content[: int(share * len(content))])


@pytest.mark.parametrize("kind", KINDS)
def test_one_byte_less_is_a_cut(kind):
    with pytest.raises(ValueError, match=r"^is truncated"):
        decode_audio(sound(*kind)[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_behind_the_samples_do_no_harm(kind):
    content = sound(*kind)
    clip = decode_audio(content + b"TAG" + bytes(125))
    assert np.array_equal(clip.wave[:20_000], decode_audio(content).wave[:20_000])


def test_the_error_on_a_cut_sound_gives_announced_and_existing_bytes():
    with pytest.raises(
        ValueError, match="is truncated: its header announces 40,000 bytes from byte 44, but the file has only 956"
    ):
        decode_audio(sound()[:1000])


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("in_riff_too", [True, False])
def test_a_wav_from_a_pipe_is_whole(size, in_riff_too):
    content = patched(sound(), 40, struct.pack("<I", size))
    content = patched(content, 4, struct.pack("<I", size)) if in_riff_too else content
    assert np.array_equal(decode_audio(content).wave, decode_audio(sound()).wave)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
def test_other_sounds_from_a_pipe_are_whole(size):
    au, aiff = sound("AU"), sound("AIFF")
    place = aiff.index(b"SSND") + 4
    rf64 = sound("RF64")
    for piped, whole in (
        (patched(rf64, 28, bytes(8)) if size == 0 else rf64, rf64),
        (patched(au, 8, struct.pack(">I", size)), au),
        (patched(aiff, place, struct.pack(">I", size)), aiff),
        (of_unknown_length(sound("FLAC")), sound("FLAC")),
    ):
        assert np.array_equal(decode_audio(piped).wave, decode_audio(whole).wave)


@pytest.mark.parametrize("size", [None, 0])
def test_a_bw64_is_a_wav(size):
    """Broadcast Wave 64 succeeds RF64."""
    rf64 = sound("RF64")
    bw64 = patched(rf64, 0, b"BW64") if size is None else patched(patched(rf64, 0, b"BW64"), 28, bytes(8))
    assert getattr(kind_of(np.frombuffer(bw64, np.uint8)), "name", None) == "a WAV"
    assert np.array_equal(decode_audio(bw64).wave, decode_audio(rf64).wave)


def test_a_missing_padding_byte_does_not_count_as_a_cut():
    content = sound(subtype="PCM_U8", samples=999)
    assert len(content) % 2 == 0
    assert np.array_equal(decode_audio(content[:-1]).wave, decode_audio(content).wave)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0] not in ("FLAC", "MP3") and kind[1] != "OPUS"])
def test_a_sound_of_no_samples_is_refused(kind):
    with pytest.raises(ValueError, match=r"^holds no samples$"):
        decode_audio(sound(*kind, samples=0))


def test_an_empty_wav_with_a_chunk_behind_it_is_empty():
    with pytest.raises(ValueError, match="holds no samples"):
        decode_audio(sound(samples=0) + b"LIST\x04\0\0\0INFO")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channel", [0, 1])
def test_samples_that_are_not_finite_are_refused(value, channel):
    wave = NOISE[:500, :2].copy()
    wave[123, channel] = value
    with pytest.raises(ValueError, match="non-finite"):
        decode_audio(stored(wave))


@pytest.mark.filterwarnings("error")
def test_channels_whose_sum_overflows_are_refused_without_a_warning():
    with pytest.raises(ValueError, match="non-finite"):
        decode_audio(stored(np.full((10, 2), 3e38)))


@pytest.mark.parametrize("rate_hz", [0, 1, 999, 1_000_001, 2**31 - 1, 2**32 - 1])
def test_rates_that_no_recording_has_are_refused(rate_hz):
    with pytest.raises(ValueError, match=r"sample rate of .* allowed are 1,000 to 1,000,000 Hz|libsndfile can read"):
        decode_audio(patched(sound(), 24, struct.pack("<I", rate_hz)))


def test_a_chain_of_ogg_streams_is_refused():
    ogg = sound("OGG", "VORBIS")
    with pytest.raises(ValueError, match="is a chain of Ogg streams, of which only the first would be decoded"):
        decode_audio(ogg + ogg)


@pytest.mark.parametrize("letters", [200, 32_766])  # at 65,536 bytes, the text is cut within a letter
def test_text_in_utf16_is_refused_without_a_warning_of_libmpg123(letters, capfd):
    with pytest.raises(ValueError, match="is text in UTF-16"):
        decode_audio(("h" * letters + "🎵").encode("utf-16"))
    assert capfd.readouterr().err == ""


def test_a_midi_sample_dump_is_refused():
    file = io.BytesIO()
    soundfile.write(file, np.zeros(100, np.float32), 8000, format="SDS", subtype="PCM_16")
    with pytest.raises(ValueError, match="is a MIDI sample dump, which is not decoded; write it as WAV"):
        decode_audio(file.getvalue())


@pytest.mark.parametrize("start", [b"\xff\xe0\0", b"\xff\xff\0", b"\xff\xff\x90"])
def test_a_file_that_is_not_mpeg_audio_is_refused_without_a_note_of_libmpg123(start, capfd):
    with pytest.raises(ValueError, match="is not a sound that libsndfile can read"):
        decode_audio(start + bytes(3000))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", [("WAV", "PCM_16"), ("AIFF", "PCM_16"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III")])
def test_tags_before_a_sound_cost_no_sample(kind):
    tag = b"ID3\x03\0\0\0\0\x01\x00" + bytes(128)
    with_footer = b"ID3\x04\0\x10\0\0\x01\x00" + bytes(128) + b"3DI\x04\0\x10\0\0\x01\x00"
    ape = b"APETAGEX" + struct.pack("<4I", 2000, 40, 0, 0xA0000000) + bytes(8 + 40)
    for tags in (tag, tag + tag, with_footer, ape, tag + ape):
        assert np.array_equal(decode_audio(tags + sound(*kind)).wave, decode_audio(sound(*kind)).wave)
        assert size_of_tags(tags + sound(*kind)) == len(tags)


@pytest.mark.parametrize("format", ["W64", "NIST", "WAV", "AIFF", "AU", "CAF"])
def test_what_follows_the_samples_is_not_decoded(format):
    assert np.array_equal(decode_audio(sound(format) + b"more" * 99).wave, decode_audio(sound(format)).wave)


def test_errors_on_files_that_are_not_sounds_contain_no_object_address():
    without_channels, of_too_many = (patched(sound(), 22, channels) for channels in (b"\0\0", b"\xff\xff"))
    for content in (b"", b"no sound", b"RIFF\0\0\0\0WAVE", without_channels, of_too_many):
        with pytest.raises(ValueError, match=r"^is not a sound that libsndfile can read \([^<]*\)$"):
            decode_audio(content)


def test_a_header_that_leads_to_before_the_file_prints_nothing(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    with pytest.raises(ValueError, match="is not a sound that libsndfile can read"):
        decode_audio(patched(sound("AIFF"), 35, bytes(4)))
    assert not printed


@pytest.mark.parametrize("content", [sound(), sound("FLAC"), of_unknown_length(sound("FLAC"))])
def test_a_sound_of_too_many_samples_is_refused_unless_its_beginning_is_wanted(content, monkeypatch):
    monkeypatch.setattr(sounds, "MOST_SAMPLES", 19_999)
    monkeypatch.setattr(sounds, "WHOLE_SAMPLES", 1000)
    with pytest.raises(ValueError, match="samples; allowed are 19,999"):
        decode_audio(content)
    assert len(decode_audio(content, 0.5).wave) == 20_000


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_beginning_of_a_long_sound_and_the_edge_for_resampling_are_decoded(kind, monkeypatch):
    whole = decode_audio(sound(*kind)).wave
    monkeypatch.setattr(sounds, "EDGE_S", 0.125)
    assert np.array_equal(decode_audio(sound(*kind), 0.25).wave, whole)
    monkeypatch.setattr(sounds, "WHOLE_SAMPLES", 10_000)
    assert np.array_equal(decode_audio(sound(*kind), 0.25).wave, whole[:6000])


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_is_found_where_only_the_beginning_is_decoded(kind, monkeypatch):
    monkeypatch.setattr(sounds, "EDGE_S", 0.0)
    monkeypatch.setattr(sounds, "WHOLE_SAMPLES", 1000)
    with pytest.raises(ValueError, match=r"^is truncated"):
        decode_audio(sound(*kind)[:-10], 0.1)


def test_a_header_that_promises_far_more_than_follows_costs_nothing(monkeypatch):
    flac = patched(sound("FLAC"), 21, bytes([sound("FLAC")[21] | 0x0F]) + b"\xff" * 4)  # 2³⁶ samples
    with pytest.raises(ValueError, match="has 68,719,476,735 samples"):
        decode_audio(flac)
    with pytest.raises(ValueError, match=r"^is truncated"):
        decode_audio(flac, 0.5)


@settings(max_examples=60)
@given(
    st.sampled_from([b"RIFF", b"RF64", b"FORM", b"riff", b"caff", b".snd", b"NIST_1A", b"OggS", b"ID3\3", b"fLaC"]),
    st.binary(max_size=200),
)
def test_any_header_is_decoded_or_refused_with_an_explanation(magic, rest):
    assert " object at 0x" not in refusal(magic + rest)


def refusal(content):
    try:
        decode_audio(content)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["._", ".AppleDouble"])
def test_the_current_folder_does_not_decide_what_a_sound_is(name, tmp_path, monkeypatch):
    """libsndfile looks there for a Mac resource fork if a file has no name."""
    mp3 = sound("MP3", "MPEG_LAYER_III")
    expected = decode_audio(mp3)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir() if name.startswith(".A") else (tmp_path / name).write_bytes(b"")
    assert np.array_equal(decode_audio(mp3).wave, expected.wave)

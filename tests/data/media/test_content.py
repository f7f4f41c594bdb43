"""Content tables follow the order of the file, in every format."""

import io
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bfsys.data.media import content
from bfsys.data.media.content import COLUMNS, ROWS, content_of
from bfsys.data.media.same_format import NotRewritableError, change_sound
from bfsys.data.media.sounds import decode_audio

RATE_HZ = 8000


def picture(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def sound(wave: np.ndarray, kind: str = "WAV", rate_hz: int = RATE_HZ) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate_hz, format=kind)
    return file.getvalue()


def tones(*frequencies_hz: float, seconds: float = 0.5) -> np.ndarray:
    time = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    return np.concatenate([0.5 * np.sin(2 * np.pi * f * time) for f in frequencies_hz])


UPPER_HALF_RED = np.zeros((40, 30, 3), np.uint8)
UPPER_HALF_RED[:20, :, 0] = 255


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "JPEG", "WEBP", "GIF", "AVIF", "JPEG2000"])
def test_rows_of_a_picture_are_its_strips_from_top_to_bottom(kind: str) -> None:
    table = content_of(picture(UPPER_HALF_RED, kind)).astype(np.float32)
    assert table.shape == (ROWS, COLUMNS)
    red, green, blue = table.reshape(ROWS, -1, 3).mean(1).T
    assert (red[: ROWS // 2 - 2] > 1).all()
    assert (red[ROWS // 2 + 2 :] < 0).all()
    assert np.ptp(green) < 0.3
    assert np.ptp(blue) < 0.3


def test_cells_of_a_strip_run_from_left_to_right() -> None:
    pixels = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    cells = content_of(picture(pixels)).astype(np.float32).reshape(ROWS, -1, 3)
    assert (np.diff(cells, axis=1) > 0).all()


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "W64", "CAF", "NIST"])
def test_rows_of_a_sound_are_its_spectra_from_beginning_to_end(kind: str) -> None:
    table = content_of(sound(tones(300, 2500), kind)).astype(np.float32)
    assert table.shape == (ROWS, COLUMNS)
    loudest = table.argmax(1)
    low, high = loudest[4 : ROWS // 2 - 4], loudest[ROWS // 2 + 4 : -4]
    assert np.ptp(low) == 0
    assert np.ptp(high) == 0
    assert low[0] < COLUMNS / 3 < COLUMNS * 2 / 3 < high[0]


def test_loudness_and_contrast_do_not_matter() -> None:
    loud, quiet = (content_of(sound(share * tones(300, 900))).astype(np.float32) for share in (1, 0.1))
    np.testing.assert_allclose(loud, quiet, atol=0.05)
    table = content_of(picture(UPPER_HALF_RED)).astype(np.float32)
    assert abs(table.mean()) < 1e-3
    assert 0.5 < table.std() <= 1


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"a text", id="neither picture nor sound"),
        pytest.param(b"", id="empty"),
        pytest.param(picture(UPPER_HALF_RED)[:60], id="cut picture"),
        pytest.param(sound(tones(300))[:50], id="cut sound"),
    ],
)
def test_files_that_cannot_be_decoded_have_no_table(data: bytes) -> None:
    assert np.isnan(content_of(data)).all()


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "MP3"])
def test_long_sounds_have_no_table_and_are_not_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = sound(tones(300, seconds=1.0), kind)
    assert not np.isnan(content_of(data)).any()
    monkeypatch.setattr(content, "LONGEST_S", 0.9)
    monkeypatch.setattr(content, "decode_audio", lambda *_: pytest.fail("is decoded"))
    assert np.isnan(content_of(data)).all()


def test_a_sound_that_does_not_state_its_length_is_used_unless_it_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    flac = sound(tones(300, seconds=5.0), "FLAC")
    streamed = flac[:21] + bytes([flac[21] & 0xF0, 0, 0, 0, 0]) + flac[26:]
    assert np.array_equal(content_of(streamed), content_of(flac))
    assert len(decode_audio(streamed, content.LONGEST_S).wave) == 5 * RATE_HZ
    monkeypatch.setattr(content, "LONGEST_S", 0.9)
    assert len(decode_audio(streamed, content.LONGEST_S).wave) < 4 * RATE_HZ
    assert np.isnan(content_of(streamed)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_large_pictures_have_no_table_and_are_not_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = picture(UPPER_HALF_RED, kind)
    monkeypatch.setattr(content, "MOST_PIXELS", 40 * 30 - 1)
    monkeypatch.setattr(content, "decode_image", lambda *_: pytest.fail("is decoded"))
    assert np.isnan(content_of(data)).all()


@pytest.mark.parametrize("with_id3", [False, True])
def test_tags_at_the_end_of_an_mp3_change_nothing_and_print_nothing(with_id3: bool, capfd) -> None:
    """libmpg123 prints its warnings to standard error."""
    item = struct.pack("<II", 900, 0) + b"Title\0" + bytes(900)
    fields = (2000, len(item) + 32, 1)
    head, foot = (b"APETAGEX" + struct.pack("<IIII", *fields, flags) + bytes(8) for flags in (0xA0000000, 0x80000000))
    plain = sound(tones(300, 600), "MP3")
    tagged = plain + head + item + foot + (b"TAG" + b"a" * 125 if with_id3 else b"")
    assert (content_of(tagged) == content_of(plain)).all()
    assert (decode_audio(tagged).wave == decode_audio(plain).wave).all()
    with pytest.raises(NotRewritableError):
        change_sound(tagged, lambda clip: clip)
    assert capfd.readouterr().err == ""
    soundfile.SoundFile(io.BytesIO(tagged)).close()
    assert "Xing stream size off" in capfd.readouterr().err  # shows that the check above can fail


def test_a_truncated_mp3_has_no_table_and_prints_nothing(capfd) -> None:
    mp3 = sound(tones(300, 900), "MP3")
    assert np.isnan(content_of(mp3[: len(mp3) // 2])).all()
    assert capfd.readouterr().err == ""


def test_samples_as_large_as_numbers_go_warn_of_nothing() -> None:
    file = io.BytesIO()
    soundfile.write(file, 1e30 * tones(300), RATE_HZ, format="WAV", subtype="FLOAT")
    assert np.isnan(content_of(file.getvalue())).all()


def test_the_number_of_threads_changes_no_bit() -> None:
    """Ranks on machines with different numbers of cores read the same file, and a resume may use other machines."""
    program = """
import hashlib, io, numpy as np, soundfile
from bfsys.data.media.content import content_of
digest = hashlib.sha256()
for seed in range(20):
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).uniform(-1, 1, 16000), 16000, format="WAV")
    digest.update(content_of(file.getvalue()).tobytes())
print(digest.hexdigest())
"""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | dict.fromkeys(names, threads),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("data", [picture(np.full((9, 9, 3), 7, np.uint8)), sound(np.zeros(800))])
def test_nothing_to_see_or_hear_is_a_finite_table(data: bytes) -> None:
    table = content_of(data).astype(np.float32)
    assert np.isfinite(table).all()
    assert np.abs(table).max() < 0.01


def test_running_out_of_memory_is_not_blamed_on_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(data: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(content, "decode_image", hungry)
    with pytest.raises(MemoryError):
        content_of(picture(UPPER_HALF_RED))


@given(st.sampled_from([picture(UPPER_HALF_RED), picture(UPPER_HALF_RED, "JPEG"), sound(tones(300)[:900])]), st.data())
def test_damaged_files_have_a_table_or_none(whole: bytes, data: st.DataObject) -> None:
    damaged = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=8)):
        damaged[place] = data.draw(st.integers(0, 255))
    table = content_of(bytes(damaged))
    assert table.shape == (ROWS, COLUMNS)
    assert np.isnan(table).all() or np.isfinite(table).all()


@given(st.integers(1, 40), st.sampled_from([1000, 8000, 44100]))
def test_short_sounds_of_any_rate_have_a_finite_table(samples: int, rate_hz: int) -> None:
    table = content_of(sound(np.random.default_rng(samples).uniform(-1, 1, samples), rate_hz=rate_hz))
    assert np.isfinite(table).all()

"""Jitter changes pictures and sounds slightly, and leaves all other files unchanged."""

import io
import pickle
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bfsys import config
from bfsys.data.streaming.byte_transforms import lengths_after, parse_transforms
from bfsys.data.streaming.jitter import Jitter

NOTHING = config.Jitter(share=1, rotation_degrees=0, zoom=0, shift=0, mirror=False, speed=0, gain_db=0)
NONE = Jitter(NOTHING, least_bytes=1)
ALL = Jitter(config.Jitter(share=1, mirror=True), least_bytes=1)
DOT = np.zeros((40, 60, 3), np.uint8)
DOT[20:24, 30:34] = 200
WAVE = 0.4 * np.sin(np.arange(4_000) * 0.2)


def only(**options: float) -> Jitter:
    return Jitter(replace(NOTHING, **options), least_bytes=1)


def file_of(content: np.ndarray) -> bytes:
    file = io.BytesIO()
    if content.ndim == 3:
        Image.fromarray(content).save(file, "PNG")
    else:
        soundfile.write(file, content, 8_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def wave(data: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(data))[0]


def drawn(jitter: Jitter, data: bytes, count: int = 200) -> list[bytes]:
    return [jitter(data, np.random.default_rng(seed)) for seed in range(count)]


PICTURE, SOUND = file_of(DOT), file_of(WAVE)


def test_nothing_asked_for_changes_nothing() -> None:
    assert NONE(PICTURE, np.random.default_rng(0)) == PICTURE
    assert np.array_equal(wave(NONE(SOUND, np.random.default_rng(0))), wave(SOUND))


@pytest.mark.parametrize("data", [PICTURE, SOUND])
def test_equal_generators_give_equal_bytes(data: bytes) -> None:
    again = pickle.loads(pickle.dumps(ALL))
    assert drawn(ALL, data, 20) == drawn(again, data, 20)
    assert len(set(drawn(ALL, data, 20))) == 20


@pytest.mark.parametrize("data", [PICTURE, SOUND])
def test_a_share_of_the_files_goes_in_as_stored(data: bytes) -> None:
    unchanged = sum(changed == data for changed in drawn(replace(ALL, options=replace(ALL.options, share=0.75)), data))
    assert 25 <= unchanged <= 75  # of 200


def middles(jitter: Jitter) -> np.ndarray:
    """[200, 2]: the position of the dot in changed pictures."""
    return np.array([np.argwhere(pixels(data)[..., 0]).mean(0) for data in drawn(jitter, PICTURE)])


def test_pictures_move_as_far_as_asked_for() -> None:
    away = middles(only(shift=0.1)) - [21.5, 31.5]
    assert np.array_equal(np.abs(away).max(0), [4, 6])  # a tenth of 40 and of 60
    assert len(np.unique(away, axis=0)) > 60
    assert np.abs(middles(only(rotation_degrees=10)) - [21.5, 31.5]).max() < 1.5


def test_pixels_keep_their_values() -> None:
    for data in drawn(ALL, PICTURE, 50):
        assert set(np.unique(pixels(data))) <= {0, 200}


def test_half_of_the_pictures_are_mirrored() -> None:
    assert 70 < np.count_nonzero(middles(only(mirror=True))[:, 1] < 29) < 130


def test_areas_from_outside_the_picture_have_the_colour_of_its_corner() -> None:
    framed = DOT + np.uint8(30)
    for data in drawn(only(shift=0.3, zoom=0.3), file_of(framed), 30):
        assert set(np.unique(pixels(data))) <= {30, 230}


def test_sounds_change_in_length_pitch_and_loudness_as_asked_for() -> None:
    lengths = [len(wave(data)) for data in drawn(only(speed=0.1), SOUND)]
    assert 0.9 < min(lengths) / (4_000 / 1.1) < 1.1
    assert max(lengths) <= 4_445
    assert min(lengths) >= 3_636
    assert len(set(lengths)) > 15
    loudness = [20 * np.log10(np.abs(wave(data)).max() / 0.4) for data in drawn(only(gain_db=6), SOUND)]
    assert -6.1 < min(loudness) < -5
    assert 5 < max(loudness) < 6.1
    lengths = [len(wave(data)) for data in drawn(only(shift=0.1), SOUND)]
    assert 3_200 <= min(lengths) < 3_400
    assert 4_600 < max(lengths) <= 4_800


def test_channels_are_changed_alike() -> None:
    stereo = file_of(np.stack([WAVE, -WAVE], 1))
    for data in drawn(ALL, stereo, 20):
        left, right = wave(data).T
        assert np.array_equal(left, -right)


@given(st.sampled_from([PICTURE, SOUND]), st.integers(0, 10_000), st.integers(0, 255), st.integers(0, 10_000))
def test_damaged_files_go_in(data: bytes, place: int, value: int, length: int) -> None:
    damaged = bytearray(data[:length])
    if damaged:
        damaged[place % len(damaged)] = value
    assert isinstance(ALL(bytes(damaged), np.random.default_rng(0)), bytes)


@pytest.mark.parametrize("data", [b"", b"text", PICTURE[:70], SOUND[:30], b"\xff\xd8\xff" + bytes(100)])
def test_files_that_cannot_be_changed_stay_unchanged(data: bytes) -> None:
    assert ALL(data, np.random.default_rng(0)) == data


def test_a_file_that_would_become_too_short_stays_unchanged() -> None:
    shortest = replace(ALL, least_bytes=len(SOUND))
    assert all(len(data) >= len(SOUND) for data in drawn(shortest, SOUND, 50))


def test_a_file_that_transforms_would_make_too_short_is_not_changed() -> None:
    transforms = parse_transforms(["keep:0.1"])
    options = replace(NOTHING, speed=0.5)
    least = int(lengths_after(transforms, np.array([len(SOUND)]))[0])
    lengths = {len(data) for data in drawn(Jitter(options, least, transforms), SOUND, 30)}
    assert len(lengths) > 3
    assert min(lengths) == len(SOUND)

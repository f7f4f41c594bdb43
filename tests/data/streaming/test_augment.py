"""Augmentation: published sizes and statistics, and the same bytes from the same generator anywhere."""

import io
import multiprocessing
import pickle
import random
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from PIL import Image

from bfsys.config import Augment
from bfsys.data.media.encodings import parse_encoding, set_length
from bfsys.data.media.pictures import decode_image
from bfsys.data.media.sounds import Clip, decode_audio
from bfsys.data.streaming import augment
from bfsys.data.streaming.augment import BACKGROUND_GAIN, Augmentation, change_speed
from bfsys.errors import UserError
from tests.data.media.test_encodings import PICTURE_BYTES, SOUND_BYTES
from tests.forked import server_context

# A picture with a different value in every pixel, so that the result shows crops, flips and erasing
PIXELS = np.stack(
    np.broadcast_arrays(np.linspace(10, 250, 96)[:, None], np.linspace(10, 250, 128)[None], np.full((96, 128), 90)), 2
).astype(np.uint8)
PICTURE = parse_encoding("png").encode(PIXELS)
TONE = Clip((0.4 * np.sin(np.arange(16_000) * 0.1)).astype(np.float32), 16_000)
WAV = parse_encoding("wav:float32").encode(TONE)
OTHER_WAV = parse_encoding("wav:float32").encode(Clip(np.linspace(-0.5, 0.5, 12_000, dtype=np.float32), 16_000))
# An impulse, whose position shows the shift
IMPULSE = parse_encoding("wav:float32").encode(Clip(np.eye(1, 16_000, 8_000, dtype=np.float32)[0], 16_000))


def augmentation(encoding, background=None, **options):
    return Augmentation(Augment(encoding, background=str(background) if background else None, **options))


def wave_of(encoded):
    return decode_audio(encoded[0]).wave


def recorded(folder, name, wave, rate_hz=16_000):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(parse_encoding("wav:float32").encode(Clip(wave.astype(np.float32), rate_hz)))


@pytest.fixture
def background(tmp_path):
    """Three recordings of different amplitude, among files that are not recordings."""
    folder = tmp_path / "background"
    for i, name in enumerate(("a.wav", "deep/b.WAV", "c.wav")):
        recorded(folder, name, np.full(20_000, 0.1 * (i + 1)))
    (folder / "README.md").write_text("not a sound")
    (folder / "b_damaged.wav").write_bytes(b"RIFF, or so it says")
    return folder


@pytest.mark.parametrize(("encoding", "size_bytes"), PICTURE_BYTES)
def test_image_sizes_are_the_published_ones(encoding, size_bytes):
    data, share = augmentation(encoding)(PICTURE, np.random.default_rng(0))
    assert (len(data), share) == (size_bytes, 0.0)


@pytest.mark.parametrize(("encoding", "size_bytes"), SOUND_BYTES)
@pytest.mark.parametrize("rate_hz", [16_000, 11_025])
def test_audio_sizes_are_the_published_ones(encoding, size_bytes, rate_hz, background):
    first = parse_encoding("wav:int16").encode(Clip(TONE.wave, rate_hz))
    augmented = augmentation(encoding, background=background, speeds=(0.9, 1.0, 1.1))
    data, share = augmented(first, np.random.default_rng(0), OTHER_WAV)
    assert len(data) == size_bytes
    assert 0 < share < 1


def test_sizes_follow_the_options():
    assert len(augmentation("fhwc", image_size=32)(PICTURE, np.random.default_rng(0))[0]) == 32 * 32 * 3
    short = augmentation("wav:int16", sample_rate_hz=8000, seconds=0.25)
    assert len(short(WAV, np.random.default_rng(0))[0]) == 44 + 2 * 2000


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 300), (300, 2)])
def test_odd_pictures(width, height):
    picture = parse_encoding("png").encode(np.full((height, width, 3), 200, np.uint8))
    for seed in range(5):
        assert len(augmentation("fhwc", image_size=32)(picture, np.random.default_rng(seed))[0]) == 32 * 32 * 3


@pytest.fixture
def cases(background):
    """Pairs of an augmentation and its arguments, without the generator."""
    sound = augmentation("wav:int16", background=background, speeds=(0.9, 1.0, 1.1))
    return [(augmentation("jpeg", image_size=64), (PICTURE, None)), (sound, (WAV, OTHER_WAV))]


def call(case, seed):
    augmented, (data, second) = case
    return augmented(data, np.random.default_rng(seed), second)


def outcomes(cases):
    return [call(case, seed) for case in cases for seed in range(10)]


def test_equal_generators_give_equal_bytes_in_any_order_and_copy(cases):
    expected = outcomes(cases)
    torch.rand(7)  # advances the global generator
    assert outcomes(cases) == expected
    assert [call(case, seed) for case in cases[::-1] for seed in range(9, -1, -1)] == expected[::-1]
    assert outcomes(pickle.loads(pickle.dumps(cases))) == expected


def test_the_number_of_threads_does_not_matter(cases):
    threads, expected = torch.get_num_threads(), outcomes(cases)
    try:
        torch.set_num_threads(3)
        assert outcomes(cases) == expected
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("is_own_child", [True, False])
def test_equal_generators_give_equal_bytes_in_another_process(cases, is_own_child):
    context = multiprocessing.get_context("fork") if is_own_child else server_context()
    with context.Pool(1) as pool:
        there = pool.apply(outcomes, (cases,))
    assert there == outcomes(cases)


def test_other_seeds_give_other_bytes(cases):
    for case in cases:
        assert len({call(case, [0, epoch, 5]) for epoch in range(10)}) == 10


def test_nothing_global_is_drawn_from_or_seeded(cases):
    def states():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    before = states()
    outcomes(cases)
    with pytest.raises(Exception, match="not an image"):
        cases[0][0](b"no picture", np.random.default_rng(0))
    assert states() == before


@pytest.fixture
def plain_colours(monkeypatch):
    """Disable RandAugment, whose effects would hide those of the other transforms."""
    monkeypatch.setattr(augment, "RAND_AUGMENT_OPERATIONS", 0)


def pictures(count, size=32):
    augmented = augmentation("fhwc", image_size=size)
    for seed in range(count):
        data, _ = augmented(PICTURE, np.random.default_rng(seed))
        yield np.frombuffer(data, np.uint8).reshape(size, size, 3).astype(int)


def test_half_the_pictures_are_flipped_a_quarter_erased_and_crops_vary(plain_colours):
    flipped, erased, corners = 0, 0, set()
    for pixels in pictures(400):
        black = (pixels == 0).all(2)  # blue is 90 except where it was erased
        erased += black.any()
        row = pixels[np.argmin(black.sum(1)), :, 1]
        row = row[row > 0]
        flipped += row[0] > row[-1]
        corners.add((*pixels[0, 0], *pixels[-1, -1]))
        if black.any():  # one rectangle
            rows, columns = np.flatnonzero(black.any(1)), np.flatnonzero(black.any(0))
            assert black.sum() == len(rows) * len(columns)
            assert 0.01 < black.mean() < 0.36
    assert 150 <= flipped <= 250  # 5 standard deviations
    assert 57 <= erased <= 143
    assert len(corners) > 390


def test_crops_have_the_published_scale_and_ratio(plain_colours, monkeypatch):
    monkeypatch.setattr(augment, "ERASED_SHARE", 0.0)
    sides = []
    for pixels in pictures(300):  # 32 pixel centres span 31/32 of a crop; the whole picture spans 240
        height, width = (np.ptp(pixels[:, :, c]) / 240 * 32 / 31 for c in (0, 1))
        sides.append((95 * height, 127 * width))
    height, width = np.array(sides).T
    areas, ratios = height * width / (96 * 128), width / height

    # Like the published code, draw until the crop lies within the picture
    rng = np.random.default_rng(0)
    area, ratio = rng.uniform(0.08, 1, 20_000), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 20_000))
    fits = (np.sqrt(area * 96 * 128 * ratio) <= 128) & (np.sqrt(area * 96 * 128 / ratio) <= 96)
    assert abs(areas.mean() - area[fits].mean()) < 0.06  # 4 standard deviations
    assert abs(ratios.mean() - ratio[fits].mean()) < 0.05
    # Looser, because the bicubic filter and rounding shift the borders of small crops
    assert 0.06 < areas.min() < 0.11
    assert areas.max() > 0.9
    assert 0.65 < ratios.min() < 0.85
    assert 1.2 < ratios.max() < 1.45


def test_rand_augment_applies_two_operations_of_magnitude_nine():
    compose = augmentation("tiff")._transform_picture
    rand_augment = compose.transforms[2]
    assert (rand_augment.num_ops, rand_augment.magnitude, rand_augment.num_magnitude_bins) == (2, 9, 31)
    assert rand_augment.interpolation.value == "bilinear"
    assert compose.transforms[0].interpolation.value == "bicubic"
    # It changes colours: the blue of a plain crop is 90 or, erased, 0
    assert sum(bool(set(np.unique(pixels[:, :, 2])) - {0, 90}) for pixels in pictures(40)) > 15


def test_sounds_are_rolled_by_up_to_a_tenth_of_a_second():
    augmented = augmentation("wav:float32")
    places = [int(np.argmax(wave_of(augmented(IMPULSE, np.random.default_rng(i))))) - 8000 for i in range(300)]
    assert -1600 <= min(places) < -1400
    assert 1400 < max(places) <= 1600
    assert abs(np.mean(places)) < 270  # 5 standard deviations


def test_rolling_is_circular():
    data = augmentation("wav:float32")(WAV, np.random.default_rng(1))
    assert np.array_equal(np.sort(wave_of(data)), np.sort(TONE.wave))


def test_mixup_is_the_weighted_sum_of_two_augmented_sounds():
    augmented = augmentation("wav:float32")
    assert augmented.mixes
    rng, again = np.random.default_rng(2), np.random.default_rng(2)
    mixed, share = augmented(WAV, rng, OTHER_WAV)
    first, second = wave_of(augmented(WAV, again)), wave_of(augmented(OTHER_WAV, again))  # drawn one after the other
    assert share == again.random()
    assert np.array_equal(decode_audio(mixed).wave, (1 - share) * first + share * second)
    assert not np.array_equal(first, TONE.wave)


def test_the_share_of_the_second_sound_is_uniform():
    augmented = augmentation("wav:uint8", seconds=0.01)
    shares = np.sort([augmented(WAV, np.random.default_rng(i), OTHER_WAV)[1] for i in range(400)])
    assert np.abs(shares - np.arange(400) / 400).max() < 0.09  # Kolmogorov and Smirnov: 1 in 300


def test_without_mixup_or_a_second_file_the_share_is_zero():
    assert not augmentation("wav:int16", mixup=False).mixes
    assert not augmentation("tiff").mixes
    assert augmentation("wav:int16")(WAV, np.random.default_rng(0))[1] == 0.0
    with pytest.raises(AssertionError):
        augmentation("wav:int16", mixup=False)(WAV, np.random.default_rng(0), WAV)


def test_background_is_added_50_db_down(background):
    silence = parse_encoding("wav:float32").encode(Clip(np.zeros(16_000, np.float32), 16_000))
    augmented = augmentation("wav:float32", background=background)
    heights = Counter()
    for seed in range(200):
        wave = wave_of(augmented(silence, np.random.default_rng(seed)))
        assert np.ptp(wave) == 0
        heights[round(float(wave[0]) / BACKGROUND_GAIN, 3)] += 1
    # The recordings are a.wav, b_damaged.wav, c.wav and deep/b.WAV. The damaged one is replaced by the next one.
    assert heights.keys() == {0.1, 0.2, 0.3}
    assert heights[0.3] > max(heights[0.1], heights[0.2])
    assert pytest.approx(10**-2.5) == BACKGROUND_GAIN


def test_background_crops_vary_and_short_recordings_are_repeated(tmp_path):
    silence = parse_encoding("wav:float32").encode(Clip(np.zeros(16_000, np.float32), 16_000))
    recorded(tmp_path, "long/ramp.wav", np.arange(48_000) / 48_000)
    augmented = augmentation("wav:float32", background=tmp_path / "long")
    waves = [wave_of(augmented(silence, np.random.default_rng(i))) / BACKGROUND_GAIN for i in range(50)]
    starts = np.array([wave.min() for wave in waves])
    assert starts.min() < 0.1
    assert 0.55 < starts.max() < 2 / 3 + 1e-3
    assert all(np.ptp(wave) == pytest.approx(1 / 3, abs=1e-3) for wave in waves)
    recorded(tmp_path, "short/ramp.wav", np.arange(100) / 100)
    wave = wave_of(augmentation("wav:float32", background=tmp_path / "short")(silence, np.random.default_rng(0)))
    assert np.allclose(np.sort(wave) / BACKGROUND_GAIN, np.repeat(np.arange(100) / 100, 160), atol=1e-5)


def test_few_recordings_stay_in_memory_and_that_changes_nothing(tmp_path):
    for i in range(25):
        recorded(tmp_path, f"{i:02}.wav", np.random.default_rng(i).uniform(-1, 1, 2000), 8000)
    options = {"background": tmp_path, "seconds": 0.05}
    used = augmentation("wav:float32", **options)
    results = [used(WAV, np.random.default_rng(i)) for i in range(60)]
    assert len(used._recordings._waves) == augment.RECORDINGS_KEPT
    assert results == [augmentation("wav:float32", **options)(WAV, np.random.default_rng(i)) for i in range(60)]
    assert not pickle.loads(pickle.dumps(used))._recordings._waves


def test_an_unusable_background_is_named(tmp_path):
    with pytest.raises(UserError, match=r"background .*missing: .*missing: No such file or directory"):
        augmentation("wav:int16", background=tmp_path / "missing")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"background .*none: there is no sound below this folder; looked for \.aif"):
        augmentation("wav:int16", background=tmp_path / "none")
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(UserError, match="there is no sound below"):
        augmentation("wav:int16", background=tmp_path)
    (tmp_path / "bad.wav").write_bytes(b"nothing")
    recorded(tmp_path, "empty.wav", np.zeros(0))
    augmented = augmentation("wav:int16", background=tmp_path)
    with pytest.raises(UserError, match=f"background {tmp_path}: none of the 2 files below this folder can be decoded"):
        augmented(WAV, np.random.default_rng(0))
    (tmp_path / "bad.wav").unlink()
    (tmp_path / "empty.wav").unlink()
    augmented = pickle.loads(pickle.dumps(augmented))
    with pytest.raises(UserError, match=r"\.wav: cannot be read: No such file or directory"):
        augmented(WAV, np.random.default_rng(0))


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 2.0])
def test_speed_changes_length_and_pitch(factor):
    clip = change_speed(TONE, factor)
    assert clip.rate_hz == 16_000
    assert len(clip.wave) == np.ceil(16_000 / factor)
    expected = 0.4 * np.sin(np.arange(len(clip.wave)) * 0.1 * factor)
    assert np.abs(clip.wave - expected)[100:-100].max() < 0.01
    theirs, _ = torchaudio.transforms.Speed(16_000, factor)(torch.from_numpy(TONE.wave))
    assert np.allclose(clip.wave, theirs.numpy(), atol=1e-5)


def test_speed_is_drawn_uniformly_and_changed_before_the_length_is_set():
    augmented = augmentation("wav:float32", speeds=(0.8, 1.0, 1.25))
    half = parse_encoding("wav:float32").encode(Clip(np.full(8000, 0.5, np.float32), 16_000))
    counts = Counter(
        round(int((np.abs(wave_of(augmented(half, np.random.default_rng(i)))) > 0.25).sum()), -2) for i in range(300)
    )
    assert counts.keys() == {10_000, 8000, 6400}
    assert min(counts.values()) > 60
    assert change_speed(TONE, 1.0) is TONE


@pytest.mark.parametrize("speed", [0, -1, 0.49, 2.01, 1.005, float("nan")])
def test_wrong_speeds(speed):
    with pytest.raises(UserError, match=rf"speed {speed}: allowed are 0.5 … 2.0 in steps of 0.01"):
        augmentation("wav:int16", speeds=(1.0, speed))


def test_impossible_augmentations_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"'as_stored': .* must be encoded; choose one of tiff, png"):
        augmentation("as_stored")
    for options in ({"speeds": (0.9,)}, {"background": tmp_path}):
        with pytest.raises(UserError, match="background and speeds are for sounds"):
            augmentation("png", **options)


def test_damaged_files_raise_what_the_decoder_raises():
    with pytest.raises(ValueError, match="is not an image that Pillow can read"):
        augmentation("tiff")(WAV, np.random.default_rng(0))
    for first, second in ((PICTURE, None), (WAV, PICTURE)):
        with pytest.raises(ValueError, match="is not a sound that libsndfile can read"):
            augmentation("wav:int16")(first, np.random.default_rng(0), second)
    not_finite = WAV[:-4] + np.float32(np.nan).tobytes()
    for damaged, reason in ((WAV[:-100], "is truncated"), (not_finite, "non-finite")):
        for first, second in ((damaged, None), (WAV, damaged)):
            with pytest.raises(ValueError, match=reason):
                augmentation("mp3")(first, np.random.default_rng(0), second)
        assert augmentation("mp3").fails_on(damaged)
    assert not augmentation("mp3").fails_on(WAV)


def test_running_out_of_memory_is_not_blamed_on_a_file(background, monkeypatch):
    augmented = augmentation("wav:int16", background=background)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(augment, "decode_audio", fail)
    with pytest.raises(MemoryError):
        augmented.fails_on(WAV)
    with pytest.raises(MemoryError):
        augmented._recordings.crop(10, np.random.default_rng(0))


def test_a_long_file_is_decoded_as_far_as_the_fastest_speed_needs(monkeypatch):
    asked, decode = [], decode_audio
    monkeypatch.setattr(augment, "decode_audio", lambda data, seconds: asked.append(seconds) or decode(data, seconds))
    augmentation("wav:int16", seconds=0.5, speeds=(0.8, 1.5))(WAV, np.random.default_rng(0))
    augmentation("wav:int16", seconds=0.5)(WAV, np.random.default_rng(0))
    assert asked == [0.75, 0.5]


def test_a_missing_torchvision_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(UserError, match=r"needs the torchvision .*: pip install -e '\.\[train\]'"):
        augmentation("tiff")
    augmentation("wav:int16")  # needs no recordings


def test_every_kind_of_picture_and_sound_goes_in():
    file = io.BytesIO()
    Image.new("CMYK", (50, 40)).save(file, "TIFF")
    encoded, _ = augmentation("png", image_size=16)(file.getvalue(), np.random.default_rng(0))
    assert decode_image(encoded).shape == (16, 16, 3)
    stereo = io.BytesIO()
    soundfile.write(stereo, np.full((44_100, 2), (0.5, -0.5)), 44_100, format="FLAC")
    assert np.abs(wave_of(augmentation("wav:float32")(stereo.getvalue(), np.random.default_rng(0)))).max() < 1e-4


def test_sounds_are_cut_and_filled_up_as_for_evaluation():
    rolled = wave_of(augmentation("wav:float32")(OTHER_WAV, np.random.default_rng(0)))
    assert np.array_equal(np.sort(rolled), np.sort(set_length(decode_audio(OTHER_WAV), 1.0).wave))

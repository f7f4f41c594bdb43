"""Byte transforms against their published meaning, written out here once more, and every wrong spelling."""

import pickle
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bfsys.data.streaming import byte_transforms
from bfsys.data.streaming.byte_transforms import (
    apply,
    lengths_after,
    parse_transform,
    parse_transforms,
    read_key,
    write_key,
)
from bfsys.errors import UserError
from tests.conftest import REPOSITORY

SHUFFLES = ["reverse", "random_shuffle", "cyclic_half_length", "stride:7", "stride:1024", "window_shuffle:16"]
ALL = [*SHUFFLES, "keep:0.1", "keep:0.5", "keep:1", "noise:-5:5", "noise:0:0", "permute"]
ALL += ["head:1", "head:4096", "flip:0.01", "flip:1", "truncate:0.5", "skip:1", "skip:64"]
PUBLISHED_ORDER = ["reverse", "keep:0.75", "noise:-20:20", "permute"]


def data_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)


def run(texts, data, seed=0):
    texts = [texts] if isinstance(texts, str) else texts
    return apply(parse_transforms(texts), data, np.random.default_rng(seed))


def published_permutation(n):
    return torch.randperm(n, generator=torch.Generator().manual_seed(2147483647)).numpy()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(ALL), max_size=4), st.lists(st.integers(0, 3000) | st.just(1), min_size=1, max_size=4))
def test_lengths_are_foreseen(texts, lengths):
    transforms = parse_transforms(texts)
    got = [len(apply(transforms, data_of(n), np.random.default_rng(0))) for n in lengths]
    foreseen = lengths_after(transforms, np.array(lengths))
    assert foreseen.dtype == np.int64
    assert foreseen.tolist() == got


@pytest.mark.parametrize("texts", [[], *([text] for text in ALL), PUBLISHED_ORDER])
@pytest.mark.parametrize("length", [0, 1, 2, 1023, 1024, 5000])
def test_the_input_stays_and_the_result_is_new_and_contiguous(texts, length):
    data = data_of(length)
    data.flags.writeable = False
    before = data.copy()
    result = run(texts, data)
    assert np.array_equal(data, before)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert result.flags.writeable
    assert not np.shares_memory(result, data)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SHUFFLES), st.binary(min_size=1, max_size=3000))
def test_shuffles_lose_and_add_nothing(text, content):
    data = np.frombuffer(content, np.uint8)
    assert np.array_equal(np.sort(run(text, data)), np.sort(data))


def test_reverse_is_its_own_inverse():
    data = data_of(1001)
    assert np.array_equal(run("reverse", data), data[::-1])
    assert np.array_equal(run(["reverse", "reverse"], data), data)


@pytest.mark.parametrize("length", [1, 10, 11])
def test_cyclic_rolls_by_half_the_length(length):
    data = data_of(length)
    expected = torch.roll(torch.from_numpy(data), length // 2).numpy()
    assert np.array_equal(run("cyclic_half_length", data), expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 1100) | st.just(10**15 - 1))
def test_stride_puts_every_nth_byte_together(length, step):
    data = data_of(length)
    expected = np.concatenate([data[i::step] for i in range(min(step, length))])
    assert np.array_equal(run(f"stride:{step}", data), expected)


def test_window_shuffle_is_one_fixed_permutation_of_every_full_window():
    data = data_of(3 * 1024 + 100)
    result = run("window_shuffle:1024", data, seed=1)
    order = published_permutation(1024)
    for start in (0, 1024, 2048):
        assert np.array_equal(result[start : start + 1024], data[start : start + 1024][order])
    assert np.array_equal(result[3072:], data[3072:])
    assert np.array_equal(run("window_shuffle:1024", data, seed=2), result)
    assert np.array_equal(run("window_shuffle:100000000000", data), data)


@pytest.mark.parametrize(("fraction", "length"), [(0.1, 150_528), (0.03, 5000), (0.75, 999), (0.1, 1), (0.1, 19)])
def test_keep_keeps_the_published_positions(fraction, length):
    data = data_of(length)
    kept = max(1, int(fraction * length))
    mask = torch.zeros(length)
    mask[torch.randperm(length, generator=torch.Generator().manual_seed(2147483647))[:kept]] = 1
    result = run(f"keep:{fraction}", data)
    assert np.array_equal(result, data[mask.bool().numpy()])
    assert len(result) == kept


def test_keep_takes_the_same_positions_in_files_of_one_length():
    ramp = np.arange(200, dtype=np.uint8)
    positions = run("keep:0.5", ramp, seed=1)
    assert np.array_equal(run("keep:0.5", data_of(200), seed=2), data_of(200)[positions])


def test_kept_positions_in_memory_are_bounded():
    transform = parse_transforms(["keep:0.5"])
    for length in range(1, 100):
        apply(transform, data_of(length), np.random.default_rng(0))
    assert byte_transforms._kept_positions.cache_info().currsize <= byte_transforms.MASKS_KEPT


def test_noise_is_uniform_within_its_inclusive_bounds_and_wraps_around():
    data = data_of(60_000)
    noise = (run("noise:-5:5", data).astype(int) - data + 128) % 256 - 128
    values, counts = np.unique(noise, return_counts=True)
    assert values.tolist() == list(range(-5, 6))
    assert np.abs(counts / 60_000 - 1 / 11).max() < 0.006  # 5 standard deviations
    assert run("noise:3:3", np.array([0, 254, 255], np.uint8)).tolist() == [3, 1, 2]
    assert run("noise:-255:-255", np.array([0, 254, 255], np.uint8)).tolist() == [1, 255, 0]
    assert run("noise:255:255", np.array([0, 254, 255], np.uint8)).tolist() == [255, 253, 254]


def test_permute_is_the_published_bijection():
    every = np.arange(256, dtype=np.uint8)
    key = run("permute", every)
    assert np.array_equal(key, published_permutation(256))
    assert key[:8].tolist() == [239, 90, 81, 175, 9, 100, 40, 32]  # it must not depend on the PyTorch release
    assert np.array_equal(np.sort(key), every)
    assert np.array_equal(np.argsort(key)[run("permute", data_of(999))], data_of(999))


def test_damage():
    data = data_of(10_000)
    flipped = run("flip:0.1", data)
    assert 900 < np.count_nonzero(flipped != data) < 1100
    assert np.count_nonzero(run("flip:1", data) != data) == len(data)  # never the same value again
    assert np.array_equal(run("truncate:0.25", data), data[:2500])
    assert np.array_equal(run("skip:64", data), data[64:])
    for text in ("truncate:0.1", "skip:64"):  # no file becomes empty
        assert run(text, data[:3]).tolist() == data[:1].tolist() if "trunc" in text else data[2:3].tolist()


def test_head_leaves_short_files_as_they_are():
    data = data_of(100)
    assert np.array_equal(run("head:64", data), data[:64])
    assert np.array_equal(run("head:100", data), data)
    assert np.array_equal(run("head:101", data), data)


def test_transforms_work_in_the_order_listed():
    data = data_of(500)
    one_by_one = data
    for text in PUBLISHED_ORDER[:2]:
        one_by_one = run(text, one_by_one)
    assert np.array_equal(run(PUBLISHED_ORDER[:2], data), one_by_one)
    assert not np.array_equal(run(["noise:1:1", "permute"], data), run(["permute", "noise:1:1"], data))


@pytest.mark.parametrize("text", ALL)
def test_only_some_transforms_draw(text):
    transform, data = parse_transform(text), data_of(4096)
    rng = np.random.default_rng(3)
    result = apply((transform,), data, rng)
    assert np.array_equal(result, run(text, data, seed=3))
    draws = text in ("random_shuffle", "noise:-5:5", "flip:0.01", "flip:1")
    assert (rng.bit_generator.state != np.random.default_rng(3).bit_generator.state) == draws
    assert np.array_equal(result, run(text, data, seed=4)) != draws


@pytest.mark.parametrize("text", ALL)
def test_transforms_are_pickled_and_compared(text):
    transform = parse_transform(text)
    again = pickle.loads(pickle.dumps(transform))
    assert again == transform == parse_transform(text)
    assert transform != parse_transform("keep:0.123")
    data = data_of(3000)
    assert np.array_equal(apply((again,), data, np.random.default_rng(0)), run(text, data))


def test_a_key_file_is_written_read_and_not_shown(tmp_path):
    path = tmp_path / "key"
    write_key(path)
    key = read_key(path)
    assert sorted(key.tolist()) == list(range(256))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    transform = parse_transform(f"permute:{path}")
    assert np.array_equal(apply((transform,), data_of(999), np.random.default_rng(0)), key[data_of(999)])
    assert repr(transform) == f"ByteTransform(text='permute:{path}')"
    write_key(tmp_path / "other")
    assert not np.array_equal(read_key(tmp_path / "other"), key)


def test_an_incomplete_key_file_is_removed(tmp_path):
    shell = f"ulimit -f 0; {sys.executable} -m bfsys make-key {tmp_path / 'key'}"
    done = subprocess.run(["bash", "-c", shell], cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert "cannot be written: File too large" in done.stderr
    assert not (tmp_path / "key").exists()


def test_a_key_file_is_not_overwritten(tmp_path):
    (tmp_path / "key").write_text("mine")
    with pytest.raises(UserError, match="exists and is not overwritten"):
        write_key(tmp_path / "key")
    assert (tmp_path / "key").read_text() == "mine"
    with pytest.raises(UserError, match="cannot be written: No such file"):
        write_key(tmp_path / "missing" / "key")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (" ".join(map(str, range(255))).encode(), "has 255 numbers"),
        (b"", "has 0 numbers"),
        (" ".join(map(str, range(1, 257))).encode(), "has a number twice or above 255"),
        (b"7 " * 256, "has a number twice or above 255"),
        (b"9" * 5000 + b" 1" * 255, "has a number twice or above 255"),
        (b"0x10 " * 256, "holds something other than numbers"),
        (b"-1 " * 256, "holds something other than numbers"),
        (b"\xff\x00", "holds something other than numbers"),
    ],
)
def test_wrong_key_files(tmp_path, content, message):
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        parse_transform(f"permute:{path}")
    assert str(error.value).startswith(f"byte transform 'permute:{path}': key file {path} {message}")
    assert "0 … 255, each once" in str(error.value)


def test_a_key_file_may_be_laid_out_in_any_way(tmp_path):
    (tmp_path / "key").write_text("\r\n".join(map(str, reversed(range(256)))) + "\n\n")
    assert run(f"permute:{tmp_path / 'key'}", np.array([0, 255], np.uint8)).tolist() == [255, 0]


def test_a_key_file_without_an_end_is_refused():
    with pytest.raises(UserError, match="key file /dev/zero holds something other than numbers"):
        parse_transform("permute:/dev/zero")


def test_a_missing_key_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"key file .*missing cannot be read: No such file or directory"):
        parse_transform(f"permute:{tmp_path / 'missing'}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reversed", "did you mean 'reverse'?"),
        ("random-shuffle", "did you mean 'random_shuffle'?"),
        ("Keep:0.1", "did you mean 'keep'?"),
        ("permutation", "did you mean 'permute'?"),
        ("zzz", "allowed are reverse, random_shuffle, cyclic_half_length, stride:STEP, window_shuffle:BYTES, keep:"),
        ("", "there is no ''; allowed are"),
        ("reverse:2", "reverse must be written as reverse"),
        ("reverse:", "reverse must be written as reverse"),
        ("permute:", "permute must be written as permute (the published key) or permute:FILE"),
        ("stride", "stride must be written as stride:STEP"),
        ("stride:0", "whole STEP ≥ 1 (published: 1024)"),
        ("stride:1_024", "stride must be written as"),
        ("stride:1e3", "stride must be written as"),
        ("window_shuffle:-1", "window_shuffle must be written as window_shuffle:BYTES"),
        ("keep", "keep must be written as keep:FRACTION, with 0 < FRACTION ≤ 1"),
        ("keep:0", "keep must be written as"),
        ("keep:1.01", "keep must be written as"),
        ("keep:nan", "keep must be written as"),
        ("keep:half", "keep must be written as"),
        ("head", "head must be written as head:BYTES read from the start, with whole BYTES ≥ 1, like head:4096"),
        ("head:0", "head must be written as"),
        ("head:4k", "head must be written as"),
        ("noise:5", "noise must be written as noise:LOWEST:HIGHEST"),
        ("noise:5:-5", "-255 ≤ LOWEST ≤ HIGHEST ≤ 255"),
        ("noise:0:256", "noise must be written as"),
        ("noise:-0.5:0.5", "noise must be written as"),
        ("noise:1:2:3", "noise must be written as"),
        ("flip:0", "flip must be written as flip:SHARE of the bytes, with 0 < SHARE ≤ 1"),
        ("flip", "flip must be written as"),
        ("truncate:0", "truncate must be written as truncate:FRACTION that is left"),
        ("skip:0", "skip must be written as skip:BYTES at the start, with whole BYTES ≥ 1"),
    ],
)
def test_wrong_spellings_are_answered_with_the_right_ones(text, message):
    with pytest.raises(UserError) as error:
        parse_transform(text)
    assert f"byte transform {text!r}" in str(error.value)
    assert message in str(error.value)


def test_all_problems_of_a_list_are_reported_at_once():
    with pytest.raises(UserError) as error:
        parse_transforms(["reverse", "keep:2", "permut", "noise:0:1"])
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "byte transform 'keep",
        "byte transform 'permut'",
    ]

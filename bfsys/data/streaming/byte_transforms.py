"""Transforms of a file's bytes: orders, privacy masks, noise and keys of the paper (arXiv 2306.00238); damage.

The published order is shuffle → keep → noise → permute (each of reverse … window_shuffle is a shuffle). A list in
another order is applied as written. As in the paper, transforms are applied in training and in evaluation. An
evaluation repeats exactly if the caller's generator does.

Fixed choices are the published ones: `torch.randperm` with the seed of the released code gives the key of `permute` and
the positions that `keep` keeps. Rejected alternative: NumPy's generator, with which models trained by one code could
not read the bytes of the other.

A permutation of byte values is not encryption: it hides a file from a viewer, not from a program that counts bytes
(docs/privacy.md).
"""

import functools
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bfsys.errors import UserError, code_of, collecting, did_you_mean
from bfsys.files import open_input

RELEASED_SEED = 2147483647  # seed of every fixed permutation in the released code

BYTE_VALUES = 256
LARGEST_NOISE = 255  # larger values wrap around
KEY_NUMBERS_PER_LINE = 16
LONGEST_KEY_BYTES = 1 << 16  # a key has about 1 kB; the limit is for files such as /dev/zero

# Number of file lengths whose kept positions stay in memory: about a megabyte each at 224 × 224 pixels
MASKS_KEPT = 32


@dataclass(frozen=True)
class ByteTransform:
    """A byte transform. Two transforms of the same text are equal. Its `repr` does not contain the key."""

    text: str
    option: Any = field(repr=False, compare=False)
    """What follows the name in the text, parsed; of `permute`, the key."""

    @property
    def name(self) -> str:
        return _name(self.text)

    @property
    def first_bytes(self) -> int | None:
        """Number of bytes at the start of a file that it reads; None: all bytes."""
        return self.option if self.name == "head" else None

    @property
    def keeps_places(self) -> bool:
        """Whether each output byte depends only on the input byte at the same position."""
        return self.name in ("head", "truncate", "noise", "permute", "flip")

    @property
    def identity(self) -> str:
        """A description of the transform, independent of the path of its key file. It does not reveal the key."""
        if self.name != "permute":
            return self.text
        return f"permute by the key of sha256 {hashlib.sha256(self.option.data).hexdigest()[:16]}"

    def apply(self, data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 [n] → a new uint8 [m]"""
        return TRANSFORMS[self.name].apply(self.option, data, rng)

    def lengths(self, lengths: np.ndarray) -> np.ndarray:
        """Lengths after the transform: int64 [files] → int64 [files]."""
        after = TRANSFORMS[self.name].lengths
        return after(self.option, lengths) if after else lengths


def apply(transforms: Sequence[ByteTransform], data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply the transforms in the order of the list.

    data   uint8 [n], which is not changed
    rng    generator for the transforms that draw from it

    Returns a new, contiguous uint8 [m]; `lengths_after` gives m.
    """
    assert (data.dtype, data.ndim) == (np.uint8, 1)
    result = data if transforms else data.copy()
    for transform in transforms:
        result = transform.apply(result, rng)
    return result


def lengths_after(transforms: Sequence[ByteTransform], lengths: np.ndarray) -> np.ndarray:
    """int64 [files]: the lengths in bytes after the transforms, of files of these lengths (int64 [files])."""
    lengths = lengths.astype(np.int64)
    for transform in transforms:
        lengths = transform.lengths(lengths)
    return lengths


def _reverse(_: None, data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return data[::-1].copy()


def _random_shuffle(_: None, data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw another order for every file and epoch, so that only the byte counts are left."""
    result = data.copy()
    rng.shuffle(result)  # rng.permutation raises on an empty read-only array
    return result


def _cyclic_half_length(_: None, data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.roll(data, len(data) // 2)


def _stride(step: int, data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """data[0::step], data[1::step], … concatenated."""
    step = max(1, min(step, len(data)))
    rows, rest = divmod(len(data), step)
    grid = data[: rows * step].reshape(rows, step)
    # The first `rest` columns are one longer. Two transposes are faster than `step` slices.
    longer = np.vstack([grid[:, :rest], data[rows * step :]])
    return np.concatenate([longer.T.ravel(), grid[:, rest:].T.ravel()])


def _window_shuffle(window: int, data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One permutation for every full window; the bytes after the last full one stay.

    The released code draws a new permutation for every batch, also in evaluation. The order within a window is then
    noise that cannot be learned. This code uses what is probably meant: a fixed permutation per window size.
    """
    result = data.copy()
    full = len(data) // window * window
    if full:
        result[:full] = data[:full].reshape(-1, window)[:, _window_order(window)].ravel()
    return result


def _keep(fraction: float, data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return data[_kept_positions(fraction, len(data))]


def _kept_lengths(fraction: float, lengths: np.ndarray) -> np.ndarray:
    """int(fraction · length), as published, but at least 1 unless the length is 0."""
    return np.minimum(lengths, np.maximum(1, (fraction * lengths).astype(np.int64)))


def _noise(bounds: tuple[int, int], data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = rng.integers(*bounds, len(data), dtype=np.int16, endpoint=True)
    return ((data + noise) % BYTE_VALUES).astype(np.uint8)


def _permute(key: np.ndarray, data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return key[data]


def _flip(share: float, data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change each byte to another value with this probability."""
    hit = np.flatnonzero(rng.random(len(data)) < share)
    result = data.copy()
    result[hit] += rng.integers(1, BYTE_VALUES, len(hit), dtype=np.uint8)
    return result


def _truncate(fraction: float, data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return data[: int(_kept_lengths(fraction, np.array(len(data))))].copy()


def _head(count: int, data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return data[:count].copy()


def _skip(count: int, data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return data[len(data) - int(_lengths_after_skip(count, np.array(len(data)))) :].copy()


def _lengths_after_skip(count: int, lengths: np.ndarray) -> np.ndarray:
    return np.minimum(lengths, np.maximum(1, lengths - count))


def _fixed_permutation(n: int) -> np.ndarray:
    """int64 [n]: a permutation of 0 … n - 1. It is always the same."""
    import torch  # slow to import; its generator gives the published permutations

    return torch.randperm(n, generator=torch.Generator().manual_seed(RELEASED_SEED)).numpy()


_window_order = functools.lru_cache(maxsize=4)(_fixed_permutation)


@functools.lru_cache(maxsize=MASKS_KEPT)
def _kept_positions(fraction: float, length: int) -> np.ndarray:
    """int64 [kept], ascending: the same positions in every file of this length.

    The released code takes the positions of a batch from its first file, and fails if another file has another length.
    If all lengths are equal, the result is the same.
    """
    kept = int(_kept_lengths(fraction, np.array(length)))
    return np.sort(_fixed_permutation(length)[:kept])


def _nothing(option: str) -> None:
    if option:
        raise ValueError


def _size(option: str) -> int:
    if (size := _integer(option)) < 1:
        raise ValueError
    return size


def _share(option: str) -> float:
    if not 0 < (share := float(option)) <= 1:
        raise ValueError
    return share


def _bounds(option: str) -> tuple[int, int]:
    lowest, _, highest = option.partition(":")
    bounds = _integer(lowest), _integer(highest)
    if not -LARGEST_NOISE <= bounds[0] <= bounds[1] <= LARGEST_NOISE:
        raise ValueError
    return bounds


def _key(option: str) -> np.ndarray:
    return read_key(Path(option)) if option else _fixed_permutation(BYTE_VALUES).astype(np.uint8)


def _integer(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,15}", text):  # int() also accepts 1_000 and whitespace
        raise ValueError
    return int(text)


class Row(NamedTuple):
    spelling: str
    parse: Callable[[str], Any]  # the text after the colon → the option; ValueError: wrong syntax
    apply: Callable[..., np.ndarray]  # of (option, uint8 [n], generator) → a new uint8 [m]
    lengths: Callable[..., np.ndarray] | None = None  # of (option, int64 [files]) → int64 [files]; None: unchanged


TRANSFORMS = {
    "reverse": Row("reverse", _nothing, _reverse),
    "random_shuffle": Row("random_shuffle", _nothing, _random_shuffle),
    "cyclic_half_length": Row("cyclic_half_length", _nothing, _cyclic_half_length),
    "stride": Row("stride:STEP, with a whole STEP ≥ 1 (published: 1024)", _size, _stride),
    "window_shuffle": Row("window_shuffle:BYTES, with whole BYTES ≥ 1 (published: 1024)", _size, _window_shuffle),
    "keep": Row("keep:FRACTION, with 0 < FRACTION ≤ 1, like keep:0.1", _share, _keep, _kept_lengths),
    "head": Row("head:BYTES read from the start, with whole BYTES ≥ 1, like head:4096", _size, _head, np.minimum),
    "noise": Row(
        f"noise:LOWEST:HIGHEST, whole numbers with -{LARGEST_NOISE} ≤ LOWEST ≤ HIGHEST ≤ {LARGEST_NOISE}, "
        "like noise:-5:5",
        _bounds,
        _noise,
    ),
    "flip": Row("flip:SHARE of the bytes, with 0 < SHARE ≤ 1, like flip:0.01", _share, _flip),
    "truncate": Row(
        "truncate:FRACTION that is left, with 0 < FRACTION ≤ 1, like truncate:0.5", _share, _truncate, _kept_lengths
    ),
    "skip": Row("skip:BYTES at the start, with whole BYTES ≥ 1, like skip:64", _size, _skip, _lengths_after_skip),
    "permute": Row("permute (the published key) or permute:FILE (a key file)", _key, _permute),
}


def parse_transform(text: str) -> ByteTransform:
    """Parse a transform such as `reverse`, `stride:1024`, `keep:0.1`, `noise:-5:5` or `permute`.

    `permute:FILE` reads the key file now. Raises UserError for wrong syntax or a wrong file.
    """
    name, colon, option = text.partition(":")
    if name not in TRANSFORMS:
        hint = did_you_mean(name.lower(), TRANSFORMS)
        allowed = ", ".join(row.spelling.split(",")[0] for row in TRANSFORMS.values())
        raise UserError(f"byte transform {text!r}: there is no {name!r}{hint}; allowed are {allowed}")
    row = TRANSFORMS[name]
    try:
        if colon and not option:
            raise ValueError
        return ByteTransform(text, row.parse(option))
    except ValueError:
        raise UserError(f"byte transform {text!r}: {name} must be written as {row.spelling}") from None
    except UserError as error:
        raise UserError(*(f"byte transform {text!r}: {problem}" for problem in error.problems)) from None


def parse_transforms(texts: Sequence[str]) -> tuple[ByteTransform, ...]:
    """Parse several transforms with `parse_transform`. Raises one UserError with all problems."""
    problems: list[str] = []
    transforms = []
    for text in texts:
        with collecting(problems):
            transforms.append(parse_transform(text))
    if problems:
        raise UserError(*problems)
    return tuple(transforms)


def with_key(texts: Sequence[str], key_file: str | Path | None) -> tuple[str, ...]:
    """The transforms of a run, with the key of `permute` read from another file, if one is given. Raises UserError if
    the run's own key file is needed and cannot be found."""
    if key_file is None:
        for text in texts:
            path = text.partition(":")[2]
            if _name(text) == "permute" and path and not os.path.exists(path):
                raise UserError(
                    f"byte transform {text!r}: key file {path} cannot be found; if it has another path "
                    "on this machine, give that with --permute (permute=… in Python)"
                )
        return tuple(texts)
    if not any(_name(text) == "permute" for text in texts):
        raise UserError(f"--permute {key_file}: this run does not permute byte values; leave the option out")
    return tuple(f"permute:{key_file}" if _name(text) == "permute" else text for text in texts)


def _name(text: str) -> str:
    return text.partition(":")[0]


def read_key(path: Path) -> np.ndarray:
    """uint8 [256]: byte value → its replacement. Raises UserError for a wrong file; the message does not contain the
    key."""
    try:
        with open_input(path) as file:
            words = file.read(LONGEST_KEY_BYTES).decode("ascii").split()
    except OSError as error:
        raise UserError(f"key file {path} cannot be read: {error.strerror}", exit_code=code_of(error)) from None
    except UnicodeDecodeError:
        words = ["not text"]
    wanted = f"a key is the numbers 0 … {BYTE_VALUES - 1}, each once, in any order, separated by spaces or line breaks"
    if not all(word.isdecimal() for word in words):
        raise UserError(f"key file {path} holds something other than numbers; {wanted}")
    if len(words) != BYTE_VALUES:
        raise UserError(f"key file {path} has {len(words)} numbers; {wanted}")
    # Lengths first, since int() raises on words of thousands of digits
    if any(len(word) > 9 for word in words) or sorted(map(int, words)) != list(range(BYTE_VALUES)):
        raise UserError(f"key file {path} has a number twice or above {BYTE_VALUES - 1}; {wanted}")
    return np.array(words, dtype=np.int64).astype(np.uint8)


def write_key(path: Path) -> None:
    """Write a random key file that only its owner can read. Raises UserError if the file exists."""
    key = list(range(BYTE_VALUES))
    secrets.SystemRandom().shuffle(key)
    lines = (key[i : i + KEY_NUMBERS_PER_LINE] for i in range(0, BYTE_VALUES, KEY_NUMBERS_PER_LINE))
    text = "".join(" ".join(map(str, line)) + "\n" for line in lines)
    try:
        with open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            try:
                file.write(text)
                file.flush()
            except BaseException:
                path.unlink()  # an incomplete key file would never be overwritten
                raise
    except FileExistsError:
        raise UserError(
            f"key file {path} exists and is not overwritten: files made with it could never be read again"
        ) from None
    except OSError as error:
        raise UserError(f"key file {path} cannot be written: {error.strerror}") from None

"""Training files that are decoded, augmented and encoded again, as published (arXiv 2306.00238).

A picture is cropped, mirrored, changed by RandAugment and partly erased. A sound may change speed, gets background
noise, is rolled, and is mixed with a second one. The result is encoded, so the model sees only file bytes.

All randomness comes from the caller's generator: equal generators give equal bytes, in any process and in any order of
files. Torchvision's transforms draw from PyTorch's global generator. They get a seed drawn from the caller's generator,
and the global state is restored. Threads of one process share that state, so augment in processes. Rejected
alternative: other transforms, because results could not be compared with the published ones.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bfsys.config import Augment
from bfsys.data.media.encodings import ENCODINGS, Encoding, parse_encoding, resample, set_length
from bfsys.data.media.modalities import EXTENSIONS
from bfsys.data.media.pictures import decode_image
from bfsys.data.media.sounds import Clip, decode_audio
from bfsys.errors import UserError, code_of
from bfsys.files import is_file, read_regular

# Values of the released code, for pictures and sounds
CROP_SCALE = (0.08, 1.0)  # range of the share of the picture's area
CROP_RATIO = (3 / 4, 4 / 3)  # width : height
FLIP_SHARE = 0.5
RAND_AUGMENT_OPERATIONS, RAND_AUGMENT_MAGNITUDE, RAND_AUGMENT_BINS = 2, 9, 31
ERASED_SHARE = 0.25  # share of the pictures
ROLL_S = 0.1
BACKGROUND_GAIN = 10 ** (-50 / 20)  # -50 dB

RECORDINGS_KEPT = 10  # recordings in memory per process; a minute at 16 kHz is 4 MB
RECORDING_S = 1200.0  # only the beginning of a longer recording is used

# Speeds are multiples of 1 / SPEED_STEPS, since resampling by a ratio of large numbers needs gigabytes
SPEED_STEPS = 100
SLOWEST, FASTEST = 0.5, 2.0


class Augmentation:
    """The augmentation of a source's training files. Can be pickled and forked."""

    def __init__(self, options: Augment) -> None:
        """Raises UserError for options that are not possible."""
        encoding = parse_encoding(options.encoding)
        _check(encoding, options)
        self.encoding, self.options = encoding, options
        self.mixes = encoding.modality == "audio" and options.mixup
        """Whether a second file is needed."""
        self._transform_picture = _picture_transforms(options.image_size) if encoding.modality == "image" else None
        background = options.background
        self._recordings = _Recordings(Path(background), options.sample_rate_hz) if background else None
        self.background = self._recordings.fingerprint if self._recordings else None
        """A fingerprint of a folder of recordings, independent of its path."""
        self.least_bytes = self._encoded_bytes()
        """Length of an encoded black picture or silence; that of every file, unless the encoding `compresses`."""
        self.compresses = encoding.compresses

    def __call__(self, data: bytes, rng: np.random.Generator, second: bytes | None = None) -> tuple[bytes, float]:
        """The bytes of the augmented file, and the share (0 … 1) of the second file's class; 0 without a second.

        Raises the decoder's error for a damaged file, and UserError for a background that cannot be read.
        """
        assert second is None or self.mixes
        if self._transform_picture:
            return self.encoding.file_of(_picture(data, self._transform_picture, rng)), 0.0
        clip, share = self._clip(data, rng), 0.0
        if second is not None:
            # As published, the share is uniform, and waves are mixed before they are encoded
            other, share = self._clip(second, rng), rng.random()
            clip = Clip((1 - share) * clip.wave + share * other.wave, clip.rate_hz)
        return self.encoding.file_of(clip), share

    def _encoded_bytes(self) -> int:
        """The length of an encoded black picture or silence. It also tests the encoder when a run starts."""
        options = self.options
        try:
            if self._transform_picture:
                return len(self.encoding.file_of(np.zeros((options.image_size, options.image_size, 3), np.uint8)))
            silence = np.zeros(round(options.seconds * options.sample_rate_hz), np.float32)
            return len(self.encoding.file_of(Clip(silence, options.sample_rate_hz)))
        except Exception as error:  # encoders raise any exception
            raise UserError(f"augmentation with encoding {self.encoding.text!r} cannot be made: {error}") from None

    def fails_on(self, data: bytes) -> bool:
        """Whether this file cannot be augmented even without a second file."""
        try:
            self(data, np.random.default_rng(0))
        except MemoryError:
            raise
        except Exception:  # decoders raise any exception
            return True
        return False

    def _clip(self, data: bytes, rng: np.random.Generator) -> Clip:
        options, speeds = self.options, self.options.speeds
        clip = resample(decode_audio(data, options.seconds * max(speeds, default=1.0)), options.sample_rate_hz)
        if speeds:
            clip = change_speed(clip, speeds[rng.integers(len(speeds))])
        clip = set_length(clip, options.seconds)
        wave = clip.wave
        if self._recordings:
            wave = wave + BACKGROUND_GAIN * self._recordings.crop(len(wave), rng)
        farthest = round(ROLL_S * clip.rate_hz)
        return Clip(np.roll(wave, rng.integers(-farthest, farthest, endpoint=True)), clip.rate_hz)


def _picture(data: bytes, transform: Callable, rng: np.random.Generator) -> np.ndarray:
    """The transformed picture: uint8 [image_size, image_size, 3]. The state of PyTorch's global generator, from which
    the transform draws, is restored."""
    import torch
    from PIL import Image

    pixels, seed = decode_image(data), int(rng.integers(2**63))
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which also seeds the GPUs' generators; these are not restored
        torch.default_generator.manual_seed(seed)
        return np.asarray(transform(Image.fromarray(pixels)))


def _check(encoding: Encoding, options: Augment) -> None:
    """Raise one UserError with all impossible options."""
    problems = []
    if encoding.modality is None:
        problems.append(
            f"augmentation with encoding {encoding.text!r}: an augmented file differs from the stored one and must "
            f"be encoded; choose one of {', '.join(ENCODINGS)}"
        )
    if encoding.modality == "image" and (options.background or options.speeds):
        problems.append(
            f"augmentation with encoding {encoding.text!r}: background and speeds are for sounds; leave them out"
        )
    for speed in options.speeds:
        if not (SLOWEST <= speed <= FASTEST and abs(speed * SPEED_STEPS - round(speed * SPEED_STEPS)) < 1e-6):
            problems.append(
                f"augmentation with speed {speed}: allowed are {SLOWEST} … {FASTEST} in steps of {1 / SPEED_STEPS}"
            )
    if round(options.seconds * options.sample_rate_hz) < 1:
        problems.append(
            f"augmentation: {options.seconds} s at {options.sample_rate_hz} Hz is less than one sample of sound"
        )
    if problems:
        raise UserError(*problems)


def change_speed(clip: Clip, factor: float) -> Clip:
    """Play faster (factor > 1) or slower: the clip's length is divided by the factor, its pitch multiplied.

    The clip is treated as recorded at `factor` times its rate, and resampled to its rate.
    """
    steps = round(factor * SPEED_STEPS)
    if steps == SPEED_STEPS:
        return clip
    return Clip(resample(Clip(clip.wave, steps), SPEED_STEPS).wave, clip.rate_hz)


def _picture_transforms(size: int) -> Callable:
    """A function from a PIL image to a PIL image of size × size. Draws from PyTorch's global generator."""
    try:
        from torchvision.transforms import InterpolationMode, v2
    # A torchvision of another release than PyTorch's raises RuntimeError
    except (ImportError, RuntimeError) as error:
        raise UserError(
            "augmentation of pictures needs the torchvision release for the installed torch "
            f"({error}): pip install -e '.[train]'"
        ) from None

    # On PIL images, as published; on tensors, bicubic and bilinear results differ.
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, CROP_SCALE, CROP_RATIO, InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(FLIP_SHARE),
            v2.RandAugment(
                RAND_AUGMENT_OPERATIONS, RAND_AUGMENT_MAGNITUDE, RAND_AUGMENT_BINS, InterpolationMode.BILINEAR
            ),
            v2.RandomErasing(ERASED_SHARE, value=0),
        ]
    )


def _files_below(folder: Path) -> Iterator[Path]:
    """The regular files below a folder. Raises UserError if a part cannot be listed; `Path.rglob` would skip it."""

    def fail(error: OSError) -> None:
        text = f"augmentation with background {folder}: {error.filename}: {error.strerror}"
        raise UserError(text, exit_code=code_of(error))

    for root, _, names in os.walk(folder, onerror=fail):
        yield from (path for path in (Path(root, name) for name in names) if is_file(path))


class _Recordings:
    """The sounds below a folder, each decoded when it is first drawn; a few stay in memory.

    A file that cannot be decoded is replaced by the next one in sorted order. So a draw depends only on the folder and
    the generator, not on the recordings in memory.
    """

    def __init__(self, folder: Path, rate_hz: int) -> None:
        extensions = {f".{extension}" for extension in EXTENSIONS["audio"]}
        self._folder, self._rate_hz = folder, rate_hz
        self._files = sorted(path for path in _files_below(folder) if path.suffix.lower() in extensions)
        self._waves: OrderedDict[int, np.ndarray] = OrderedDict()  # the most recently used is last
        if not self._files:
            raise UserError(
                f"augmentation with background {folder}: there is no sound below this folder; "
                f"looked for {', '.join(sorted(extensions))}"
            )
        names_and_sizes = [(str(path.relative_to(folder)), path.stat().st_size) for path in self._files]
        self.fingerprint = hashlib.sha256(repr(names_and_sizes).encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_waves": OrderedDict()}  # each process decodes the recordings that it draws

    def crop(self, samples: int, rng: np.random.Generator) -> np.ndarray:
        """float32 [samples] from a random place in a random recording; a recording that is too short is repeated."""
        wave = self._wave_from(int(rng.integers(len(self._files))))
        if len(wave) < samples:
            wave = np.resize(wave, samples)
        start = rng.integers(len(wave) - samples, endpoint=True)
        return wave[start : start + samples]

    def _wave_from(self, number: int) -> np.ndarray:
        """float32 [n]: recording `number`, or the first after it that can be decoded."""
        for _ in self._files:
            wave = self._wave(number)
            if len(wave):
                return wave
            number = (number + 1) % len(self._files)
        raise UserError(
            f"augmentation with background {self._folder}: none of the {len(self._files)} files below this folder can "
            "be decoded"
        )

    def _wave(self, number: int) -> np.ndarray:
        """float32 [n]; n is 0 if the file cannot be decoded."""
        if number not in self._waves:
            if len(self._waves) >= RECORDINGS_KEPT:
                self._waves.popitem(last=False)
            self._waves[number] = self._decode(self._files[number])
        self._waves.move_to_end(number)
        return self._waves[number]

    def _decode(self, path: Path) -> np.ndarray:
        try:
            data = read_regular(path)
        except OSError as error:  # not skipped: another process may read it, and the draws would differ
            text = f"augmentation with background {path}: cannot be read: {error.strerror}"
            raise UserError(text, exit_code=code_of(error)) from None
        try:
            return resample(decode_audio(data, RECORDING_S), self._rate_hz).wave
        except MemoryError:
            raise
        except Exception:  # decoders raise any exception on a damaged file
            return np.zeros(0, np.float32)

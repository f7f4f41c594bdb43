"""Get the published datasets: Speech Commands V2 in twelve classes, and ImageNet.

All files are counted, and their sizes are checked. Hashes of names decide which files the twelve classes hold, so the
result is the same on every machine. In each split, _unknown_ has a tenth as many files from the other 25 words as the
ten words have together, and _silence_ has the same number of one-second cuts from the noise recordings. The lists that
the paper used are not available, so its _unknown_ and _silence_ hold other files.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xxhash

from bfsys.data.media.encodings import encode_wav
from bfsys.data.media.sounds import Clip, decode_audio
from bfsys.data.packing.listing import BACKGROUND_NOISE, SourceFile, list_speech_commands
from bfsys.errors import UserError
from bfsys.files import is_dir, try_lock

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE = "_unknown_", "_silence_"
OF_EACH_PER_WORD_FILE = 0.1
SILENCE_S = 1.0
PARTS = {"train": (0.0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1.0)}
"""The part of each noise recording from which a split's silence is cut."""

SPEECH_COMMANDS = "speech_commands_v0.02"
SPEECH_COMMANDS_URL = f"http://download.tensorflow.org/data/{SPEECH_COMMANDS}.tar.gz"
SPEECH_COMMANDS_CLASSES = 35
SPEECH_COMMANDS_FILES = {"train": 84_843, "val": 9_981, "test": 11_005}
IMAGENET_CLASSES = 1000
IMAGENET_FILES = {"train": 1_281_167, "val": 50_000}


def speech_commands(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        folder = download_speech_commands(out)
        listing = list_speech_commands(folder)
        problems = listing.problems + wrong_counts(
            Counter(file.split for file in listing.files), SPEECH_COMMANDS_FILES,
            len({file.class_name for file in listing.files}), SPEECH_COMMANDS_CLASSES,
            [file.path for file in listing.files if not os.path.getsize(file.path)],
        )  # fmt: skip
        if problems:
            raise UserError(*(f"{folder}: {problem}" for problem in problems), f"remove {folder} and run this again")
        divide(listing.files, folder / BACKGROUND_NOISE, out)
        print(f"next: bfsys pack {out / 'twelve'} data/shards --name speech_commands")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock the folder against other processes that fetch into it. A folder that is read-only can only be checked."""
    if not os.access(out, os.W_OK):
        yield
        return
    with open(out / ".lock", "ab") as lock:
        if not try_lock(lock):
            raise UserError(f"{out}: another process is fetching into this folder; wait until it has ended")
        for unfinished in out.glob("*.partial"):  # a download of a process that was killed
            unfinished.unlink()
        yield


def download_speech_commands(out: Path) -> Path:
    """Download and extract the archive, unless it exists already. Returns its folder."""
    from torchaudio.datasets import SPEECHCOMMANDS

    folder = out / "SpeechCommands" / SPEECH_COMMANDS
    if not is_dir(folder):
        print(f"downloading {SPEECH_COMMANDS_URL}, or unpacking the copy in {out}", flush=True)
    try:
        SPEECHCOMMANDS(out, url=SPEECH_COMMANDS, download=True)
    except (OSError, RuntimeError, tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{SPEECH_COMMANDS_URL}: could not be downloaded ({error}); get it by other means, put it into {out}, "
            f"remove {folder} if it is there, and run this again"
        ) from None
    return folder


def wrong_counts(
    files: Counter, expected_files: dict[str, int], classes: int, expected_classes: int, empty: Sequence[str]
) -> list[str]:
    """The problems of a dataset whose numbers of files or classes are wrong."""
    problems = [] if classes == expected_classes else [f"has {classes:,} classes, not {expected_classes:,}"]
    problems += [
        f"has {files[split]:,} files for {split}, not {expected:,}"
        for split, expected in expected_files.items()
        if files[split] != expected
    ]
    return problems + [f"{path} is empty" for path in empty]


def divide(files: Sequence[SourceFile], noise: Path, out: Path) -> None:
    """Make out/twelve and out/background, each under a temporary name until it is complete."""
    twelve, background = out / "twelve", out / "background"
    if is_dir(twelve) and is_dir(background):
        print(f"{twelve}, {background}: exist already")
        return
    clips = {path.stem: decode_audio(path.read_bytes()) for path in sorted(noise.glob("*.wav"))}
    if not clips:
        raise UserError(f"{noise}: has no recordings of noise, from which {SILENCE} is made")
    part = out / ".twelve.part"
    shutil.rmtree(part, ignore_errors=True)
    for split in PARTS:
        words = [file for file in files if file.split == split and file.class_name in WORDS]
        others = [file for file in files if file.split == split and file.class_name not in WORDS]
        of_each = round(OF_EACH_PER_WORD_FILE * len(words))
        for file in words:
            link(file, part / split / file.class_name / Path(file.path).name)
        for file in sorted(others, key=lambda file: hash_of(file.key))[:of_each]:
            link(file, part / split / UNKNOWN / f"{file.class_name}-{Path(file.path).name}")
        write_silence(clips, split, of_each, part / split / SILENCE)
    write_background(clips, part / "background")
    for made, target in ((part / "background", background), (part, twelve)):
        shutil.rmtree(target, ignore_errors=True)
        os.replace(made, target)
    print(f"{twelve}: {', '.join(WORDS)}, {UNKNOWN}, {SILENCE}; {background}: noise for training")


def link(file: SourceFile, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file.path, target)
    except OSError:  # some file systems have no hard links
        shutil.copyfile(file.path, target)


def write_silence(clips: dict[str, Clip], split: str, count: int, folder: Path) -> None:
    """Write clips of one second from the split's parts of the recordings. Recordings are drawn in proportion to their
    length."""
    folder.mkdir(parents=True)
    names = list(clips)
    weights = np.array([len(clips[name].wave) for name in names], np.float64)
    for number in range(count):
        rng = np.random.default_rng(hash_of(f"{split}/{number}"))
        name = names[rng.choice(len(names), p=weights / weights.sum())]
        wave, rate_hz = clips[name]
        first, last = (round(part * len(wave)) for part in PARTS[split])
        samples = min(round(SILENCE_S * rate_hz), last - first)
        start = rng.integers(first, last - samples, endpoint=True)
        content = encode_wav("int16", Clip(wave[start : start + samples], rate_hz))
        (folder / f"{name}-{number:05}.wav").write_bytes(content)


def write_background(clips: dict[str, Clip], folder: Path) -> None:
    """Write the parts of the recordings that are not used for silence in val and test."""
    folder.mkdir(parents=True)
    for name, (wave, rate_hz) in clips.items():
        of_training = wave[: round(PARTS["train"][1] * len(wave))]
        (folder / f"{name}.wav").write_bytes(encode_wav("int16", Clip(of_training, rate_hz)))


def hash_of(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def imagenet(folder: Path) -> None:
    if not all(is_dir(folder / split) for split in IMAGENET_FILES):
        unpack_imagenet(folder)
    files: Counter = Counter()
    classes, empty = set(), []
    for split in IMAGENET_FILES:
        for entry in os.scandir(folder / split):
            if entry.is_dir() and not entry.name.startswith("."):
                classes.add(entry.name)
                for file in os.scandir(entry.path):
                    files[split] += 1
                    if not file.stat().st_size:
                        empty.append(file.path)
    problems = wrong_counts(files, IMAGENET_FILES, len(classes), IMAGENET_CLASSES, empty)
    if problems:
        unpack_again = f"{folder}: if unpacking was cut short, remove train/ or val/ there, and run this again"
        raise UserError(*(f"{folder}: {problem}" for problem in problems), unpack_again)
    print(f"{folder}: {IMAGENET_CLASSES:,} classes, " + ", ".join(f"{n:,} for {s}" for s, n in IMAGENET_FILES.items()))
    print(f"next: bfsys pack {shlex.quote(str(folder))} data/shards --name imagenet --from imagefolder")


def unpack_imagenet(folder: Path) -> None:
    from torchvision.datasets import ImageNet

    if not is_dir(folder):
        raise UserError(f"{folder}: there is no such folder; make it, and put the archives of ILSVRC2012 into it")
    print(f"verifying and unpacking the archives in {folder}; 150 GB, some hours", flush=True)
    for split in IMAGENET_FILES:
        try:
            ImageNet(folder, split)
        except ImportError as error:
            raise UserError(f"unpacking ImageNet needs {error.name}: pip install {error.name}") from None
        except (RuntimeError, tarfile.TarError, EOFError, OSError) as error:
            raise UserError(f"{folder}: {error}; if unpacking was cut short, remove {split}/ and run again") from None

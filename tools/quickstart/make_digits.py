"""Make the quickstart's data: 20 classes of small files, pictures of digits and spoken digits.

    python tools/quickstart/make_digits.py OUT

writes OUT/{train,val}/{image,speech}/CLASS/NUMBER.{tif,png,wav}: `seen_0` to `seen_9` are the 1,797
handwritten digits that come with scikit-learn, as uncompressed TIFF and as stored PNG; `heard_0` to
`heard_9` are the words "zero" to "nine" spoken by espeak-ng in some hundred voices, as 5 kHz, 8-bit WAV.
`manifest.csv` gives the source of each file, and `complete.json` the settings with which the tree was made.

Decisions:
- The files are made from two pip packages, in seconds. Rejected alternative: a download of MNIST and Speech
  Commands (gigabytes, mirrors that move, and hours on a CPU for a first try).
- Only the content of a file reveals its class. All files of an encoding have the same length and header, and
  numbers in file names are a permutation over all classes. Every clip has noise from its beginning to its end
  and the word at a random place and loudness, so the amount of silence reveals little.
- Validation files have other sources than training files: other handwritten images, each once per encoding
  and unchanged, and other voices. scikit-learn does not name the writer of an image, so a writer may be in
  both splits.
- PNG files are stored and unfiltered, so they are written here. Rejected alternative: Pillow, which chooses a
  filter for each row (mostly Paeth). That is a harder task: an MLP on the bytes is then right for 87 % of the
  files instead of 99 %.
- The tree is made beside OUT and renamed when it is complete, so a killed run leaves no incomplete OUT.
"""

import argparse
import csv
import glob
import importlib
import importlib.metadata
import io
import json
import os
import shutil
import socket
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from bfsys.start import let_signals_end_the_process

    let_signals_end_the_process()

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from bfsys.errors import UserError, run_command
from tools.quickstart.spoken_digits import make_utterances

RECIPE = 1  # increase it if the same settings make different files, so that older trees are not reused

IMAGE_SIDE_PX = 16
SOURCE_GREYS = 17
VAL_SHARE_OF_IMAGES = 0.2
ENCODING_SUFFIX = {"tiff": ".tif", "png": ".png", "wav": ".wav"}
MANIFEST_COLUMNS = (
    "path", "split", "class", "bytes", "encoding", "source_image", "image_version", "accent", "variant",
    "rate_wpm", "pitch",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    seed: int
    speech_per_class: int
    val_speech_per_class: int
    image_versions: int


@dataclass(frozen=True)
class Picture:
    """One image file to be made: a source image, and the number of its version (0 is unchanged)."""

    split: str
    digit: int
    encoding: str
    source_image: int
    image_version: int


# ---- Images ----------------------------------------------------------------------------------------------


def plan_pictures(labels: np.ndarray, image_versions: int, rng: np.random.Generator) -> list[Picture]:
    pictures = []
    for digit in range(10):
        sources = rng.permutation(np.flatnonzero(labels == digit)).tolist()
        n_val = round(VAL_SHARE_OF_IMAGES * len(sources))
        for place, source in enumerate(sources):
            split, versions = ("val", 1) if place < n_val else ("train", image_versions)
            pictures += [
                Picture(split, digit, encoding, source, version)
                for encoding in ("tiff", "png")
                for version in range(versions)
            ]
    return pictures


def draw_picture(image: np.ndarray, version: int, rng: np.random.Generator) -> np.ndarray:
    """Scale an 8×8 image of 0…16 up to bytes, smoothly. Versions from 1 on are shifted and rotated a little."""
    from scipy import ndimage  # slow to import, and only installed with scikit-learn

    turn_rad, scale, contrast = 0.0, 1.0, 1.0
    shift_px = np.zeros(2)  # in source pixels
    if version > 0:
        turn_rad, scale, contrast = rng.normal(0, 0.12), rng.uniform(0.9, 1.1), rng.uniform(0.75, 1.0)
        shift_px = rng.uniform(-0.7, 0.7, size=2)
    cos, sin = np.cos(turn_rad), np.sin(turn_rad)
    step = image.shape[0] / IMAGE_SIDE_PX / scale  # source pixels per pixel
    matrix = step * np.array([[cos, -sin], [sin, cos]])
    centre, source_centre = (IMAGE_SIDE_PX - 1) / 2, (image.shape[0] - 1) / 2
    offset = source_centre + shift_px - matrix @ np.full(2, centre)
    # Bilinear and mirrored: no ringing, no hard edges where a stroke touches the border.
    large = ndimage.affine_transform(
        image, matrix, offset, output_shape=(IMAGE_SIDE_PX, IMAGE_SIDE_PX), order=1, mode="nearest"
    )
    # Use as many greys as the source has. For a byte model, 256 greys are 256 unrelated symbols, and with few images it
    # would spend most of its time on learning that 200 is like 201.
    greys = np.clip(np.rint(large * contrast), 0, SOURCE_GREYS - 1)
    return (greys * (255 // (SOURCE_GREYS - 1))).astype(np.uint8)  # [side, side]


def encode_tiff(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "TIFF", compression=None)
    return buffer.getvalue()


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode as 8-bit greyscale PNG, stored, with filter "none" in each row."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    height, width = pixels.shape
    rows = np.pad(pixels, ((0, 0), (1, 0))).tobytes()  # each row begins with its filter, 0
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, level=0)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def make_pictures(
    image_versions: int, plan_rng: np.random.Generator, draw_rng: np.random.Generator
) -> tuple[Counter, Iterator[tuple[Picture, bytes]]]:
    """Return the number of images of each split, and an iterator over the images and their bytes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = plan_pictures(digits.target, image_versions, plan_rng)
    encode = {"tiff": encode_tiff, "png": encode_png}

    def encoded() -> Iterator[tuple[Picture, bytes]]:
        for picture in pictures:
            pixels = draw_picture(digits.images[picture.source_image], picture.image_version, draw_rng)
            yield picture, encode[picture.encoding](pixels)

    return Counter(picture.split for picture in pictures), encoded()


# ---- The tree --------------------------------------------------------------------------------------------


def check_packages() -> None:
    problems = []
    for module, package in (("sklearn.datasets", "scikit-learn"), ("espeakng_loader", "espeakng-loader")):
        try:
            importlib.import_module(module)
        except ImportError as error:
            problems.append(f"package {package} is missing or broken ({error}): pip install -e '.[digits]'")
    if problems:
        raise UserError(*problems)


def write_files(
    folder: Path, modality: str, class_stem: str, seed: int, make: Callable, progress: Progress
) -> list[dict]:
    """Write the files of one modality. Returns their rows of the manifest."""
    # Planning, drawing and each modality have separate generators, so settings of one do not change the others.
    seeds = np.random.SeedSequence([seed, *modality.encode()]).spawn(3)
    plan_rng, draw_rng, number_rng = (np.random.default_rng(s) for s in seeds)
    n_files, encoded = make(plan_rng, draw_rng)
    task = progress.add_task(modality, total=n_files.total())
    numbers = {split: iter(number_rng.permutation(n).tolist()) for split, n in sorted(n_files.items())}
    for split in numbers:
        for digit in range(10):
            (folder / split / modality / f"{class_stem}_{digit}").mkdir(parents=True)
    rows = []
    for source, content in encoded:
        class_name = f"{class_stem}_{source.digit}"
        name = f"{next(numbers[source.split]):06d}{ENCODING_SUFFIX[source.encoding]}"
        path = f"{source.split}/{modality}/{class_name}/{name}"
        (folder / path).write_bytes(content)
        rows.append({"path": path, "class": class_name, "bytes": len(content), **asdict(source)})
        progress.advance(task)
    return rows


def write_tree(folder: Path, settings: Settings, progress: Progress) -> list[dict]:
    """Write all files and the manifest. Returns the manifest's rows."""
    clips_per_class = {"train": settings.speech_per_class, "val": settings.val_speech_per_class}
    pictures = partial(make_pictures, settings.image_versions)
    utterances = partial(make_utterances, clips_per_class)
    rows = write_files(folder, "image", "seen", settings.seed, pictures, progress)
    rows += write_files(folder, "speech", "heard", settings.seed, utterances, progress)
    rows.sort(key=lambda row: row["path"])
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, MANIFEST_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def describe(settings: Settings, rows: list[dict]) -> dict:
    """The content of `complete.json`: settings, the versions that the bytes depend on, counts and bytes."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        part = counts.setdefault(f"{row['split']} {row['encoding']}", {"files": 0, "bytes": 0})
        part["files"] += 1
        part["bytes"] += row["bytes"]
    packages = ("espeakng-loader", "numpy", "pillow", "scikit-learn", "scipy")
    return {
        "recipe": RECIPE,
        "settings": asdict(settings),
        "packages": {package: importlib.metadata.version(package) for package in packages},
        "files": len(rows),
        "bytes": sum(part["bytes"] for part in counts.values()),
        "parts": dict(sorted(counts.items())),
    }


def find_earlier(out: Path, settings: Settings) -> dict | None:
    """Return the description of OUT if it was made with these settings. Raises an error if OUT has other content."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    advice = "give another OUT, or remove this one"
    try:
        earlier = json.loads((out / "complete.json").read_text())
        earlier_settings = {**earlier["settings"], "recipe": earlier["recipe"]}
        n_expected = earlier["files"]
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{out} exists and is no complete result of make_digits.py: {advice}") from None
    for name, wanted in {**asdict(settings), "recipe": RECIPE}.items():
        if earlier_settings.get(name) != wanted:
            got = earlier_settings.get(name)
            raise UserError(f"{out} was made with {name} {got}, now {wanted} is asked for: {advice}")
    n_files = sum(len(files) for split in ("train", "val") for _, _, files in os.walk(out / split))
    if n_files != n_expected:
        raise UserError(f"{out} had {n_expected} files when it was made and has {n_files} now: {advice}")
    return earlier


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only checks that it exists
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # a process of another user
    return True


def remove_remains(parent: Path, prefix: str) -> None:
    """Remove the unfinished folders of earlier runs on this host that were killed."""
    for remains in parent.glob(f"{glob.escape(prefix)}*"):
        pid = remains.name.removeprefix(prefix)
        if pid.isdecimal() and not is_running(int(pid)):
            shutil.rmtree(remains, ignore_errors=True)


def make_tree(out: Path, settings: Settings, progress: Progress) -> dict:
    """Make the tree beside OUT and rename it when it is complete, so that OUT is never incomplete."""
    prefix = f".{out.name}.making-{socket.gethostname()}-"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_remains(out.parent, prefix)
        making = out.parent / f"{prefix}{os.getpid()}"
        making.mkdir()
    except OSError as error:
        raise UserError(f"cannot write beside {out}: {error}") from None
    try:
        rows = write_tree(making, settings, progress)
        description = describe(settings, rows)
        (making / "complete.json").write_text(json.dumps(description, indent=2) + "\n")
        making.rename(out)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return description


def at_least(minimum: int):
    def number(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"got {text}, must be {minimum} or more")
        return int(text)

    return number


def parse_arguments() -> tuple[Path, Settings]:
    parser = argparse.ArgumentParser(
        description="Make the quickstart's data: handwritten digits as images, spoken digits as sound.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--speech-per-class", type=at_least(1), default=2000, help="training clips per word")
    parser.add_argument("--val-speech-per-class", type=at_least(1), default=100, help="validation clips")
    parser.add_argument(
        "--image-versions", type=at_least(1), default=4,
        help="training files per image and encoding; the first is the unchanged image, the others are varied",
    )  # fmt: skip
    arguments = vars(parser.parse_args())
    return Path(os.path.abspath(arguments.pop("out"))), Settings(**arguments)


def print_summary(description: dict) -> None:
    parts = {**description["parts"], "in all": description}
    for name, part in parts.items():
        print(f"  {name:10} {part['files']:7,} files {part['bytes']:12,} bytes")


def main() -> None:
    started_s = time.monotonic()
    out, settings = parse_arguments()
    description = find_earlier(out, settings)
    if description:
        print(f"already there: {out}")
    else:
        check_packages()
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal) as progress:
            description = make_tree(out, settings, progress)
        print(f"made {out}, 20 classes, in {time.monotonic() - started_s:.1f} s")
    print_summary(description)


if __name__ == "__main__":
    run_command(main, output_is_optional=True)

"""Survey a folder of files: classes, splits, lengths, and whether all files are pictures or all are sounds.

Kinds and sizes are read from the headers of some files, evenly spread over the folder. This is enough to know typical
values; packing reads every file later.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import xxhash

from bfsys.data.media.input_formats import LONGEST_MAGIC, FileKind, kind_of
from bfsys.data.media.sounds import (
    UNKNOWN_FRAMES,
    announced_samples,
    decode_audio,
    open_sound,
    size_of_tags,
    without_tags,
)
from bfsys.data.packing.listing import SourceFile
from bfsys.errors import some
from bfsys.files import read_regular

LOOKED_AT = 200  # files whose headers are read
HEADER_BYTES = 1 << 16  # read from a file to determine its kind
LONGEST_DECODED_S = 60.0  # of a sound whose header does not state its length
SHARE_OF_MODALITY = 0.9  # least share of the sampled files; packing reports files that cannot be encoded
COMPRESSED_TIFF = "a compressed TIFF"
PICTURES = ("a JPEG", "a PNG", "a GIF", "a WebP", "an AVIF", "a JPEG 2000", COMPRESSED_TIFF)
COMPRESSED = (*PICTURES, "a FLAC", "an Ogg", "an MP3")
PHOTOGRAPHS = ("a JPEG", "a WebP", "an AVIF")


@dataclass(frozen=True)
class Survey:
    """The result of a survey."""

    classes: tuple[str, ...]
    files: dict[str, int]
    """Number of files of each split."""
    train_bytes: np.ndarray
    """int64 [training files]: their lengths."""
    longest: int
    """Bytes of the longest file of all splits."""
    kinds: dict[str, int]
    """The number of sampled files of each kind, such as `a JPEG`; `other` for unknown kinds."""
    modality: str | None
    """`image` or `audio` if nearly all sampled files have this modality and can be decoded; else None."""
    typical_size: float
    """Median of the shorter side in pixels, or 95th percentile of the duration in seconds; 0 without a modality."""
    rate_hz: int
    """Median sample rate of sounds; else 0."""
    partial: str = ""
    """The share of pictures (or sounds), in words, if most sampled files but not nearly all are such; else empty."""
    kinds_tell_classes: bool = False
    """Whether the kind of a file tells much about its class, for example if the classes are formats."""
    digest: str = ""
    """It differs if any file has another name, class, split, size or time of modification."""

    @property
    def is_compressed(self) -> bool:
        """Whether most sampled files are compressed pictures or sounds."""
        return sum(self.kinds.get(kind, 0) for kind in COMPRESSED) * 2 > sum(self.kinds.values())

    @property
    def is_photographs(self) -> bool:
        return sum(self.kinds.get(kind, 0) for kind in PHOTOGRAPHS) * 2 > sum(self.kinds.values())

    def describe(self) -> list[str]:
        """Return lines to print."""
        low, middle, high = np.quantile(self.train_bytes, (0.05, 0.5, 0.95))
        kinds = ", ".join(f"{100 * n / sum(self.kinds.values()):.0f} % {kind}" for kind, n in self.kinds.items())
        lines = [
            f"classes     {len(self.classes):,}: {some(self.classes, 8)}",
            "files       " + ", ".join(f"{n:,} {split}" for split, n in self.files.items()),
            f"lengths     median {middle:,.0f} bytes, 90 % of them {low:,.0f} to {high:,.0f}, longest {self.longest:,}",
            f"kinds       {kinds}",
        ]
        if self.modality == "image":
            lines.append(f"pictures    median of the shorter side: {self.typical_size:.0f} pixels")
        elif self.modality == "audio":
            lines.append(f"sounds      95 % are not longer than {self.typical_size:.2f} s; {self.rate_hz:,} Hz")
        elif self.partial:
            lines.append(
                f"note: {self.partial}, and the others are not, so no file is re-encoded; if the others are not "
                "samples, move them out of the folder"
            )
        return lines


def survey_of(files: list[SourceFile], classes: list[str]) -> Survey:
    """Survey files that have a size and a split. There must be training files."""
    splits = Counter(file.split for file in files)
    chosen = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, LOOKED_AT).astype(int))]
    kinds: Counter[str] = Counter()
    by_kind: defaultdict[str, Counter[str]] = defaultdict(Counter)
    modalities: Counter[str | None] = Counter()
    measured_of: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    for file in chosen:
        head = _beginning(file.path)
        kind = kind_of(np.frombuffer(head, np.uint8))
        if kind and kind.name == "a TIFF" and _is_compressed_tiff(file.path):
            kind = kind._replace(name=COMPRESSED_TIFF)
        kinds[kind.name if kind else "other"] += 1
        by_kind[kind.name if kind else file.extension][file.class_name] += 1
        measured = _size_of(file.path, kind, is_tagged=bool(size_of_tags(head))) if kind else None
        modalities[kind.modality if kind and measured else None] += 1
        if kind and measured:
            measured_of[kind.modality].append(measured)
    ((modality, share),) = modalities.most_common(1)
    partial = ""
    if modality and share < SHARE_OF_MODALITY * len(chosen):
        of_modality = "pictures" if modality == "image" else "sounds"
        partial = f"{100 * share / len(chosen):.0f} % of the files are {of_modality}"
        modality = None
    sizes, rates = zip(*measured_of[modality], strict=True) if modality else ((), ())
    return Survey(
        classes=tuple(classes),
        files={split: splits[split] for split in sorted(splits, key=("train", "val", "test").index)},
        train_bytes=np.array([file.size_bytes for file in files if file.split == "train"], np.int64),
        longest=max(file.size_bytes for file in files),
        kinds=dict(kinds.most_common()),
        modality=modality,
        typical_size=float(np.quantile(sizes, 0.5 if modality == "image" else 0.95)) if modality else 0.0,
        rate_hz=int(np.median(rates)) if modality == "audio" else 0,
        partial=partial,
        kinds_tell_classes=_tell_classes(list(by_kind.values())),
        digest=xxhash.xxh3_128_hexdigest(json.dumps(sorted(files)).encode()),
    )


def _tell_classes(by_kind: list[Counter[str]]) -> bool:
    """Whether the kind of a file says much about its class. This is so if a guess of the commonest class of the kind is
    wrong at most half as often as a guess of the commonest class of all files."""
    in_all: Counter[str] = sum(by_kind, Counter())
    mistakes = sum(of_kind.total() - max(of_kind.values()) for of_kind in by_kind)
    return len(in_all) > 1 and mistakes * 2 <= in_all.total() - max(in_all.values())


def _beginning(path: str) -> bytes:
    """The first bytes of a file, at least those that tell its kind: they follow an ID3 tag, which may hold pictures."""
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
        while (missing := size_of_tags(head) + LONGEST_MAGIC - len(head)) > 0 and (more := file.read(missing)):
            head += more
    return head


def _is_compressed_tiff(path: str) -> bool:
    """Whether the first page of a TIFF is compressed. A damaged file counts as uncompressed."""
    from PIL import Image

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            return image.info.get("compression", "raw") != "raw"
    except Exception:  # Pillow raises any exception on a damaged file
        return False


def _size_of(path: str, kind: FileKind, *, is_tagged: bool) -> tuple[float, int] | None:
    """(shorter side in pixels, 0) or (seconds, sample rate in Hz); None if the file's header cannot be decoded.

    A sound whose header does not state its length is decoded."""
    try:
        if kind.modality == "image":
            from PIL import Image

            with warnings.catch_warnings(action="ignore"), Image.open(path) as image:  # they do not name the file
                return float(min(image.size)), 0
        import soundfile

        with suppress(soundfile.LibsndfileError):  # libsndfile does not know a BW64 by its header
            # libmpg123 prints a warning if it opens an MP3 with tags at its end, and libsndfile misreads tagged sounds
            if kind.name == "an MP3" or is_tagged:
                data = without_tags(read_regular(path))
                opened = open_sound(data, announced_samples(data))
            else:
                opened = soundfile.SoundFile(path)
            with opened as file:
                if 0 < file.frames < UNKNOWN_FRAMES:
                    return file.frames / file.samplerate, file.samplerate
        clip = decode_audio(read_regular(path), LONGEST_DECODED_S)  # such as one that a program wrote to a pipe
        return len(clip.wave) / clip.rate_hz, clip.rate_hz
    except Exception:  # decoders raise anything
        return None

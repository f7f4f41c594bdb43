"""Small random changes to training files, each written again in its own format.

A model that sees the same few files again and again memorises them. A picture is rotated, stretched and shifted a
little. A sound becomes a little faster or slower, louder or quieter, and begins earlier or later. The file keeps its
format (data/media/same_format.py), so evaluation files stay as stored and need no separate dataset. Files that cannot
be written again in their own format stay unchanged.

Pixels are taken from their nearest neighbours. Interpolation makes values and edges that no stored file has, and a
model of compressed bytes mistakes them for a property of the training files (docs/experiments.md). JPEG is the
exception: its files become larger with nearest neighbours and keep their size with bicubic interpolation.

All randomness comes from the caller's generator, as in data/streaming/augment.py. That module holds the published
augmentation, which changes pictures and sounds far more and encodes all files alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bfsys import config
from bfsys.data.media.input_formats import kind_of
from bfsys.data.media.same_format import change_picture, change_sound
from bfsys.data.media.sounds import Clip
from bfsys.data.streaming.augment import SPEED_STEPS, change_speed
from bfsys.data.streaming.byte_transforms import ByteTransform, lengths_after

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Jitter:
    """The jitter of a source's training files."""

    options: config.Jitter
    least_bytes: int
    """A file is not changed if it would become shorter than this, after the `transforms`."""
    transforms: tuple[ByteTransform, ...] = ()

    def __call__(self, data: bytes, rng: np.random.Generator) -> bytes:
        """The bytes of the changed file, or `data` if it is not changed."""
        kind = kind_of(np.frombuffer(data, np.uint8))
        if kind is None or rng.random() >= self.options.share:
            return data
        try:
            if kind.modality == "image":
                changed = change_picture(data, lambda image: self._picture(image, rng))
            else:
                seed = int(rng.integers(2**63))  # the same for each channel
                changed = change_sound(data, lambda clip: self._sound(clip, np.random.default_rng(seed)))
        except MemoryError:
            raise
        except Exception:  # decoders raise any exception; the model also reads files that cannot be decoded
            return data
        length = int(lengths_after(self.transforms, np.array([len(changed)]))[0])
        return changed if length >= self.least_bytes else data

    def _picture(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        from PIL import Image

        options = self.options
        angle = np.deg2rad(rng.uniform(-options.rotation_degrees, options.rotation_degrees))
        scale = rng.uniform(1 - options.zoom, 1 + options.zoom, 2)
        moved = np.rint(rng.uniform(-options.shift, options.shift, 2) * image.size)
        mirrored = -1 if options.mirror and rng.random() < 0.5 else 1
        turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        # Maps positions in the changed picture to positions in the stored picture, around the middle
        matrix = turned @ np.diag(1 / scale) @ np.diag([mirrored, 1])
        middle = np.array(image.size) / 2
        offset = middle - matrix @ (middle + moved)
        coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
        by = Image.Resampling.BICUBIC if image.format == "JPEG" else Image.Resampling.NEAREST
        # Areas outside the stored picture get the colour of its first pixel
        corner = image.getpixel((0, 0))
        return image.transform(image.size, Image.Transform.AFFINE, coefficients, by, fillcolor=corner)

    def _sound(self, clip: Clip, rng: np.random.Generator) -> Clip:
        options = self.options
        faster = round(rng.uniform(1 - options.speed, 1 + options.speed) * SPEED_STEPS) / SPEED_STEPS
        wave = change_speed(clip, faster).wave
        start, end = np.rint(rng.uniform(-options.shift, options.shift, 2) * len(wave)).astype(int).tolist()
        wave = np.pad(wave, (max(0, -start), max(0, end)))[max(0, start) : min(0, end) or None]
        return Clip(wave * np.float32(10 ** (rng.uniform(-options.gain_db, options.gain_db) / 20)), clip.rate_hz)

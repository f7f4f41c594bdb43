"""An out-of-distribution score: how unlike a run's files a file is, from its bytes alone and without the model.

The distance between two files is the share of their first 16 bytes that differ, plus 1 minus the Bhattacharyya
coefficient of their byte counts. It is 0 for equal headers and counts, and 2 for files with nothing in common. The
score of a file is its distance to the nearest reference file of the run, divided by the distance within which 98 % of
the reference files have another reference file. A file with a score above 1 is unusual.

Rejected alternative: scores from the model (energy of the logits, largest probability, distances between features).
They missed most of the random bytes, texts and programs that this score finds; docs/explain.md has the figures.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bfsys.errors import UserError, counted

FILES = 128  # reference files of a run
FEWEST = 20  # with fewer reference files, no usual distance can be estimated
HEADER_BYTES = 16
USUAL_SHARE = 0.98
LEAST_USUAL = 0.02  # lower limit of the usual distance, which is 0 if all files are equal
PAST_THE_END = -1


@dataclass(frozen=True)
class ReferenceFiles:
    """A description of files of the run, as the model reads them."""

    headers: np.ndarray  # int16 [files, HEADER_BYTES]; PAST_THE_END after the end of a file
    roots: np.ndarray  # uint8 [files, 256]: square roots of the shares of the byte values, 255 for 1
    usual: float
    """USUAL_SHARE of the reference files have at most this distance to their nearest other reference file."""
    training_files: int | None
    """How many of the files are training files; the others are evaluation files. None in checkpoints of earlier
    versions, which do not record it."""

    def describe(self) -> str:
        """Their number and kind, such as `18 evaluation files and 110 training files`."""
        if self.training_files is None:
            return counted(len(self.headers), "file")
        counts = {"evaluation": len(self.headers) - self.training_files, "training": self.training_files}
        return " and ".join(f"{counted(count, f'{kind} file')}" for kind, count in counts.items() if count)

    def score(self, data: np.ndarray) -> float:
        """The score of a file, uint8 [n], as the model reads it. Above 1, the file resembles no reference file."""
        return float(_distances(*_descriptors([data]), self.headers, self.roots).min()) / self.usual

    def to_tree(self) -> dict:
        """The description as a tree, for a checkpoint's manifest and `model.json`."""
        packed = zlib.compress(self.headers.astype("<i2").tobytes() + self.roots.tobytes(), 9)
        return {
            "files": len(self.headers),
            "training_files": self.training_files,
            "usual": self.usual,
            "descriptors": base64.b64encode(packed).decode(),
        }


def text_of(score: float) -> str:
    """A score for messages, rounded up, so that one above 1 is never shown as 1.00."""
    return f"{math.ceil(100 * score) / 100:.2f}"


def reference_files(evaluation: Iterable[np.ndarray], training: Iterable[np.ndarray] = ()) -> ReferenceFiles | None:
    """Describe files, uint8 [n] each, none of them empty. Returns None for fewer than FEWEST files."""
    described = [_descriptors(contents) for contents in (evaluation, training)]
    headers, roots = (np.concatenate(both) for both in zip(*described, strict=True))
    if len(headers) < FEWEST:
        return None
    distances = _distances(headers, roots, headers, roots)
    np.fill_diagonal(distances, np.inf)
    usual = float(np.quantile(distances.min(1), USUAL_SHARE))
    return ReferenceFiles(headers, roots, max(usual, LEAST_USUAL), training_files=len(described[1][0]))


def from_tree(tree: dict | None) -> ReferenceFiles | None:
    """The inverse of `to_tree`. None gives None, as in checkpoints of earlier versions and imported weights. Raises
    UserError for a damaged tree."""
    if tree is None:
        return None
    try:
        files, usual, training_files = int(tree["files"]), float(tree["usual"]), tree.get("training_files")
        split, size = files * HEADER_BYTES * 2, files * (HEADER_BYTES * 2 + 256)
        # The limit prevents a malicious checkpoint from using all memory.
        content = zlib.decompressobj().decompress(base64.b64decode(tree["descriptors"]), size + 1)
        if files < 1 or len(content) != size or not usual > 0 or not 0 <= (training_files or 0) <= files:
            raise ValueError
    except (KeyError, TypeError, ValueError, zlib.error):
        raise UserError("reference_files: damaged in the checkpoint or model.json; export the run again") from None
    headers = np.frombuffer(content[:split], "<i2").reshape(-1, HEADER_BYTES)
    return ReferenceFiles(headers, np.frombuffer(content[split:], np.uint8).reshape(-1, 256), usual, training_files)


def _descriptors(contents: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The `headers` and `roots` of a ReferenceFiles for these files."""
    headers, roots = [], []
    for data in contents:
        header = np.full(HEADER_BYTES, PAST_THE_END, np.int16)
        header[: len(data)] = data[:HEADER_BYTES]
        headers.append(header)
        roots.append(np.rint(255 * np.sqrt(np.bincount(data, minlength=256) / len(data))).astype(np.uint8))
    return np.array(headers, np.int16).reshape(-1, HEADER_BYTES), np.array(roots, np.uint8).reshape(-1, 256)


def _distances(headers: np.ndarray, roots: np.ndarray, to_headers: np.ndarray, to_roots: np.ndarray) -> np.ndarray:
    """float64 [n, m]: the distance from each of n files to each of m files."""
    differ = (headers[:, None] != to_headers[None]).mean(2)
    return differ + 1 - _unit(roots) @ _unit(to_roots).T


def _unit(roots: np.ndarray) -> np.ndarray:
    """float64 [n, 256], normalised to length 1, since the stored roots are rounded."""
    lengths = np.linalg.norm(roots.astype(np.float64), axis=1, keepdims=True)
    return roots / lengths

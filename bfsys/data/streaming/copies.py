"""Notes on byte-identical files: evaluated files that are also training files, and training files of several classes.

The index has a checksum of 64 bits for each file, so files with equal checksums are identical, and no file is read. The
search sorts all checksums. For very large datasets and for remote ones there is no search.
"""

from __future__ import annotations

import os
from contextlib import suppress

import numpy as np
import xxhash

from bfsys.data.storage.shards import Split
from bfsys.data.streaming.datasets import Sources
from bfsys.errors import UserError

MOST_FILES = 5_000_000  # the search takes 0.5 s if none are copies, and 8 s if half of them are
NOTHING = np.uint64(xxhash.xxh3_64_intdigest(b""))  # empty files are never read


def notes_on_copies(training: Sources, validation: Sources, evaluated: str) -> list[str]:
    """Notes for the data of a run that evaluates the split `evaluated`, one line each."""
    trained = {_key(split, split.split) for split in training.splits}
    parts = _local_parts(training, validation, evaluated)
    sizes = [len(split) for split, _ in parts.values()]
    if not 0 < sum(sizes) <= MOST_FILES:
        return []
    checksums = np.concatenate([split.samples["checksum"] for split, _ in parts.values()])
    ordered = np.sort(checksums)
    repeated = np.setdiff1d(ordered[1:][ordered[1:] == ordered[:-1]], NOTHING)
    if not len(repeated):
        return []
    # From here on, arrays have a row for each file that has a copy.
    content = np.searchsorted(repeated, checksums).clip(max=len(repeated) - 1)
    is_copy = repeated[content] == checksums
    labels = np.concatenate([of_part.take(split.samples["label"], mode="clip") for split, of_part in parts.values()])
    part = np.repeat(range(len(parts)), sizes)[is_copy]
    content, labels, is_trained = content[is_copy], labels[is_copy], np.array([key in trained for key in parts])[part]

    is_content_trained = np.bincount(content[is_trained], minlength=len(repeated)) > 0
    seen = np.bincount(part[~is_trained & is_content_trained[content]], minlength=len(parts)).tolist()
    notes = [
        f"{split.dataset.shown}: {count:,} of {size:,} files in {split.split} are byte-identical to training files, "
        "so their score says nothing about new files"
        for (split, _), count, size in zip(parts.values(), seen, sizes, strict=True)
        if count
    ]
    content, labels = content[is_trained], labels[is_trained]
    labelled = np.unique(content * len(training.classes) + labels) // len(training.classes)  # content of each class
    ambiguous = np.count_nonzero(np.bincount(labelled, minlength=len(repeated))[content] > 1)
    if ambiguous:
        notes.append(f"{ambiguous:,} training files are byte-identical to training files of another class")
    return notes


def _key(split: Split, name: str) -> tuple[str, str]:
    """The identity of a split called `name` in the dataset of `split`, whose folder may have several paths."""
    return os.path.realpath(split.dataset.location), name


def _local_parts(
    training: Sources, validation: Sources, evaluated: str
) -> dict[tuple[str, str], tuple[Split, np.ndarray]]:
    """The splits of local datasets that are compared, by location and name, with their label maps.

    Separate evaluation data often hold the same files in another encoding. So the split `evaluated` of the training
    data is compared too.
    """
    parts = {}
    for sources in (training, validation):
        for source in sources.opened:
            split, labels = source.split, source.label_map
            if split.dataset.cache is None:
                parts[_key(split, split.split)] = split, labels
                if evaluated in split.dataset.splits:
                    with suppress(UserError):  # of an index that the run does not need
                        parts[_key(split, evaluated)] = split.dataset.open(evaluated), labels
    return parts

"""Names of splits, and the division of a class's files into train and val.

Case is ignored in a name, and its usual synonyms and endings such as "set" are recognised: Train, TRAINING, test_set.

The files of a class are ranked by a hash of their keys, and those whose hash is below `val_share` of the range go to
val. If that would leave train or val without a file of the class, the file that is next in rank goes there. Each class
of two or more files is therefore in train and in val, and a class of one file is in train. An added file moves no old
file to the other split, except in small classes the one that was next in rank. Files of one key (a.jpg and a.png) stay
together unless the class has no other key. The division does not depend on the encoding: files that an encoding does
not take are left out afterwards.

Rejected alternative: a random draw, which moves old files to the other split as soon as a file is added.
"""

import re
from collections.abc import Iterable, Sequence

import xxhash

SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "devel", "development"), "val"),
    **dict.fromkeys(("eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}


def split_of_name(name: str) -> str | None:
    """The split (train, val or test) that a name means, if any. The name is a folder, a column of a list or a part of a
    tar's name."""
    return SPLIT_FOLDERS.get(re.sub(r"[\s_-]*(set|data|images|split)?$", "", name.strip().casefold()))


def seem_to_be_splits(names: Iterable[str]) -> list[str]:
    """The names of splits with numbers, such as train2017 and val2017; none unless train and another are there."""
    splits = {name: split for name in names if (split := split_of_name(re.sub(r"[\W\d_]+", "", name)))}
    return list(splits) if {"train"} < set(splits.values()) else []


def files_for_val(keys: Sequence[str], val_share: float) -> list[int]:
    """The positions of the files that go to val. `keys` are those of all files of one class."""
    if len(keys) < 2 or val_share == 0:
        return []
    hashes = [xxhash.xxh3_64_intdigest(key.encode()) for key in keys]
    ranked = sorted(range(len(keys)), key=lambda i: (hashes[i], keys[i]))
    borders = [n for n in range(1, len(keys)) if keys[ranked[n - 1]] != keys[ranked[n]]] or [1]
    below = sum(value < val_share * 2**64 for value in hashes)
    return ranked[: min(max(below, borders[0]), borders[-1])]

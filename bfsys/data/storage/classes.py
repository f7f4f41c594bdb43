"""Names of classes: their stored form, names that are too similar, and notes about classes without files.

Names are stored in Unicode normal form C, because a Mac and Linux may store one name in two forms that look the same.
Blanks around them, which nobody sees, are not stored.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from bfsys.errors import some

# Joiners of letters, and signs that a symbol is shown as an emoji or as text. Some keyboards add them, others do not.
INVISIBLE = re.compile("[\u200c\u200d\ufe0e\ufe0f]")


@dataclass
class Spelling:
    """The places where a spelling of a class was found, and the splits in which it has files."""

    places: list[str] = field(default_factory=list)
    splits: set[str] = field(default_factory=set)


def stored_name(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


def _shown(name: str) -> str:
    return INVISIBLE.sub("", stored_name(name))


def too_alike(spellings: Mapping[str, Spelling]) -> list[str]:
    """A problem for each set of names that differ only in case, in whitespace or in their Unicode form, with joiners
    and styles of emoji."""
    groups = defaultdict(list)
    for name in spellings:
        groups[stored_name(" ".join(_shown(name).lower().split()))].append(name)
    return [_describe({name: spellings[name] for name in sorted(group)}) for group in groups.values() if len(group) > 1]


def _describe(group: Mapping[str, Spelling]) -> str:
    forms = {_shown(name) for name in group}
    names = {name: f"{name!r}" if len(forms) == len(group) else f"{name!r} (written {name!a})" for name in group}
    found = " and ".join(f"{names[name]} in {some(spelling.places)}" for name, spelling in group.items())
    every = set().union(*(spelling.splits for spelling in group.values()))
    lacks = [
        f"{names[name]} has no files in {', '.join(sorted(every - spelling.splits))}"
        for name, spelling in group.items()
        if every - spelling.splits
    ]
    difference = "case or spaces" if len(forms) == len(group) else "their Unicode form"
    return (
        f"two classes differ only in {difference}: {found}{'; ' if lacks else ''}{', '.join(lacks)}; "
        "spell the name in one way if it is one class, and rename one of them otherwise"
    )


def notes_on_classes(training_files: Mapping[str, int] | None, classes: int) -> list[str]:
    """Notes on the number of classes and on their numbers of training files (None without a training split)."""
    notes = ["one class: there is nothing to learn"] if classes == 1 else []
    lost = sorted(name for name, count in (training_files or {}).items() if not count)
    if lost:
        subject = "1 class is" if len(lost) == 1 else f"{len(lost):,} classes are"
        notes.append(f"{subject} without training files and cannot be learned: {some(lost)}")
    return notes

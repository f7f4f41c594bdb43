"""List the files to be packed, from folder trees or lists, and name the samples. Then checks.py divides the files.

All problems of the input are found here, before anything is written. They are returned and not raised, so that one run
reports all of them. `problems` concern the input as a whole. Single `bad` files may be left out on request. Files whose
name or place shows that they are not samples (hidden files, those of the operating system, files next to the class
folders) are `left_out`, and are also named.
"""

import os
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bfsys.data.packing.folders import visible_files
from bfsys.data.packing.left_out import LeftOut, is_of_system, why_left_out
from bfsys.data.packing.splits import SPLIT_FOLDERS, seem_to_be_splits, split_of_name
from bfsys.data.storage.classes import Spelling, stored_name
from bfsys.data.storage.tars import NOT_PAYLOAD
from bfsys.errors import counted, is_printable, some
from bfsys.files import decoded, is_dir, is_file, open_input, read_up_to

UNDIVIDED = ""  # the split of a file until `check_files` divides them into train and val
SPEECH_COMMANDS_LISTS = {"validation_list.txt": "val", "testing_list.txt": "test"}
BACKGROUND_NOISE = "_background_noise_"
OUTSIDE = re.compile(r"^/*(\.\./)*")  # the part of a path that leaves the list's folder
SKIPPED_BY_WEBDATASET = re.compile(r"__.*__")
MOST_LIST_BYTES = 2**30  # some ten million lines
SHOWN_LINES = 20  # unusable lines of a list that an error shows
BYTE_ORDER_MARK = "\ufeff"


class SourceFile(NamedTuple):
    path: str  # absolute
    class_name: str
    split: str
    key: str  # key of the sample, without a dot
    extension: str  # lower case, without a dot
    size_bytes: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0  # unlike mtime_ns, programs cannot set it


class BadFile(NamedTuple):
    path: str
    reason: str


@dataclass
class Listing:
    classes: list[str] = field(default_factory=list)
    files: list[SourceFile] = field(default_factory=list)
    bad: list[BadFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    spellings: dict[str, Spelling] = field(default_factory=lambda: defaultdict(Spelling))  # as found
    divided: bool = False  # whether `check_files` divided the files into train and val


def sample_name(class_name: str, inner_path: str) -> tuple[str, str]:
    """Key and extension of a file of a class; `inner_path` is its path inside the class folder.

    WebDataset ends a key at the first dot and reads no key with a line break in it. What follows the last dot is no
    extension without a letter: app.log.1 and app.log.2 are two samples, and not two formats of one.
    """
    folder, slash, base = inner_path.rpartition("/")
    stem, dot, extension = base.rpartition(".")
    if not dot or not stem or not any(map(str.isalpha, extension)):
        stem, extension = base, ""
    extension = printable(extension.lower())
    key = printable(f"{class_name}/{folder}{slash}{stem}").replace(".", "_")
    return key, "bin" if extension in ("", *NOT_PAYLOAD) else extension


def printable(text: str) -> str:
    """The text, with characters that cannot be printed replaced by _."""
    return "".join(c if is_printable(c) else "_" for c in text)


def list_tree(src: Path, subdir: str, split: str | None, *, split_folders: bool) -> Listing:
    """List SRC/<split>/[subdir/]<class>/… or SRC/[subdir/]<class>/…; with `split_folders` only the former."""
    listing, top = Listing(), Listing()
    visible = _folders(src, src, "next to the split folders", top)
    splits = {name: of_folder for name in visible if (of_folder := split_of_name(name))}
    others = [name for name in visible if name not in splits]
    if not splits and split_folders:
        listing.problems.append(f"{src}: has no split folders; --from imagefolder needs train, val, … in it")
    elif not splits:
        _list_classes(listing, src, src / subdir, split or UNDIVIDED)
        listing.divided = not split
    elif split:
        listing.problems.append(f"{src}: has split folders ({', '.join(splits)}); drop --split {split}")
    elif others and not split_folders:
        listing.problems.append(
            f"{src}: holds split folders ({', '.join(splits)}) and others ({some(others)}). To leave the others out, "
            f"use --from imagefolder; if {next(iter(splits))} is a class, use --from filelist"
        )
    elif len(set(splits.values())) < len(splits):
        listing.problems.append(
            f"{src}: {' and '.join(splits)}: two folders for one split; keep one, or use --from filelist if they are "
            "classes"
        )
    else:
        listing.problems += top.problems
        listing.left_out += [*top.left_out, *(LeftOut(name, "next to the split folders") for name in others)]
        for name, of_folder in splits.items():
            _list_classes(listing, src, src / name / subdir, of_folder)
    listing.classes = sorted(set(listing.classes))
    if named := seem_to_be_splits(listing.classes):
        listing.problems.append(
            f"{src}: the class folders {some(named)} seem to be splits; name the folders of splits train, val or test, "
            "and put the class folders directly into them. If they are classes, use --from filelist"
        )
    return listing


def list_speech_commands(src: Path) -> Listing:
    """List the extracted Speech Commands archive: a folder per word, and two lists of the files of val and test."""
    listing = Listing()
    listed: dict[str, str] = {}
    for name, split in SPEECH_COMMANDS_LISTS.items():
        try:
            listed |= dict.fromkeys((line.strip() for line in _lines_of(src / name) if line.strip()), split)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            listing.problems.append(f"{src / name}: cannot be read ({reason}); it belongs to Speech Commands")
    _list_classes(listing, src, src, "train", known=(BACKGROUND_NOISE, *SPEECH_COMMANDS_LISTS))
    names = [os.path.relpath(file.path, os.path.abspath(src)) for file in listing.files]
    listing.problems += [f"{src}: {name} is listed, but the file is missing" for name in sorted(listed.keys() - names)]
    pairs = zip(listing.files, names, strict=True)
    listing.files = [file._replace(split=listed.get(name, "train")) for file, name in pairs]
    return listing


def list_filelist(src: Path, split: str | None) -> Listing:
    """Read lines of `path<TAB>class` or `path<TAB>class<TAB>split`; paths are relative to the list's folder, or to the
    current one if the list comes from a pipe."""
    listing = Listing()
    folder = src.parent if is_file(src) and not src.is_relative_to("/dev") else Path()
    try:
        lines = _lines_of(src)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        remedy = "a list is a text file in UTF-8, and an archive must be unpacked into a folder"
        listing.problems.append(f"{src}: the list cannot be read ({reason}); {remedy}")
        return listing
    columns, wrong_lines = 0, []
    lines_of: dict[str, dict[str, int]] = defaultdict(dict)  # the first line of a path in each split
    for number, line in enumerate(lines, start=1):
        parts = line.split("\t")
        if parts == [""]:
            continue
        if wrong := _wrong_line(parts, columns, split):
            wrong_lines.append(f"{src}, line {number}: {wrong}")
            continue
        columns = len(parts)
        if any(map(is_of_system, parts[0].split("/"))):
            listing.left_out.append(LeftOut(parts[0], "of the operating system"))
            continue
        to_split = split_of_name(parts[2]) if len(parts) == 3 else split or UNDIVIDED
        assert to_split is not None, "_wrong_line has checked it"
        file = _listed_file(folder, parts[0], parts[1], to_split)
        _note_spelling(listing, parts[1], f"line {number}", to_split)
        splits = lines_of[file.path]
        if wrong := _wrong_again(parts[0], to_split, splits):
            wrong_lines.append(f"{src}, line {number}: {wrong}")
            continue
        splits[to_split] = number
        listing.files.append(file)
    listing.problems += wrong_lines[:SHOWN_LINES]
    if more := wrong_lines[SHOWN_LINES:]:
        listing.problems.append(f"{src}: {len(more):,} more lines cannot be used")
    if not listing.files and not listing.problems:
        listing.problems.append(f"{src}: the list is empty; it needs lines of path<TAB>class[<TAB>split]")
    listing.classes = sorted({file.class_name for file in listing.files})
    listing.divided = columns == 2 and not split
    return listing


def _listed_file(folder: Path, path: str, spelled: str, split: str) -> SourceFile:
    class_name = stored_name(spelled)
    inner_path = OUTSIDE.sub("", os.path.normpath(path)).removeprefix(f"{spelled}/")
    key, extension = sample_name(class_name, inner_path)
    return SourceFile(os.path.abspath(folder / path), class_name, split, key, extension)


def _lines_of(path: Path) -> list[str]:
    """The lines, without line ends and byte order marks. Raises OSError, and ValueError for text that is not UTF-8 or
    UTF-16."""
    with open_input(path) as file:
        content = read_up_to(file, MOST_LIST_BYTES)
    if len(content) > MOST_LIST_BYTES:
        raise ValueError(f"holds more than {MOST_LIST_BYTES:,} bytes")
    text = decoded(content)
    lines = text.split("\n" if "\n" in text else "\r")  # Excel on a Mac ends lines with \r alone
    return [line.removeprefix(BYTE_ORDER_MARK).rstrip("\r") for line in lines]


def _note_spelling(listing: Listing, spelled: str, place: str, split: str) -> None:
    spelling = listing.spellings[spelled]
    if split not in spelling.splits:
        spelling.places.append(place)
        spelling.splits.add(split)


def _wrong_line(parts: list[str], columns: int, split: str | None) -> str:
    got = f"got {counted(len(parts), 'column')}"
    if len(parts) not in (2, 3):
        return f"{got}, need path<TAB>class or path<TAB>class<TAB>split"
    if columns and len(parts) != columns:
        return f"{got}, the lines before have {columns}; give a split on every line or on none"
    if not parts[0] or not parts[1]:
        return "path or class is empty"
    if len(parts) == 3 and split:
        return f"names a split, and so does --split {split}; drop one of them"
    if len(parts) == 3 and not split_of_name(parts[2]):
        return f"split {parts[2]!r} is unknown; allowed are {', '.join(SPLIT_FOLDERS)}"
    return _wrong_class(parts[1])


def _wrong_again(path: str, split: str, lines: dict[str, int]) -> str:
    """The problem of a path that was listed before; `lines` holds its earlier line in each split."""
    if split in lines:
        return f"{path} is listed twice, first in line {lines[split]}; remove one of the lines"
    if lines and "train" in (split, *lines):
        other, line = next((name, lines[name]) for name in lines if "train" in (split, name))
        return (
            f"{path} is listed for {split}, and in line {line} for {other}; evaluation would count a file that was "
            "trained on, so remove one of the lines"
        )
    return ""


def _wrong_class(name: str) -> str:
    if not is_printable(name):
        if sys.getfilesystemencoding() != "utf-8" and any("\ud800" <= c <= "\udfff" for c in name):
            return f"class {name!r}: the locale of this shell is not UTF-8; run the command with PYTHONUTF8=1"
        return f"class {name!r} has characters that cannot be printed; rename it"
    if not name.strip():
        return f"class {name!r} has no visible characters; rename it"
    if "/" in name or SKIPPED_BY_WEBDATASET.fullmatch(name.replace(".", "_")):
        rule = "a class must not contain a /, or begin and end with __ (a dot counts as _), which WebDataset skips"
        return f"class {name!r}: {rule}"
    return ""


def _list_classes(listing: Listing, src: Path, root: Path, split: str, known: Sequence[str] = ()) -> None:
    """Add the class folders in `root` and their files, at any depth. Names in `known` are skipped silently."""
    classes = _folders(src, root, "next to the class folders", listing, known)
    if not classes and is_dir(root):
        listing.problems.append(f"{root}: has no class folders; files must lie in a folder named after their class")
    for spelled in classes:
        wrong = _wrong_class(spelled)
        if wrong:
            listing.problems.append(f"{root}: {wrong}")
            continue
        class_name, folder = stored_name(spelled), os.path.abspath(root / spelled)
        left_out: list[LeftOut] = []
        problems_before = len(listing.problems)
        paths = list(visible_files(folder, listing.problems, left_out))
        inside = os.path.relpath(root / spelled, src)
        listing.left_out += [LeftOut(f"{inside}/{os.path.relpath(path, folder)}", why) for path, why in left_out]
        for path in paths:
            key, extension = sample_name(class_name, path[len(folder) + 1 :])
            listing.files.append(SourceFile(path, class_name, split, key, extension))
        if paths:
            _note_spelling(listing, spelled, str(root / spelled), split)
        elif len(listing.problems) == problems_before:
            listing.problems.append(f"{folder}: the class folder has no files; add files, or remove the folder")
        listing.classes.append(class_name)


def _folders(src: Path, root: Path, beside: str, listing: Listing, known: Sequence[str] = ()) -> list[str]:
    """The names of the folders in `root`. Files in `root` are left out; `beside` describes them in messages."""
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        listing.problems.append(f"{root}: the folder cannot be listed ({error.strerror})")
        return []
    folders = []
    for name in names:
        path = os.path.join(root, name)
        reason = why_left_out(name) or ("" if os.path.isdir(path) else beside)
        if reason == beside and not os.path.exists(path):
            listing.problems.append(
                f"{path}: is a link whose target is missing; restore the target, or remove the link"
            )
        elif reason and name not in known:
            listing.left_out.append(LeftOut(os.path.relpath(path, src), reason))
        elif name not in known:
            folders.append(name)
    return folders

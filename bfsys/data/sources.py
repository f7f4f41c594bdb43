"""Which files are to be packed: listing folder trees and lists, naming the samples, dividing them.

Everything that can be wrong with the input is found here, before anything is written, and returned rather
than raised, so that one run names it all. Two kinds are kept apart: `problems` of the input as a whole,
and single `bad` files, which may be left out on request.

The division into train and val goes by a hash of the key. Refused: drawing at random, which moves old
files from one side to the other as soon as a file is added.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import xxhash

from bfsys.data.encodings import Encoding
from bfsys.data.modalities import MODALITIES
from bfsys.data.tars import NOT_PAYLOAD

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SPEECH_COMMANDS_LISTS = {"validation_list.txt": "val", "testing_list.txt": "test"}
BACKGROUND_NOISE = "_background_noise_"
OUTSIDE = re.compile(r"^/*(\.\./)*")  # what leads a path out of the list's folder
SKIPPED_BY_WEBDATASET = re.compile(r"__.*__")


class SourceFile(NamedTuple):
    path: str  # absolute
    class_name: str
    split: str
    key: str  # of the sample, without a dot
    extension: str  # lower case, without a dot
    size_bytes: int = 0
    mtime_ns: int = 0


class BadFile(NamedTuple):
    path: str
    reason: str


@dataclass
class Listing:
    classes: list[str] = field(default_factory=list)
    files: list[SourceFile] = field(default_factory=list)
    bad: list[BadFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    divided: bool = False  # into train and val, by the hash of the keys


def sample_name(class_name: str, inner_path: str) -> tuple[str, str]:
    """Key and extension of a file of a class; `inner_path` is its path inside the class folder.

    WebDataset ends a key at the first dot and reads no key with a line break in it.
    """
    folder, slash, base = inner_path.rpartition("/")
    stem, dot, extension = base.rpartition(".")
    if not dot or not stem:
        stem, extension = base, ""
    extension = _printable(extension.lower())
    key = _printable(f"{class_name}/{folder}{slash}{stem}").replace(".", "_")
    return key, "bin" if extension in ("", *NOT_PAYLOAD) else extension


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "_" for c in text)


def list_tree(src: Path, subdir: str, split: str | None, val_share: float, *, split_folders: bool) -> Listing:
    """SRC/<split>/[subdir/]<class>/… or SRC/[subdir/]<class>/…; with `split_folders` only the former."""
    listing = Listing()
    visible = _folders(src, listing)
    splits = [name for name in visible if name in SPLIT_FOLDERS]
    others = [name for name in visible if name not in SPLIT_FOLDERS]
    if not splits and split_folders:
        listing.problems.append(f"{src}: has no split folders; --from imagefolder needs train, val, … in it")
    elif not splits:
        _list_classes(listing, src / subdir, split, val_share)
        listing.divided = not split
        _check_division(listing, val_share)
    elif split:
        listing.problems.append(f"{src}: has split folders ({', '.join(splits)}); drop --split {split}")
    elif others and not split_folders:
        listing.problems.append(
            f"{src}: holds split folders ({', '.join(splits)}) and others ({', '.join(others[:5])}"
            f"{', …' if len(others) > 5 else ''}). If the others are not meant, say --from imagefolder; "
            f"if {splits[0]} is a class, use --from filelist"
        )
    elif len({SPLIT_FOLDERS[name] for name in splits}) < len(splits):
        listing.problems.append(f"{src}: {' and '.join(splits)}: two folders for one split; keep one")
    else:
        for name in splits:
            _list_classes(listing, src / name / subdir, SPLIT_FOLDERS[name], val_share)
    listing.classes = sorted(set(listing.classes))
    return listing


def list_speech_commands(src: Path) -> Listing:
    """The extracted Speech Commands archive: a folder per word, and two lists that decide val and test."""
    listing = Listing()
    listed: dict[str, str] = {}
    for name, split in SPEECH_COMMANDS_LISTS.items():
        try:
            listed |= dict.fromkeys((src / name).read_text(encoding="utf-8").split(), split)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            listing.problems.append(f"{src / name}: cannot be read ({reason}); it belongs to Speech Commands")
    _list_classes(listing, src, "train", 0, leave_out=BACKGROUND_NOISE)
    names = [os.path.relpath(file.path, os.path.abspath(src)) for file in listing.files]
    listing.problems += [f"{src}: {name} is listed but not there" for name in sorted(listed.keys() - names)]
    pairs = zip(listing.files, names, strict=True)
    listing.files = [file._replace(split=listed.get(name, "train")) for file, name in pairs]
    return listing


def list_filelist(src: Path, split: str | None, val_share: float) -> Listing:
    """Lines of `path<TAB>class` or `path<TAB>class<TAB>split`; paths are relative to the list's folder."""
    listing = Listing()
    try:
        lines = src.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        listing.problems.append(f"{src}: the list cannot be read ({reason}); it must be a text file in UTF-8")
        return listing
    columns = 0
    for number, line in enumerate(lines, start=1):
        parts = line.rstrip("\r").split("\t")
        if parts == [""]:
            continue
        columns = columns or len(parts)
        wrong = _wrong_line(parts, columns, split)
        if wrong:
            listing.problems.append(f"{src}, line {number}: {wrong}")
            continue
        path, class_name = parts[0], parts[1]
        inner_path = OUTSIDE.sub("", os.path.normpath(path)).removeprefix(f"{class_name}/")
        key, extension = sample_name(class_name, inner_path)
        to_split = SPLIT_FOLDERS[parts[2]] if len(parts) == 3 else split or _split_of(key, val_share)
        absolute = os.path.abspath(src.parent / path)
        listing.files.append(SourceFile(absolute, class_name, to_split, key, extension))
    if not listing.files and not listing.problems:
        listing.problems.append(f"{src}: the list is empty; it needs lines of path<TAB>class[<TAB>split]")
    listing.classes = sorted({file.class_name for file in listing.files})
    listing.divided = columns == 2 and not split
    _check_division(listing, val_share)
    return listing


def _wrong_line(parts: list[str], columns: int, split: str | None) -> str:
    got = f"got {len(parts)} column{'s' * (len(parts) > 1)}"
    if len(parts) not in (2, 3):
        return f"{got}, need path<TAB>class or path<TAB>class<TAB>split"
    if len(parts) != columns:
        return f"{got}, the lines before have {columns}; give a split on every line or on none"
    if not parts[0] or not parts[1]:
        return "path or class is empty"
    if len(parts) == 3 and split:
        return f"names a split, and so does --split {split}; drop one of them"
    if len(parts) == 3 and parts[2] not in SPLIT_FOLDERS:
        return f"split {parts[2]!r} is unknown; allowed are {', '.join(SPLIT_FOLDERS)}"
    return _wrong_class(parts[1])


def _wrong_class(name: str) -> str:
    if not name.isprintable():
        return f"class {name!r} has characters that cannot be printed; rename it"
    if "/" in name or SKIPPED_BY_WEBDATASET.fullmatch(name.replace(".", "_")):
        return f"class {name!r}: a class may not hold a / nor look like __this__ (WebDataset skips those)"
    return ""


def _list_classes(listing: Listing, root: Path, split: str | None, val_share: float, leave_out: str = "") -> None:
    """Add the class folders in `root` and their files, at any depth."""
    classes = [name for name in _folders(root, listing) if name != leave_out]
    if not classes and root.is_dir():
        listing.problems.append(f"{root}: has no class folders; files must lie in a folder named after their class")
    for class_name in classes:
        wrong = _wrong_class(class_name)
        if wrong:
            listing.problems.append(f"{root}: {wrong}")
            continue
        folder = os.path.abspath(root / class_name)
        before = len(listing.files)
        for path in visible_files(folder, listing.problems):
            key, extension = sample_name(class_name, path[len(folder) + 1 :])
            to_split = split or _split_of(key, val_share)
            listing.files.append(SourceFile(path, class_name, to_split, key, extension))
        if len(listing.files) == before:
            listing.problems.append(f"{folder}: the class folder has no files; fill it or remove it")
        listing.classes.append(class_name)


def _folders(root: Path, listing: Listing) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        listing.problems.append(f"{root}: the folder cannot be listed ({error.strerror})")
        return []


def visible_files(folder: str, problems: list[str], ancestors: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """All files below a folder, in order, without hidden ones. Links are followed, but not round in circles."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        problems.append(f"{folder}: the folder cannot be listed ({error.strerror})")
        return
    here = (status.st_dev, status.st_ino)
    if here in ancestors:
        problems.append(f"{folder}: links back to a folder that it lies in; remove the link")
        return
    for entry in visible:
        if os.path.isdir(entry.path):  # entry.is_dir() raises at a link that leads to itself
            yield from visible_files(entry.path, problems, (*ancestors, here))
        else:
            yield entry.path


def regular_files(folder: str, problems: list[str]) -> list[str]:
    """Those of the visible files that can be read to an end; what a pipe or a link to nothing is called, is said."""
    paths = list(visible_files(folder, problems))
    if not paths:
        problems.append(f"{folder}: a folder without files")
    problems += [f"{path}: is not a regular file" for path in paths if not os.path.isfile(path)]
    return [path for path in paths if os.path.isfile(path)]


def _check_division(listing: Listing, val_share: float) -> None:
    if not listing.divided or not listing.files:
        return
    wanted = {"train", "val"} if val_share else {"train"}
    listing.problems += [
        f"of {len(listing.files):,} files none fell to {split} by --val-share {val_share}; change it, "
        f"or put all into one split by --split train"
        for split in sorted(wanted - {file.split for file in listing.files})
    ]


def _split_of(key: str, val_share: float) -> str:
    return "val" if xxhash.xxh3_64_intdigest(key.encode()) < val_share * 2**64 else "train"


def check_files(listing: Listing, max_file_bytes: int | None, encoding: Encoding) -> None:
    """Sort out the bad files, add size and time to the good ones, and make the keys unique."""
    good = []
    for file in listing.files:
        try:
            status = os.stat(file.path)
        except (OSError, ValueError) as error:  # ValueError: a NUL in a path of a list
            listing.bad.append(BadFile(file.path, f"cannot be read ({getattr(error, 'strerror', error)})"))
            continue
        reason = _why_bad(file, status, max_file_bytes, encoding)
        if reason:
            listing.bad.append(BadFile(file.path, reason))
        else:
            good.append(file._replace(size_bytes=status.st_size, mtime_ns=status.st_mtime_ns))
    lost = {file.class_name for file in listing.files} - {file.class_name for file in good}
    listing.problems += [f"class {name!r}: not one of its files can be packed" for name in sorted(lost)]
    listing.files = _with_unique_keys(good, listing.problems)


def _why_bad(file: SourceFile, status: os.stat_result, max_file_bytes: int | None, encoding: Encoding) -> str:
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if not os.access(file.path, os.R_OK):
        return "cannot be read (no permission)"
    if status.st_size == 0:
        return "is empty"
    if max_file_bytes and status.st_size > max_file_bytes:
        return f"has {status.st_size:,} bytes, allowed are {max_file_bytes:,} (--max-file-bytes)"
    for name, modality in MODALITIES.items():
        if encoding.modality not in (None, name) and file.extension in modality.extensions:
            return f"is {name} by its extension, and encoding {encoding.text} takes {encoding.modality}"
    return ""


def _with_unique_keys(files: list[SourceFile], problems: list[str]) -> list[SourceFile]:
    """Files that differ in the extension alone get it appended to the key; other likeness is a problem."""
    count = Counter((file.split, file.key) for file in files)
    unique = {}
    for file in files:
        if count[file.split, file.key] > 1:
            file = file._replace(key=f"{file.key}-{_printable(file.extension).replace('.', '_')}")
        first = unique.setdefault((file.split, file.key), file)
        if first is not file:
            problems.append(f"{file.path}: has the same key {file.key!r} as {first.path}; rename one of them")
    return list(unique.values())

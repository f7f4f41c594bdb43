"""List the files to be packed, from folder trees or lists; name the samples and divide them into splits.

All problems of the input are found here, before anything is written. They are returned and not raised, so that one run
reports all of them. `problems` concern the input as a whole. Single `bad` files may be left out on request. Files whose
name or place shows that they are not samples (hidden files, those of the operating system, files beside the class
folders) are `left_out`, and are also named.
"""

import errno
import os
import re
import stat
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import xxhash

from bfsys.data.media.encodings import Encoding
from bfsys.data.media.modalities import MODALITIES
from bfsys.data.packing.left_out import LeftOut, is_of_system, left_out_note, why_left_out
from bfsys.data.packing.splits import SPLIT_FOLDERS, files_for_val, split_of_name
from bfsys.data.storage.classes import Spelling, stored_name, too_alike
from bfsys.data.storage.tars import NOT_PAYLOAD
from bfsys.errors import OUTAGE_ERRNOS, SHORTAGE_ERRNOS, UserError, counted, is_printable, one_line
from bfsys.files import decoded, read_up_to

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
    extension = _printable(extension.lower())
    key = _printable(f"{class_name}/{folder}{slash}{stem}").replace(".", "_")
    return key, "bin" if extension in ("", *NOT_PAYLOAD) else extension


def _printable(text: str) -> str:
    return "".join(c if is_printable(c) else "_" for c in text)


def list_tree(src: Path, subdir: str, split: str | None, *, split_folders: bool) -> Listing:
    """List SRC/<split>/[subdir/]<class>/… or SRC/[subdir/]<class>/…; with `split_folders` only the former."""
    listing, top = Listing(), Listing()
    visible = _folders(src, src, "beside the split folders", top)
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
            f"{src}: holds split folders ({', '.join(splits)}) and others ({', '.join(others[:5])}"
            f"{', …' if len(others) > 5 else ''}). To leave the others out, use --from imagefolder; "
            f"if {next(iter(splits))} is a class, use --from filelist"
        )
    elif len(set(splits.values())) < len(splits):
        listing.problems.append(
            f"{src}: {' and '.join(splits)}: two folders for one split; keep one, or use --from filelist if they are "
            "classes"
        )
    else:
        listing.problems += top.problems
        listing.left_out += [*top.left_out, *(LeftOut(name, "beside the split folders") for name in others)]
        for name, of_folder in splits.items():
            _list_classes(listing, src, src / name / subdir, of_folder)
    listing.classes = sorted(set(listing.classes))
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
    """Read lines of `path<TAB>class` or `path<TAB>class<TAB>split`; paths are relative to the list's folder."""
    listing = Listing()
    try:
        lines = _lines_of(src)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        listing.problems.append(f"{src}: the list cannot be read ({reason}); it must be a text file in UTF-8")
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
        file = _listed_file(src, parts[0], parts[1], to_split)
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


def _listed_file(src: Path, path: str, spelled: str, split: str) -> SourceFile:
    class_name = stored_name(spelled)
    inner_path = OUTSIDE.sub("", os.path.normpath(path)).removeprefix(f"{spelled}/")
    key, extension = sample_name(class_name, inner_path)
    return SourceFile(os.path.abspath(src.parent / path), class_name, split, key, extension)


def _lines_of(path: Path) -> list[str]:
    """The lines, without line ends and byte order marks. Raises OSError, and ValueError for text that is not UTF-8 or
    UTF-16."""
    with open(path, "rb") as file:
        content = read_up_to(file, MOST_LIST_BYTES)
    if len(content) > MOST_LIST_BYTES:
        raise ValueError(f"holds more than {MOST_LIST_BYTES:,} bytes")
    lines = decoded(content).split("\n")
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
    if "/" in name or SKIPPED_BY_WEBDATASET.fullmatch(name.replace(".", "_")):
        return f"class {name!r}: a class may not hold a / nor look like __this__ (WebDataset skips those)"
    return ""


def _list_classes(listing: Listing, src: Path, root: Path, split: str, known: Sequence[str] = ()) -> None:
    """Add the class folders in `root` and their files, at any depth. Names in `known` are skipped silently."""
    classes = _folders(src, root, "beside the class folders", listing, known)
    if not classes and root.is_dir():
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


DEEPEST = 200  # folders inside each other; the listing is recursive
NOTE_S = 10.0  # interval between notes of a long listing


def visible_files(
    folder: str, problems: list[str], left_out: list[LeftOut], ancestors: tuple[tuple[int, int], ...] = ()
) -> Iterator[str]:
    """The files below a folder, in order. Hidden files and those of the operating system go to `left_out`. Links are
    followed; a link to a folder that contains it is a problem."""
    try:
        status = os.stat(folder)
        names = sorted(os.listdir(folder))
    except OSError as error:
        problems.append(f"{folder}: the folder cannot be listed ({error.strerror})")
        return
    here = (status.st_dev, status.st_ino)
    if len(ancestors) > DEEPEST:
        problems.append(f"{folder[:200]}…: more than {DEEPEST} folders are nested; reduce the depth")
        return
    if here in ancestors:
        problems.append(f"{folder}: is a link to a folder that contains it; remove the link")
        return
    for name in names:
        path = os.path.join(folder, name)
        if reason := why_left_out(name):
            left_out.append(LeftOut(path, reason))
        elif os.path.isdir(path):
            yield from visible_files(path, problems, left_out, (*ancestors, here))
        else:
            yield path


def regular_files(folder: str, problems: list[str]) -> list[str]:
    """The visible regular files; pipes, devices and broken links are problems.

    Files that are left out are named on standard error, and so is the progress of a long listing, such as that of /.
    """
    left_out: list[LeftOut] = []
    paths: list[str] = []
    noted_s = time.monotonic()
    for path in visible_files(folder, problems, left_out):
        paths.append(path)
        if time.monotonic() - noted_s >= NOTE_S:
            noted_s = time.monotonic()
            print(one_line(f"listing {folder}: {len(paths):,} files so far, now at {path}"), file=sys.stderr)
    if left_out:
        print(f"{folder}: {left_out_note(left_out)}", file=sys.stderr)
    if not paths:
        problems.append(f"{folder}: a folder without files")
    problems += [f"{path}: is not a regular file" for path in paths if not os.path.isfile(path)]
    return [path for path in paths if os.path.isfile(path)]


def check_files(listing: Listing, max_file_bytes: int | None, encoding: Encoding, val_share: float) -> None:
    """Separate bad files, add size and time to the good ones, divide them into splits, and make the keys unique."""
    good = []
    for file in listing.files:
        try:
            status = os.stat(file.path)
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
            listing.bad.append(BadFile(file.path, why_unreadable(file.path, error)))
            continue
        reason = _why_bad(file, status, max_file_bytes, encoding)
        if reason:
            listing.bad.append(BadFile(file.path, reason))
        else:
            file = file._replace(size_bytes=status.st_size, mtime_ns=status.st_mtime_ns, ctime_ns=status.st_ctime_ns)
            good.append(file)
    lost = {file.class_name for file in listing.files} - {file.class_name for file in good}
    listing.problems += [f"class {name!r}: none of its files can be packed" for name in sorted(lost)]
    alike = too_alike(listing.spellings)
    listing.problems += alike
    if alike:  # their files would have equal keys
        return
    good = _told_apart(good, lambda file: (file.split, file.key, file.extension))
    if listing.divided:
        good = _divided(good, val_share, listing.problems)
    listing.files = _told_apart(_with_extensions(good), lambda file: (file.split, file.key))


UNREADABLE = "cannot be read"  # begins the reasons of files that may be readable later


def why_unreadable(path: str, error: OSError | ValueError) -> str:
    """The reason why a file is bad. Raises UserError if the error says nothing about the file, or if its folder cannot
    be reached: --skip-bad would leave out intact files."""
    reason = f"{UNREADABLE} ({getattr(error, 'strerror', error)})"
    is_outage = isinstance(error, OSError) and error.errno in {*OUTAGE_ERRNOS, *SHORTAGE_ERRNOS, errno.EMFILE}
    if is_outage or not os.path.isdir(os.path.dirname(path).partition("\0")[0]):
        raise UserError(f"{path}: {reason}; fix this and run the same command again; finished shards are kept")
    return reason


def _divided(files: list[SourceFile], val_share: float, problems: list[str]) -> list[SourceFile]:
    """The files, each assigned to train or val: see splits.py."""
    by_class = defaultdict(list)
    for number, file in enumerate(files):
        by_class[file.class_name].append(number)
    for_val = {
        numbers[i]
        for numbers in by_class.values()
        for i in files_for_val([files[number].key for number in numbers], val_share)
    }
    if files and val_share and not for_val:
        problems.append(
            f"none of the {len(files):,} files went to val, because no class has two files; add files. (`bfsys pack "
            "--split train` packs them without a validation split.)"
        )
    return [file._replace(split="val" if i in for_val else "train") for i, file in enumerate(files)]


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


def _told_apart(files: list[SourceFile], same: Callable[[SourceFile], tuple[str, ...]]) -> list[SourceFile]:
    """Files for which `same` is equal get hashes of their names in their keys. Examples are a.b.txt and a_b.txt, a.jpg
    and a.JPG, and names in the characters of another system."""
    alike = defaultdict(list)
    for number, file in enumerate(files):
        alike[same(file)].append(number)
    told_apart = list(files)
    for numbers in alike.values():
        if len(numbers) > 1:
            folder = os.path.commonpath([files[number].path for number in numbers])
            for number in numbers:
                name = os.fsencode(os.path.relpath(files[number].path, folder))
                key = f"{files[number].key}-{xxhash.xxh3_64_hexdigest(name)}"
                told_apart[number] = files[number]._replace(key=key)
    return told_apart


def _with_extensions(files: list[SourceFile]) -> list[SourceFile]:
    """If files differ only in the extension, it is appended to their keys."""
    count = Counter((file.split, file.key) for file in files)
    return [
        file._replace(key=f"{file.key}-{_printable(file.extension).replace('.', '_')}")
        if count[file.split, file.key] > 1
        else file
        for file in files
    ]

"""Check the listed files, divide them into train and val, and make their keys unique."""

import errno
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Callable

import xxhash

from bfsys.data.media.encodings import Encoding
from bfsys.data.media.modalities import EXTENSIONS
from bfsys.data.packing.listing import BadFile, Listing, SourceFile, printable
from bfsys.data.packing.splits import files_for_val
from bfsys.data.storage.classes import too_alike
from bfsys.errors import OUTAGE_ERRNOS, SHORTAGE_ERRNOS, UserError

UNREADABLE = "cannot be read"  # begins the reasons of files that may be readable later


def check_files(listing: Listing, max_file_bytes: int | None, encoding: Encoding, val_share: float) -> None:
    """Separate bad files, add size and time to the good ones, divide them into splits, and make the keys unique."""
    good = []
    for file in listing.files:
        try:
            status = os.stat(file.path)
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
            listing.bad.append(BadFile(file.path, why_unreadable(file.path, error)))
            continue
        reason = _why_bad(file, status, max_file_bytes)
        if reason:
            listing.bad.append(BadFile(file.path, reason))
        else:
            file = file._replace(size_bytes=status.st_size, mtime_ns=status.st_mtime_ns, ctime_ns=status.st_ctime_ns)
            good.append(file)
    unfit = {file.path: reason for file in good if (reason := _why_unfit(file, encoding))}
    listing.bad += [BadFile(path, reason) for path, reason in unfit.items()]
    fit_classes = {file.class_name for file in good if file.path not in unfit}
    lost = {file.class_name for file in listing.files} - fit_classes
    listing.problems += [f"class {name!r}: none of its files can be packed" for name in sorted(lost)]
    alike = too_alike(listing.spellings)
    listing.problems += alike
    if alike:  # their files would have equal keys
        return
    good = _told_apart(good, lambda file: (file.split, file.key, file.extension))
    if listing.divided:
        good = _divided(good, val_share, listing.problems)
    # After the division, which must not depend on the encoding: otherwise a run could train on a file in one encoding
    # and be evaluated on the same file in another
    good = [file for file in good if file.path not in unfit]
    listing.files = _told_apart(_with_extensions(good), lambda file: (file.split, file.key))


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
            "--split train` packs them without a validation split, which `bfsys fit` needs.)"
        )
    return [file._replace(split="val" if i in for_val else "train") for i, file in enumerate(files)]


def _why_bad(file: SourceFile, status: os.stat_result, max_file_bytes: int | None) -> str:
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if not os.access(file.path, os.R_OK):
        return "cannot be read (no permission)"
    if status.st_size == 0:
        return "is empty"
    if max_file_bytes and status.st_size > max_file_bytes:
        return f"has {status.st_size:,} bytes, allowed are {max_file_bytes:,} (--max-file-bytes)"
    return ""


def _why_unfit(file: SourceFile, encoding: Encoding) -> str:
    """The reason why a file cannot be written in the encoding, if its extension tells."""
    for name, extensions in EXTENSIONS.items():
        if encoding.modality not in (None, name) and file.extension in extensions:
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
        file._replace(key=f"{file.key}-{printable(file.extension).replace('.', '_')}")
        if count[file.split, file.key] > 1
        else file
        for file in files
    ]

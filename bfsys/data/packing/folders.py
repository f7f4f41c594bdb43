"""Walk through folders, in a fixed order and without hidden files."""

import os
import sys
import time
from collections.abc import Iterator

from bfsys.data.packing.left_out import LeftOut, left_out_note, why_left_out
from bfsys.errors import one_line

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
    if note := left_out_note(left_out):
        print(f"{folder}: {note}", file=sys.stderr)
    if not paths:
        problems.append(f"{folder}: a folder without files")
    problems += [f"{path}: is not a regular file" for path in paths if not os.path.isfile(path)]
    return [path for path in paths if os.path.isfile(path)]

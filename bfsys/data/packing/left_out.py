"""Files and folders whose names or places show that they are not samples: hidden ones, and those of the operating
system.

All of them are reported: `left_out_note` names them.
"""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from bfsys.errors import is_printable, some

# Files that Windows, macOS, Linux and network storage add to the user's files, in lower case
SYSTEM_NAMES = {
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "zbthumbnail.info"),
    *("$recycle.bin", "system volume information", "icon\r", "icon\uf00d", "desktop db", "desktop df"),
    *("__macosx", ".ds_store", "network trash folder", "temporary items", "lost+found", "aquota.user", "aquota.group"),
    *("@eadir", "@tmp", "@sharebin", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
}
SYSTEM_PATTERN = re.compile(
    # Where a colon is not allowed in names, \uf03a stands for it
    r"\._.*|~\$.*|found\.[0-9]{3}|.*[:\uf03a](zone\.identifier|encryptable)|.*@syno(eastream|resource)",
    re.DOTALL | re.IGNORECASE,
)
SHOWN = 3  # names of each kind
ENCODE_NOTES = ".encoded.jsonl"  # of bfsys encode, in the folder of its output


class LeftOut(NamedTuple):
    """A file, or a folder with everything in it, that is not packed."""

    path: str
    reason: str


def why_left_out(name: str) -> str:
    """The reason why a file or folder of this name is not a sample; empty if it may be one."""
    if is_of_system(name):
        return "of the operating system"
    return "hidden" if name.startswith(".") else ""


def is_of_system(name: str) -> bool:
    return name.casefold() in SYSTEM_NAMES or bool(SYSTEM_PATTERN.fullmatch(name))


def left_out_note(left_out: Sequence[LeftOut]) -> str:
    """One line that counts and names the files, without those of bfsys itself; empty if there are none."""
    by_reason = defaultdict(list)
    for path, reason in left_out:
        if os.path.basename(path) != ENCODE_NOTES:
            by_reason[reason].append("".join(c if is_printable(c) else "_" for c in path))
    kinds = [f"{len(paths):,} {reason} ({some(paths, SHOWN)})" for reason, paths in by_reason.items()]
    return f"files and folders left out: {', '.join(kinds)}" if kinds else ""

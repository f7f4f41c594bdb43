"""Locations in a config: paths, in which ~ and $VARIABLE are expanded, URLs, and commands that print a file."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationInfo

PIPE = "pipe:"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)


def is_remote(location: str) -> bool:
    """Whether `location` is a URL, or a command that prints a file; otherwise it is a path."""
    return location.startswith(PIPE) or _SCHEME.match(location) is not None


def expanded(path: str, info: ValidationInfo) -> str:
    """The path with ~ and environment variables expanded. Raises ValueError if it is empty or a variable is not set."""
    if not info.context:
        return path
    if not path:
        raise ValueError("got an empty path; write . for the current folder, or null where the path may be left out")
    if "\0" in path:
        raise ValueError(f"got {path!r}; a path cannot hold a NUL character")
    if is_remote(path) or ("$" in path and os.path.lexists(path)):
        return path
    for name in ("".join(names) for names in _VARIABLE.findall(path)):
        if name not in os.environ:
            raise ValueError(f"got {path!r}; the environment variable {name!r} is not set: set it, or write its value")
    return os.path.expanduser(os.path.expandvars(path))


def expanded_folder(path: str, info: ValidationInfo) -> str:
    """As `expanded`. Raises ValueError for a URL too: as a path it would be a folder `s3:` in the current one."""
    if info.context and is_remote(path):
        raise ValueError(f"got {path!r}; must be a folder on this machine or on a shared file system, not a URL")
    return expanded(path, info)

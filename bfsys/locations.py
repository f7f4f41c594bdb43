"""Locations in a config: paths, in which ~ and $VARIABLE are expanded, URLs, and commands that print a file."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from pydantic import ValidationInfo

PIPE = "pipe:"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# What follows a scheme, up to the next one; and a URL with its query, which may contain more URLs. In a text without
# queries, each part is still matched only once, so that long texts take no longer.
_ADDRESS = re.compile(r"(?<=\w)://((?:[^\s'\":]+|:(?!//))*)")
_WITH_QUERY = re.compile(r"(\w://[^\s?'\"]*)(\?[^\s'\"]*[^\s'\",.:;)])?")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)


def is_remote(location: str) -> bool:
    """Whether `location` is a URL, or a command that prints a file; otherwise it is a path."""
    return location.startswith(PIPE) or URL.match(location) is not None


def base_name(location: str) -> str:
    """The name of the file at a location, for messages."""
    if location.startswith(PIPE):  # the last word of the command that looks like the path of a file
        names = re.findall(r"[^/\s'\"]/([^/\s'\"?]+\.[^/\s'\"?]+)(?=[\s'\"?]|$)", location)
        return names[-1] if names else "file"
    is_http = location.startswith(("http://", "https://"))
    path = unquote(location.partition("?")[0]) if is_http else location  # a query may hold a /, too
    return path.rstrip("/").rpartition("/")[2]


def hide(location: str) -> str:
    """The location without possible secrets: user names and queries of URLs, and arguments of commands."""
    if location.startswith(PIPE):
        words = [word for word in location[len(PIPE) :].split() if "=" not in word]
        return f"{PIPE}{words[0] if words else ''} … {base_name(location)}"
    if not is_remote(location):
        return location
    return re.sub(r"\?.*", "?***", hide_in(location), flags=re.DOTALL)


def without_secrets(tree: Any) -> Any:
    """A config's tree of plain values, or a part of it, with `hide` for all locations: others may see it."""
    if isinstance(tree, dict):
        return {key: without_secrets(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_secrets(value) for value in tree]
    return hide(tree) if isinstance(tree, str) else tree


def hide_in(text: str) -> str:
    """A text without the user names and queries of URLs in it."""
    text = _ADDRESS.sub(_without_user, text)
    return _WITH_QUERY.sub(lambda found: found[1] + ("?***" if found[2] else ""), text)


def _without_user(found: re.Match) -> str:
    address = found[1]
    host = address.partition("/")[0]
    end = host.rfind("@")
    if end < 0 and ":" in host and not re.search(r":\d*$|\]$", host):  # no port, so a password in which there is a /
        end = address.rfind("@")
    return f"://***{address[end:]}" if end >= 0 else found[0]


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

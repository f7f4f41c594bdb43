"""URLs of object stores: which ones bfsys can write to, and the package that opens each.

fsspec opens them, so the user's URLs, credentials and settings work as in other programs.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from bfsys.locations import URL

EXAMPLE = "s3://bucket/folder"
MAGIC = re.compile(r"[*\[\]{}?#]")
EXTRAS = {"s3": "s3", "s3a": "s3"}  # extras of bfsys, by scheme; for other schemes, fsspec names the package
NOT_KEPT = {
    "http": "a web server, to which bfsys cannot write",
    "https": "a web server, to which bfsys cannot write",
    "memory": "the memory of one process",
}


def as_url(text: str) -> str:
    """The URL from which a Path was made, with the slashes that Path removed; "" if it was made from a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(?=.)", text)
    if not match:
        return ""
    root = "/" if match[1] in ("file", "local") else ""
    return f"{match[1]}://{root}{text[match.end() :]}"


def problem_of_url(url: str, given: str = "") -> str:
    """The problem of a URL for checkpoints; "" if there is none. The message contains no secrets.

    `given` is the part of the URL that the user wrote.
    """
    given = given or url
    if not URL.match(given):
        return f"got {given!r}; must be a URL such as {EXAMPLE}; the URL of a folder is file:///FOLDER"
    try:
        parts = urlsplit(url)
    except ValueError as error:
        return f"got {given!r}: {error}; must be a URL such as {EXAMPLE}"
    scheme = parts.scheme
    if ":" in parts.netloc.rpartition("@")[0] or "?" in given or "#" in given:
        return (
            f"the {scheme}:// URL holds a password, a query or a fragment; it would be stored in config.yaml and in "
            "every checkpoint. Give scheme, bucket and folder alone; credentials come from the environment "
            "(AWS_PROFILE, AWS_ACCESS_KEY_ID, …) or from the store's own files"
        )
    if not given.startswith(f"{scheme}://"):
        return f"got {given!r}; write the scheme in small letters: {scheme}://"
    if "$" in given:
        return f"got {given!r}; variables in a URL are not expanded: write their values"
    if "::" in url or MAGIC.search(url):
        return f"got {url!r}; '::' and the characters * ? # [ ] {{ }} have a special meaning in such a URL; rename"
    if scheme in NOT_KEPT:
        return f"got {given!r}: {NOT_KEPT[scheme]}; give an object store, such as {EXAMPLE}"
    if not urlsplit(given).netloc and scheme not in ("file", "local"):
        return f"got {given!r}, an incomplete address; a bucket or a host follows the ://, as in {EXAMPLE}"
    if parts.netloc and scheme in ("file", "local"):
        return f"got {given!r}; three slashes begin the URL of a folder: file:///FOLDER"
    return _problem_of_scheme(given, scheme)


def _problem_of_scheme(given: str, scheme: str) -> str:
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        return f"got {given!r}: fsspec does not know {scheme}://; schemes are s3, gs, az, file and others"
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        remedy = f"pip install 'bfsys[{extra}]'" if extra else str(error)
        return f"got {given!r}: the package that opens {scheme}:// is not installed; {remedy}"
    return ""

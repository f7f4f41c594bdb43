"""The content of a URL as a stream of bytes, which ends completely or raises the reason.

webdataset's `gopen` opens URLs, so the user's schemes, credentials and proxies keep working. Rejected alternatives: its
`Pipe` for reading, which waits forever if a server sends nothing; and an HTTP library, which knows one of the five
schemes.
"""

from __future__ import annotations

import os
import re
import select
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from email import message_from_bytes
from email.utils import parsedate_to_datetime
from typing import IO, TYPE_CHECKING, BinaryIO
from urllib.parse import quote, urlsplit

import psutil

from bfsys.errors import UserError
from bfsys.locations import PIPE, hide, hide_in

if TYPE_CHECKING:
    from webdataset.gopen import Pipe

PIPE_EXAMPLE = "pipe:aws s3 cp s3://bucket/dir/{file} -"
PROGRAMS = {"http": "curl", "https": "curl", "ftps": "curl", "sftp": "curl", "scp": "curl", "s3": "aws", "gs": "gsutil"}
# The file's name comes from a dataset.json of unknown origin, and is inserted into a shell command.
HARMLESS_IN_SHELL = re.compile(r"[\w.+=@%:,][\w.+=@%:,/-]*")
# curl accepts no spaces. A # would begin a fragment, which is not sent to the server.
NOT_IN_URL = re.compile(r"[\0-\x20\x7f#]")
NOT_ASCII = re.compile(r"[^\0-\x7f]+")  # some servers do not decode it, and curl sends it as it is
GONE = ("404", "410")  # HTTP status: the server works and the file does not exist
CANNOT_RUN = (126, 127)  # exit status of a shell: the command is not executable or not found
ERROR_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|\?xml)\b", re.IGNORECASE)
CHUNK_BYTES = 1 << 20
POLL_S = 0.1  # interval at which a download checks whether to stop


class TryFailed(Exception):
    """One try failed; a retry may succeed. The server asked for a pause of `retry_after_s` before it."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class WrongContent(TryFailed):
    """The answer was complete, but it was not the requested file."""


class Stopped(Exception):
    """The prefetcher was closed."""


def url_of(location: str, file: str) -> str:
    """The URL of a file of a dataset at `location`."""
    if location.startswith(PIPE):
        if "{file}" not in location:
            raise UserError(f"{hide(location)}: lacks {{file}}, which stands for a file's name: {PIPE_EXAMPLE}")
        if not HARMLESS_IN_SHELL.fullmatch(file):
            raise UserError(
                f"{hide(location)}: the name {file!r} cannot be used in a command; allowed are letters, digits and "
                f"_.+=@%:,/-. Rename the dataset, or read it by another scheme"
            )
        return location.replace("{file}", file)
    try:
        parts = urlsplit(location)
        is_http = parts.scheme in ("http", "https")
        if is_http and parts.port == 0:  # reading it raises ValueError if it is not a number up to 65535
            raise ValueError
    except ValueError:  # its text may hold a password
        raise UserError(
            f"{hide(location)}: is not an address; a host, and a port from 1 to 65535 if one is needed, follow the "
            "://. In a user name or password, write %2F for /, %3F for ?, %23 for # and %40 for @"
        ) from None
    if "://" in location and not parts.netloc and not location.startswith("file:"):
        raise UserError(f"{hide(location)}: is an incomplete address; a host or a bucket follows the ://")
    if not is_http:
        return f"{location.rstrip('/')}/{file}"
    path, mark, query = location.partition("?")
    url = f"{path.rstrip('/')}/{quote(file)}{mark}{query}"
    url = NOT_IN_URL.sub(lambda found: quote(found[0]), url)
    begin, host, rest = url.partition(parts.netloc)  # curl converts the name of a host itself
    return begin + host + NOT_ASCII.sub(lambda found: quote(found[0]), rest)


def _command(url: str, stall_s: float, headers: str) -> str | None:
    """The shell command that prints the file; None if gopen can read the URL itself. The headers of an answer go to the
    file named `headers`."""
    if url.startswith(PIPE):
        return url[len(PIPE) :]
    from webdataset.gopen import gopen_ais, gopen_schemes

    scheme = urlsplit(url).scheme
    by_ais = gopen_schemes.get(scheme) is gopen_ais  # e.g. USE_AIS_FOR=s3:gs
    program = "ais" if by_ais else PROGRAMS.get(scheme)
    if program is not None and shutil.which(program) is None:
        raise UserError(
            f"{hide(url)}: {scheme}:// is read with {program!r}, which is not installed here. Install it, "
            f"or give the place of the dataset as a command that prints a file, such as {PIPE_EXAMPLE}"
        )
    if scheme in ("http", "https"):
        # gopen's own curl command retries 30 times, and a retry after half a file repeats its beginning.
        # curl's limit on stalls is longer than ours. It ends curl if this process no longer exists.
        speed = f"--speed-limit 1 --speed-time {int(stall_s) + 2}"
        curl = (
            f"curl -f -sS -L --globoff --netrc-optional -D {shlex.quote(headers)} -H 'Accept-Encoding: identity' "
            f"--connect-timeout {stall_s:g} {speed}"
        )
        # Some servers compress every answer; curl then decompresses it. It does not ask for compression. Others name an
        # encoding that curl does not know (status 61), such as aws-chunked or UTF-8, although the bytes are the file's.
        address = shlex.quote(url)
        return f"{curl} --compressed -- {address} || {{ s=$?; [ $s = 61 ] && exec {curl} -- {address}; exit $s; }}"
    if program == "aws":  # gopen does not support s3://
        return f"aws s3 cp --only-show-errors {shlex.quote(url)} -"
    if program == "gsutil":
        return f"gsutil -q cat {shlex.quote(url)}"
    return None


def _open(url: str, stall_s: float, errors: str, headers: str) -> BinaryIO | Pipe:
    """Open a URL. The error output of a command goes to the file named `errors`, and HTTP headers to `headers`."""
    from webdataset.gopen import gopen, gopen_schemes, rewrite_url  # imports torch, which local folders do not need

    try:
        url = rewrite_url(url)
        command = _command(url, stall_s, headers)
        if command is not None:  # with a line break, since a command may end in a comment
            url = f"{PIPE}{{ {command}\n}} 2>{shlex.quote(errors)} </dev/null"
        return gopen(url, "rb")
    except (ValueError, ImportError) as error:
        known = ", ".join(sorted({*PROGRAMS, *gopen_schemes, "file"} - {"__default__"}))
        raise UserError(f"{hide(url)}: cannot be opened ({hide_in(str(error))}); schemes are: {known}") from error
    except OSError as error:
        raise TryFailed(str(error)) from error


def _end_tree(process: subprocess.Popen) -> None:
    """Kill a command and all its descendants. It shares our process group, so the group cannot be killed."""
    tree: list[psutil.Process] = []
    with suppress(psutil.Error):
        tree.append(psutil.Process(process.pid))
    for member in tree:  # the list grows in the loop
        with suppress(psutil.Error):
            member.suspend()  # first, so that it cannot start another child after its children are listed
            tree.extend(member.children())
    for member in tree:
        with suppress(psutil.Error):
            member.kill()
    process.wait()


def stream(
    url: str, stall_s: float, stop: threading.Event, size_bytes: int | None = None
) -> Generator[bytes, None, None]:
    """The content of a URL, in chunks as they arrive. No process is left running.

    Raises TryFailed if the download stalls, fails or delivers a web page instead, and UserError if a retry would be
    useless.
    """
    received = 0
    with (
        tempfile.NamedTemporaryFile(prefix="bfsys-") as errors,
        tempfile.NamedTemporaryFile(prefix="bfsys-") as headers,
    ):
        source = _open(url, stall_s, errors.name, headers.name)
        process: subprocess.Popen | None = getattr(source, "proc", None)  # the process of a Pipe
        file: BinaryIO = source if process is None else getattr(source, "stream", source)
        try:
            while data := _next_bytes(file.fileno(), stall_s, stop, received):
                if received == 0 and ERROR_PAGE.match(data):
                    page = hide_in(data[:80].decode("utf-8", "replace"))
                    raise WrongContent(f"the answer is a web page, not the file; it begins with {page!r}")
                received += len(data)
                yield data
            status = 0 if process is None else process.wait(stall_s)
        except subprocess.TimeoutExpired:
            raise TryFailed(f"the command did not end after {received:,} bytes") from None
        finally:
            if process is not None and process.poll() is None:
                _end_tree(process)
            file.close()
        complaint = _last_line(errors)
        if status != 0 or (received == 0 and complaint):  # the status is only that of a pipeline's last command
            of = "" if size_bytes is None else f" of {size_bytes:,}"
            raise _failure(url, status, complaint, f"{received:,}{of}", _retry_after_s(headers.read()))


def _failure(url: str, status: int, complaint: str, received: str, retry_after_s: float) -> Exception:
    """The error for a command's exit status and error output; `received` is the number of bytes it delivered."""
    why = f"exit status {status}" + (f": {complaint}" if complaint else "")
    if status in CANNOT_RUN:
        return UserError(f"{hide(url)}: the command cannot be run ({why}); install it, or correct the command")
    curl = re.search(r"returned error: (\d{3})", complaint)
    code = curl or re.search(r"(?:error occurred \(|NotFoundException: )(\d{3})\b", complaint)  # aws, gsutil
    kind = WrongContent if code is not None and code[1] in GONE else TryFailed
    return kind(f"HTTP status {curl[1]}" if curl else f"ended at {received} bytes ({why})", retry_after_s)


def _retry_after_s(headers: bytes) -> float:
    """The pause that the last of several answers asks for, in seconds; 0 for none. Given are the headers of all."""
    last = headers.replace(b"\r", b"").strip().rpartition(b"\n\n")[2]  # the others are of redirects and of a proxy
    answer = message_from_bytes(last.partition(b"\n")[2])
    after = answer.get("Retry-After", "").strip()
    if after.isdecimal():
        return float(after[:9])
    with suppress(TypeError, ValueError):  # it is a date; the clock that counts is the server's
        return (parsedate_to_datetime(after) - parsedate_to_datetime(answer["Date"])).total_seconds()
    return 0.0


def _next_bytes(descriptor: int, stall_s: float, stop: threading.Event, received: int) -> bytes:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + stall_s
    while not poll.poll(POLL_S * 1000):
        if stop.is_set():
            raise Stopped
        if time.monotonic() >= deadline:
            raise TryFailed(f"stalled for {stall_s:g} s after {received:,} bytes")
    if stop.is_set():
        raise Stopped
    try:
        return os.read(descriptor, CHUNK_BYTES)
    except OSError as error:
        raise TryFailed(f"reading failed after {received:,} bytes: {error.strerror}") from error


def _last_line(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
    lines = file.read().decode("utf-8", "replace").split("\n")
    return hide_in(next((line.strip() for line in reversed(lines) if line.strip()), ""))[:300]

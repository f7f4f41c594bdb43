"""Standard output and standard error; their failures never lose work.

A console can be closed (a pipe whose reader has ended), full (a redirect to a full disk), missing (a closed
descriptor), stopped (Ctrl-S, a pager), or unable to show a character. Commands whose result is not their output, such
as training, continue in each of these cases, and the lines that the console does not accept go to a log file. Commands
whose result is their output fail if it cannot be written.

Rejected alternative: a thread that writes, because a forked loader process would not have this thread.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
import time
from contextlib import suppress
from pathlib import Path

# A pipe that is ready for writing accepts at least this many bytes without blocking (PIPE_BUF).
PART_BYTES = 4096
# A console that accepts no bytes for this long counts as stopped. Writing does not wait for it until it accepts again.
PATIENCE_S = 5.0


class OutputError(OSError):
    """Standard output cannot be written."""


class OutputClosed(OutputError):
    """The reader of standard output has ended, as in `… | head`."""


class Console(io.TextIOBase):
    """A text stream to standard output or error that writes whole lines. Characters that the console's encoding lacks
    are written as backslash escapes."""

    encoding = ""  # overrides the attribute of the base class, which is read-only

    def __init__(self, descriptor: int, name: str, encoding: str, *, fails: bool) -> None:
        """Write to `descriptor`; -1 means a closed console. If `fails` is true, errors raise OutputError, and writing
        waits for a stopped console. Otherwise lines that cannot be written go to the file `log` if it is set."""
        self.log: Path | None = None
        self.fails = fails
        self._descriptor, self._name, self.encoding = descriptor, name, encoding
        # It writes a byte order mark only at the start.
        self._encoder = codecs.getincrementalencoder(encoding)("backslashreplace")
        self._pending = ""
        self._is_stopped = False

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._descriptor >= 0 and os.isatty(self._descriptor)

    def fileno(self) -> int:
        if self._descriptor < 0:
            raise io.UnsupportedOperation("a closed console has no descriptor")
        return self._descriptor

    def write(self, text: str) -> int:
        self._pending += text
        if "\n" in text or "\r" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        text, self._pending = self._pending, ""
        if text:
            self.write_bytes(self._encoder.encode(text))

    def write_bytes(self, content: bytes) -> None:
        """Write encoded text."""
        if self._descriptor < 0 and self.fails:
            return  # the output was closed on purpose
        problem: str | None = "it takes nothing"
        try:
            while content and (self.fails or self._is_ready()):
                content = content[os.write(self._descriptor, content[:PART_BYTES]) :]
        except OSError as error:
            if self.fails:
                kind = OutputClosed if isinstance(error, BrokenPipeError) else OutputError
                raise kind(error.errno, error.strerror, self._name) from None
            problem = error.strerror
        if content and self.log:
            with suppress(OSError):
                self._write_to_log(self.log, content, problem)

    def _is_ready(self) -> bool:
        """Whether a write would return or fail without blocking."""
        if self._descriptor < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        self._is_stopped = not poll.poll(0 if self._is_stopped else PATIENCE_S * 1000)
        return not self._is_stopped

    def _write_to_log(self, log: Path, content: bytes, problem: str | None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            if not file.tell():
                head = f"--- {time.strftime('%F %T')} lines that {self._name} did not accept ({problem})\n"
                file.write(head.encode())
            file.write(content)


def prepare() -> None:
    """Make standard output and standard error safe to use. Call this before a command does anything else.

    Otherwise, the next file that is opened would get the number of a closed descriptor, and output would be written
    into it. Standard error never raises. Standard output does, until `go_on_without` is called.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
    for name, shown_as, descriptor in (("stdout", "standard output", 1), ("stderr", "standard error", 2)):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            setattr(sys, name, Console(-1, shown_as, "utf-8", fails=name == "stdout"))
        elif type(stream) is io.TextIOWrapper and _descriptor_of(stream) == descriptor:
            with suppress(OSError):
                stream.flush()
            setattr(sys, name, Console(descriptor, shown_as, stream.encoding, fails=name == "stdout"))


def go_on_without(log: Path | None = None) -> None:
    """Ignore errors of the console from now on. Lines that cannot be printed go to `log`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Console):
            stream.fails, stream.log = False, log


def discard_output() -> None:
    """Discard further output, after the reader of standard output has ended."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _descriptor_of(stream: io.TextIOWrapper) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None

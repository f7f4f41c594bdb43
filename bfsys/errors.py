"""One exception for every error that a user can correct, how a command ends after it, and all exit codes.

Rejected alternative: a family of exception classes. Each message already says where the problem is, what was found,
what is allowed and what to do, and launchers distinguish outcomes by the exit code. An error that callers catch
separately is a subclass, which is defined where it is raised.
"""

import difflib
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from unicodedata import category

from bfsys import console, process
from bfsys.locations import hide_in

# Exit codes of training, from sysexits.h if one fits. Any other code means a crash, after which a run may be restarted.
EXIT_CRASHED = 1  # Python's exit code after an exception; a restart may help
EXIT_USER_ERROR = 2  # bad input; a restart cannot help
EXIT_DIVERGED = 65  # EX_DATAERR: bad steps recurred after every roll-back, or all steps were skipped
EXIT_HUNG = 70  # EX_SOFTWARE: the watchdog ended a run without progress; restart it
EXIT_STORAGE = 74  # EX_IOERR: checkpoints or metrics cannot be written
EXIT_REQUEUE = 75  # EX_TEMPFAIL: stopped on request; requeue the run
EXIT_NO_PROGRESS = 76  # a launcher stopped because its run crashed repeatedly
EXIT_STOPPED = 130  # stopped on request

# Each of these ends a command as Ctrl-C does: it ends its processes and removes unfinished files. Ranks react later and
# otherwise (supervision/signals.py).
STOPS_COMMANDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TOGETHER_S = 2.0  # a terminal that is closed sends SIGHUP twice, and systemd sends SIGTERM with it
AGAIN_S = 0.5  # from a KeyboardInterrupt to the next one, if nothing handles it

# A file server does not answer, as NFS (ESTALE, EREMOTEIO), Lustre (ESHUTDOWN) and FUSE (ENOTCONN) report it.
OUTAGE_ERRNOS = {
    errno.EAGAIN,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ENOLINK,
    errno.ENOTCONN,
    errno.EPROTO,
    errno.EREMOTEIO,
    errno.ESHUTDOWN,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
# The system has too many open files, or no memory.
SHORTAGE_ERRNOS = {errno.ENFILE, errno.ENOMEM}
# These may pass, and a restart may help. EIO may also be a broken disk. Any other errno needs human action.
TRANSIENT_ERRNOS = OUTAGE_ERRNOS | SHORTAGE_ERRNOS | {errno.EIO}
# Access is denied, for a reason outside the file: no permission, or too many open files of this process.
DENIED_ERRNOS = {errno.EACCES, errno.EPERM, errno.EMFILE}
# The file is missing, or is something else than a regular file.
MISSING_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENAMETOOLONG, errno.ENXIO}


SHOWN_CHARACTERS = 4_000  # of a problem
NO_TEMPORARY_FOLDER = "No usable temporary directory"  # from Python's `tempfile`
NO_THREAD = "can't start new thread"  # from Python
READ_BY_PYTORCH = ("TORCH_LOGS", "TORCH_DISTRIBUTED_DEBUG")  # variables that it checks when it is imported
TO_START_MORE = "raise the limit of processes and threads (ulimit -u, or pids.max of a container), or end some"
JOINERS = "\u200c\u200d"  # between letters of Persian and similar scripts, and between the parts of an emoji


class StopRequest(KeyboardInterrupt):
    """A signal that ends a command. It is a subclass, because Python ignores the exit code and ends the process by
    SIGINT if KeyboardInterrupt itself passes through code that was compiled from text, as dataclasses do."""


class UserError(Exception):
    """Bad input. Holds one message per problem, so that all are reported at once. URLs in them show no secrets."""

    def __init__(self, *problems: str, exit_code: int = EXIT_USER_ERROR) -> None:
        super().__init__(*map(hide_in, problems))
        self.exit_code = exit_code

    @property
    def problems(self) -> tuple[str, ...]:
        return self.args

    def __str__(self) -> str:
        return "\n".join(self.args)


def code_of(error: Exception) -> int:
    """The exit code of a `UserError` that reports another error: that of a crash if a restart may help."""
    number = error.errno if isinstance(error, OSError) else None
    if number in TRANSIENT_ERRNOS:
        return EXIT_CRASHED
    return EXIT_STORAGE if number in (errno.ENOSPC, errno.EDQUOT) else EXIT_USER_ERROR


def remedy_of(number: int | None) -> str:
    """What a user can do after an error of this errno, for the end of a message."""
    remedies = {
        errno.ENOSPC: "free disk space or inodes (df -h, df -i)",
        errno.EDQUOT: "free disk space or inodes of the quota",
        errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
        errno.EMFILE: "raise the limit of open files (ulimit -n 65536)",
        errno.ENFILE: "raise the limit of open files of the machine (sysctl fs.file-max)",
        errno.ENOMEM: "free memory",
    }
    return remedies.get(number or 0, "repair that")


def cannot_start(what: str, error: OSError) -> UserError:
    """The error if the system refuses to start processes, or refuses the semaphores and memory that they share. If it
    lacks resources for a while, a restart may help."""
    remedy = remedy_of(error.errno)
    if error.errno == errno.EAGAIN:
        remedy = TO_START_MORE
    elif error.filename is None and error.errno in (errno.ENOSPC, errno.EROFS, errno.ENOENT, errno.EACCES):
        # of semaphores and shared memory; if Python itself is missing, the error names its file
        remedy = "/dev/shm must exist, be writable and have free space (docker run --shm-size)"
    is_short = error.errno in TRANSIENT_ERRNOS
    reason = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    problem = f"{what} cannot be started: {reason}; {remedy}"
    return UserError(problem, exit_code=EXIT_CRASHED if is_short else EXIT_USER_ERROR)


@contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Catch a `UserError`, and add its problems to the list. An error with another exit code is not caught, so that the
    exit code is kept: a restart may help."""
    try:
        yield
    except UserError as error:
        if error.exit_code != EXIT_USER_ERROR:
            raise
        problems.extend(error.problems)


@contextmanager
def os_errors_as(what: str) -> Iterator[None]:
    """Turn an OSError into a `UserError`: what failed, and the system's reason."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror}") from None


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A hint to append to a message: " (did you mean 'x'?)" with the nearest allowed name; empty if none is near."""
    near = difflib.get_close_matches(name, list(allowed), 1, 0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def counted(number: int, noun: str) -> str:
    """The number and its noun, such as `1 file`, `1,200 classes` or `3 tries`."""
    if number == 1:
        return f"1 {noun}"
    if noun.endswith(("s", "ch")):
        return f"{number:,} {noun}es"
    return f"{number:,} {noun[:-1]}ies" if noun.endswith("y") else f"{number:,} {noun}s"


def some(names: Sequence[str], shown: int = 5) -> str:
    """The first names, as text."""
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")


def one_line(text: str) -> str:
    """The text with line breaks and other control characters escaped. File names may contain them."""
    return "".join(c if is_printable(c) else ascii(c)[1:-1] for c in text)


def error_line(problem: str) -> str:
    """The line that shows a problem. Its middle is left out if a value in it, such as a huge key, makes it long."""
    text = one_line(problem)
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[: SHOWN_CHARACTERS // 2]} … {text[-SHOWN_CHARACTERS // 2 :]}"
    return f"error: {text}"


def is_printable(text: str) -> bool:
    """Whether text can be printed. Unlike `str.isprintable`, this accepts the spaces and joiners of other scripts."""
    return text.isprintable() or all(c.isprintable() or c in JOINERS or category(c) == "Zs" for c in text)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out, which PyTorch reports in several ways."""
    signs = (
        "can't allocate memory",
        "CUDA out of memory",  # PyTorch's own allocator
        "CUDA error: out of memory",  # the driver, such as for the context on a GPU that is full
        "CUBLAS_STATUS_ALLOC_FAILED",
        "failed to map segment",  # importing PyTorch
    )
    is_by_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_by_type or any(sign in str(error) for sign in signs)


def summary_of(docstring: str | None) -> str:
    """The first paragraph of a module's docstring, for `--help`; empty under `python -OO`, which removes docstrings."""
    return (docstring or "").partition("\n\n")[0]


def run_command(main: Callable[[], int | None], *, output_is_optional: bool = False) -> None:
    """Run a command's `main`, and exit with the code of `exit_code_of`. An OSError about a file gives one line and the
    code of `code_of`. SIGTERM and SIGHUP are like Ctrl-C.

    `output_is_optional`: the command continues if its output cannot be written.
    """

    def act() -> int | None:
        if output_is_optional:
            console.go_on_without()
        try:
            return main()
        except OSError as error:
            if error.filename is None and NO_TEMPORARY_FOLDER in str(error):
                problem = f"{error.strerror}: free space there, or set TMPDIR to a folder that can be written to"
                raise UserError(problem) from None
            if error.filename is None or isinstance(error, console.OutputError):
                raise
            raise UserError(f"{error.filename}: {error.strerror}", exit_code=code_of(error)) from None
        except (MemoryError, RuntimeError, ImportError) as error:
            if not is_out_of_memory(error):
                raise
            what = f": {str(error).splitlines()[0]}" if str(error) else ""
            raise UserError(f"there is not enough memory{what}", exit_code=EXIT_CRASHED) from None
        except ValueError as error:
            refused = next((name for name in READ_BY_PYTORCH if name in os.environ and name in str(error)), None)
            if refused is None:
                raise
            raise UserError(
                f"environment variable {refused}: PyTorch refuses {os.environ[refused]!r}; correct or unset it "
                "(python -c 'import torch' shows what is allowed)"
            ) from None

    sys.exit(exit_code_of(act, STOPS_COMMANDS))


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder was deleted; run the command in one that exists") from None


def exit_code_of(main: Callable[[], int | None], stopped_by: Sequence[int] = (signal.SIGINT,)) -> int:
    """Run a command's `main`. Returns its exit code. A `UserError` prints one line per problem and has its own code (by
    default 2). A signal N of `stopped_by` raises KeyboardInterrupt and gives 128 + N, which is 130 for Ctrl-C. Other
    exceptions print a traceback and give 1."""
    console.prepare()
    process.prepare()
    received: list[tuple[int, float]] = []
    this_process = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            if os.getpid() != this_process:  # a forked process has inherited this
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            if received and time.monotonic() - received[-1][1] < TOGETHER_S:
                return  # unfinished files are being removed
        received.append((number, time.monotonic()))
        signal.signal(signal.SIGALRM, stop_again)
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S, AGAIN_S)
        raise StopRequest

    def stop_again(number: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt again if the last one was dropped. Extension modules drop it if it arrives while they
        import other modules. If it is still being handled, it is the current exception or one of its contexts."""
        error = sys.exception()
        while error is not None and not isinstance(error, KeyboardInterrupt):
            error = error.__context__
        if error is None:
            raise StopRequest

    def stopped() -> int:
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("stopped on request", file=sys.stderr)
        return 128 + received[0][0] if received else EXIT_STOPPED

    # A command in the background ignores Ctrl-C, and one that was started by `nohup` ignores SIGHUP.
    before = {n: handler for n in stopped_by if (handler := signal.getsignal(n)) not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, stop)
        _check_current_folder()
        if outdated := process.outdated_packages():
            raise UserError(*outdated)
        code = main() or 0
        sys.stdout.flush()
        return code
    except SystemExit as end:  # raised by argparse
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return EXIT_CRASHED
        return end.code or 0
    except UserError as error:
        for problem in error.problems:
            print(error_line(problem), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return stopped()
    except console.OutputClosed:  # the reader ended on purpose, as in `… | head`
        console.discard_output()
        return 0
    except console.OutputError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BaseException as error:
        if received:  # PyTorch drops a KeyboardInterrupt while it imports NumPy, and then fails without NumPy
            return stopped()
        # Gloo raises RuntimeError with the system's text.
        if isinstance(error, RuntimeError) and str(error) in (NO_THREAD, os.strerror(errno.EAGAIN)):
            print(f"error: a thread cannot be started; {TO_START_MORE}", file=sys.stderr)
            return EXIT_CRASHED
        too_many = next((t for t in map(os.strerror, (errno.EMFILE, errno.ENFILE)) if t in str(error)), None)
        if too_many is None or not isinstance(error, OSError | RuntimeError):
            traceback.print_exc()
            return EXIT_CRASHED
        limit = process.open_files_limit()
        print(f"error: {too_many}: this process may have {limit:,}; raise the limit (ulimit -n 65536)", file=sys.stderr)
        return EXIT_USER_ERROR
    finally:
        if received:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():  # with SIG_DFL (bfsys/start.py), another Ctrl-C gives no traceback
            signal.signal(number, handler)

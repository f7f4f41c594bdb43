"""The processes that write shards. Each packs one job after the other, and a crash of one affects its own job only.

Files are decoded in these processes and never in the process of the command, because a codec may abort. A file that
ends its process by a fault of the codec is a bad file, and the job is written again without it. To this end each
process records in shared memory which file it is decoding. Rejected alternative: concurrent.futures, whose pool breaks
as a whole and does not say which of its processes died first.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from ctypes import c_long
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait

from bfsys.data.media.encodings import parse_encoding
from bfsys.data.packing.shard_jobs import Job, Outcome, write_job
from bfsys.errors import TO_START_MORE, UserError, cannot_start
from bfsys.process import blocking, end_of

# Spawned, not forked: a forked process may hang if its parent has threads (here the progress bar's).
CONTEXT = multiprocessing.get_context("spawn")
CODEC_FAULTS: tuple[int, ...] = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
MOST_CODEC_FAULTS = 100  # more of them indicate a damaged library rather than damaged files


class Worker:
    """A worker process, as its parent sees it."""

    def __init__(self, skip_bad: bool, job: Job, fatal: dict[str, str]) -> None:
        """Start the worker with `job`."""
        self.position = CONTEXT.RawValue(c_long, 0)
        self.connection, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_work, args=(theirs, self.position, skip_bad), daemon=True)
        # The process inherits the mask: Ctrl-C goes to all processes of a terminal, and this one ends its workers.
        with blocking({signal.SIGINT}):
            self._process.start()
        theirs.close()
        self.give(job, fatal)

    def give(self, job: Job, fatal: dict[str, str]) -> None:
        self.job, self.position.value = job, -1
        with suppress(ConnectionError):  # the process has crashed; `outcome` detects that
            self.connection.send((job, fatal))

    def outcome(self) -> Outcome | OSError | UserError | None:
        """The result of the job; None if the process crashed."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            return None

    def name_fatal_file(self, fatal: dict[str, str]) -> None:
        """Add the file that the crashed process was packing. Raises UserError if the file is not the cause."""
        code, number = self._process.exitcode, self.position.value
        assert code is not None, "`outcome` has waited for its end"
        if number < 0:
            raise UserError(f"{self.job.path}: the process that was to write it {end_of(code)}, before its first file")
        path = self.job.files[number].path
        if -code not in CODEC_FAULTS:
            raise UserError(
                f"{path}: the process that packed this file {end_of(code)}; run the same command again with "
                "fewer --workers, or leave large files out by --max-file-bytes: finished shards are kept"
            )
        end = f"signal {signal.Signals(-code).name}"
        if len(fatal) == MOST_CODEC_FAULTS:
            raise UserError(
                f"{path}: {len(fatal) + 1} files ended the processes that decoded them, this one with {end}; decode it "
                "elsewhere to see whether the files or the installed libraries are damaged"
            )
        fatal[path] = f"ends the process that decodes it ({end})"

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def write_jobs(jobs: Sequence[Job], count: int, skip_bad: bool) -> Iterator[Outcome]:
    """Write all shards with `count` processes; outcomes come in any order.

    Raises UserError and OSError as `write_job` does, and UserError if a process crashes for another reason than a file.
    """
    count = min(count, len(jobs))
    if count == 1 and not parse_encoding(jobs[0].encoding).modality:
        yield from (write_job(job, skip_bad, {}, c_long()) for job in jobs)
        return
    resource_tracker.ensure_running()  # started later, it would unblock SIGINT
    waiting = deque(jobs)
    fatal: dict[str, str] = {}
    workers: dict[Connection, Worker] = {}
    try:
        while waiting or workers:
            while waiting and len(workers) < count:
                try:
                    worker = Worker(skip_bad, waiting.popleft(), fatal)
                except OSError as error:
                    raise cannot_start(f"a process that writes shards (--workers {count})", error) from None
                workers[worker.connection] = worker
            ready = wait(list(workers))
            for connection in [connection for connection in workers if connection in ready]:
                worker = workers[connection]
                outcome = worker.outcome()
                if isinstance(outcome, Exception):
                    raise outcome
                if outcome is None:
                    workers.pop(connection).end()
                    worker.name_fatal_file(fatal)
                    waiting.appendleft(worker.job)
                    continue
                if waiting:
                    worker.give(waiting.popleft(), fatal)
                else:
                    workers.pop(connection).end()
                yield outcome
    finally:
        for worker in workers.values():
            worker.end()
        for unfinished in jobs[0].path.parent.glob(".*.tmp"):  # of processes that were killed while they wrote
            unfinished.unlink()


def _work(connection: Connection, position: c_long, skip_bad: bool) -> None:
    try:
        _exit_with_parent()
    except RuntimeError:  # from Python, if a thread cannot be started
        connection.send(UserError(f"a thread of a process that writes shards cannot be started; {TO_START_MORE}"))
        return
    _silence_codecs()
    while True:
        try:
            job, fatal = connection.recv()
        except EOFError:
            return
        result: Outcome | OSError | UserError
        try:
            result = write_job(job, skip_bad, fatal, position)
        except (OSError, UserError) as error:
            result = error
        connection.send(result)


def _silence_codecs() -> None:
    """Discard what libraries print on standard error: lines of libtiff and libmpg123 name no file, and there may be one
    per row of a picture. Python's own output stays."""
    sys.stderr = os.fdopen(os.dup(2), "w", errors="backslashreplace", buffering=1)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)


def _exit_with_parent() -> None:
    """End this process when its parent ends. Otherwise it would write at the same time as the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was started by one"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

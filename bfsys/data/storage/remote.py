"""Remote files, fetched whole into a bounded folder that all processes of a node share.

A file is fetched before it is read. Training reads at random places of a shard. If a connection breaks during a
download, the download is retried within seconds, and no read fails. The size and the sha256 of a downloaded file are
compared with dataset.json, so a cached file is the packed one. The processes coordinate by `flock` on files beside the
cached ones, because the kernel releases a lock when its holder dies.

Rejected alternatives: reading tars as streams (the order would depend on the network, and a resume would fetch
everything again); a daemon that fetches for all processes (one more thing to start, watch and stop); and an HTTP
library (the programs behind `webdataset.gopen` already know the user's schemes, credentials and proxies).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from bfsys.data.storage.streams import Stopped, TryFailed, WrongContent, stream
from bfsys.errors import EXIT_CRASHED, EXIT_STORAGE, UserError, code_of, counted
from bfsys.locations import base_name, hide

T = TypeVar("T")

CACHED = re.compile(r"[0-9a-f]{16}-.*(?<!\.lock)")
PART, LOCK, EVICT = ".part", ".lock", "evict"
CERTAIN_AFTER = 3  # complete but wrong answers before giving up; an outage is retried more often
SAY_AFTER_S = 10.0  # a slower fetch is reported on standard error
SMALL_FILE_BYTES = 64 << 20
ROOM_POLL_S = 0.1  # interval of checks for free space in the cache
JITTER = (0.75, 1.25)  # range of the factor between a pause and its mean
# Jitter is drawn from the kernel's generator. Nodes that failed together then retry at different times, and the random
# states of training do not change.
_kernel_random = random.SystemRandom()


@dataclass(frozen=True)
class RemoteFile:
    """A remote file, and the hash and size of its content."""

    url: str
    sha256: str
    size_bytes: int


class WrongContentError(UserError):
    """A server delivered wrong content in every try. This means damage, not an outage."""


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` + .lock, which excludes other threads and processes. Yields False if the lock is taken
    and `wait` is false."""
    path = path.with_name(path.name + LOCK)
    descriptor = _lock(path, wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a loader process that was forked meanwhile has the descriptor too
            os.close(descriptor)


def _lock(path: Path, wait: bool) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
        os.close(descriptor)  # the previous holder removed this file, so others may lock a new one


@contextmanager
def _saying_if_slow(url: str) -> Iterator[None]:
    text = f"{url}: is still being fetched after {SAY_AFTER_S:.0f} s"
    timer = threading.Timer(SAY_AFTER_S, print, [text], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def too_long(where: str | Path) -> UserError:
    return UserError(f"{where}: holds more than {SMALL_FILE_BYTES:,} bytes; is it the right file?")


class Cache:
    """Remote files in a local folder of at most `limit_bytes`. The least recently used files are evicted.

    Several processes may use one folder. The limit must cover all files in use and all prefetched files. Otherwise
    files are fetched repeatedly.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        *,
        attempts: int = 5,
        stall_s: float = 30.0,
        back_off_s: float = 1.0,
        is_private: bool = False,
    ) -> None:
        """`is_private`: the folder must belong to this user, since others may write beside it."""
        self.folder, self.limit_bytes, self.is_private = Path(folder), limit_bytes, is_private
        self.attempts, self.stall_s, self.back_off_s = attempts, stall_s, back_off_s

    def read(self, url: str, check: Callable[[bytes], None] = lambda _: None) -> bytes:
        """The content of a small file whose hash is not known, such as dataset.json. Not cached. `check` raises
        WrongContent for other content."""
        stop = threading.Event()

        def once() -> bytes:
            content = bytearray()
            with closing(stream(url, self.stall_s, stop)) as source:
                for data in source:
                    content += data
                    if len(content) > SMALL_FILE_BYTES:
                        raise too_long(hide(url))
            if not content:
                raise WrongContent("the answer is empty")
            check(bytes(content))
            return bytes(content)

        return self._try_often(url, once, stop)

    def fetch(self, file: RemoteFile) -> Path:
        """A local file with that content. Another process may evict it at any time: see `open`."""
        return self._fetch(file, threading.Event(), wait=True)

    def open(self, file: RemoteFile) -> BinaryIO:
        """Fetch and open a file. The open file stays readable if it is evicted. If it is evicted before it is opened,
        it is fetched again."""
        while True:
            with suppress(FileNotFoundError):
                return open(self.fetch(file), "rb")

    def prefetch(self, file: RemoteFile, stop: threading.Event) -> None:
        """Fetch a file without messages, unless another process is fetching it. Raises an exception if it fails or if
        `stop` is set.

        The file's lock is released between tries. A fetch that needs the file now can then take over, and it reports
        errors.
        """
        self._try_often(file.url, lambda: self._fetch(file, stop, wait=False), stop, is_awaited=False)

    def path_of(self, file: RemoteFile) -> Path:
        """The path of the file in the cache, whether or not it exists."""
        name = re.sub(r"[^\w.+-]", "_", base_name(file.url), flags=re.ASCII)[-100:]
        if name.endswith((PART, LOCK)):
            name += "_"
        return self.folder / f"{file.sha256[:16].lower()}-{name}"

    def discard(self, path: Path, seen: os.stat_result | None = None) -> None:
        """Remove a damaged file from the cache, so that the next access fetches it again.

        `seen` is the status of the damaged file. If it is given and another process has replaced the file already, the
        file stays.
        """
        assert path.parent == self.folder, path
        with suppress(FileNotFoundError):
            if seen is None or os.path.samestat(seen, path.stat()):
                path.unlink()

    def check_room(self, file: RemoteFile) -> None:
        """Raise UserError if the file is larger than the cache."""
        if file.size_bytes > self.limit_bytes:
            raise UserError(
                f"{hide(file.url)}: has {file.size_bytes:,} bytes, and the cache {self.folder} may hold "
                f"{self.limit_bytes:,}; raise data.cache_gb, best to several times the size of a file"
            )

    @property
    def patience_s(self) -> float:
        """The longest time that a fetch takes if every try fails."""
        return self.attempts * self.stall_s + JITTER[1] * self.back_off_s * (2 ** (self.attempts - 1) - 1)

    def size_bytes(self) -> int:
        """The size of the cache, including the space that running downloads have reserved."""
        with _locked(self.folder / EVICT):
            return sum(size for _, size, _ in self._files())

    def _fetch(self, file: RemoteFile, stop: threading.Event, wait: bool) -> Path:
        """The local file. Without `wait`, it may still be missing, because another process is fetching it."""
        path = self.path_of(file)
        try:
            if self._mark_used(path, file.size_bytes):
                return path
            self.check_room(file)
            self._make_folder()  # again, since some systems clean /tmp during a run
            with _locked(path, wait=wait) as mine:
                if not mine or self._mark_used(path, file.size_bytes):
                    return path

                def once() -> None:
                    self._make_folder()
                    try:
                        self._download(file, path, stop)
                    except FileNotFoundError:
                        raise TryFailed(f"the cache {self.folder} was removed meanwhile") from None

                if wait:
                    self._try_often(file.url, once, stop)
                else:
                    once()
        except OSError as error:
            raise UserError(
                f"{path}: the cache cannot be used ({error}); point data.cache_dir at a folder of your own",
                exit_code=code_of(error),
            ) from error
        return path

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700 if self.is_private else 0o777, parents=True, exist_ok=True)
        if self.is_private:
            status = self.folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                raise UserError(f"{self.folder}: is not a folder of this user; point data.cache_dir at one")

    def _mark_used(self, path: Path, size_bytes: int) -> bool:
        """Mark a file as the most recently used one; returns whether it is there."""
        try:
            if path.stat().st_size != size_bytes:
                self.discard(path)
                return False
            now_ns = time.time_ns()  # finer than the kernel's time stamps, and comparable between processes
            os.utime(path, ns=(now_ns, now_ns))
        except FileNotFoundError:
            return False
        return True

    def _download(self, file: RemoteFile, path: Path, stop: threading.Event) -> None:
        """Try once to download a file whose lock is held. On a full disk, evict the file's size and try once more."""
        for again in (True, False):
            try:
                return self._write(file, path, stop)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                with _locked(self.folder / EVICT):
                    held = sum(size for _, size, _ in self._files())
                    if again:
                        self._evict(held - file.size_bytes)
                        continue
                free = shutil.disk_usage(self.folder).free
                raise UserError(
                    f"{self.folder}: the disk is full: {file.size_bytes:,} bytes of {hide(file.url)} cannot be stored, "
                    f"{free:,} bytes are free, the cache holds {held:,}. Free space or inodes (df -i), or set "
                    "data.cache_dir to another disk",
                    exit_code=EXIT_STORAGE,
                ) from error

    def _write(self, wanted: RemoteFile, path: Path, stop: threading.Event) -> None:
        """Write the file. The .part file gets its final length at once, so that its space counts as used."""
        part, size_bytes = path.with_name(path.name + PART), wanted.size_bytes
        digest, written = hashlib.sha256(), 0
        try:
            with open(part, "wb") as file, closing(stream(wanted.url, self.stall_s, stop, size_bytes)) as source:
                while not self._reserve(file, size_bytes):
                    if stop.wait(ROOM_POLL_S):  # running downloads hold the space; they end in any case
                        raise Stopped
                for data in source:
                    written += len(data)
                    if written > size_bytes:
                        raise WrongContent(f"sends more than the {size_bytes:,} bytes expected")
                    file.write(data)
                    digest.update(data)
                if written != size_bytes:
                    raise WrongContent(f"ended at {written:,} of {size_bytes:,} bytes")
                got, expected = digest.hexdigest(), wanted.sha256.lower()
                if got != expected:
                    raise WrongContent(f"sha256 of the {written:,} bytes differs: {got}, not {expected}")
                file.flush()
                os.fsync(file.fileno())  # if the name survives a power failure, so must the content
            with _locked(self.folder / EVICT):  # so that sums of sizes count the file once
                self._mark_used(part, size_bytes)
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, file: BinaryIO, size_bytes: int) -> bool:
        """Evict files until the .part file can have this length, and extend it. Returns False if the space is taken by
        other downloads."""
        with _locked(self.folder / EVICT):
            if not self._evict(self.limit_bytes - size_bytes):
                return False
            os.ftruncate(file.fileno(), size_bytes)
            return True

    def _files(self) -> list[tuple[int, int, Path]]:
        """Time of last use, size and path of all files in the cache, including .part files."""
        files = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if CACHED.fullmatch(entry.name):
                        stat = entry.stat()
                        files.append((stat.st_mtime_ns, stat.st_size, Path(entry.path)))
        return files

    def _evict(self, keep_bytes: int) -> bool:
        """Evict until at most `keep_bytes` remain: first .part files of killed processes, then the least recently used
        files. Returns whether that was possible."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files, key=lambda file: not file[2].name.endswith(PART)):
            if total <= keep_bytes:
                break
            if path.name.endswith(PART):
                with _locked(path.with_name(path.name.removesuffix(PART)), wait=False) as stale:
                    if not stale:
                        continue
                    path.unlink(missing_ok=True)
            else:
                path.unlink(missing_ok=True)  # readers that have it open can continue
            total -= size
        return total <= keep_bytes

    def _try_often(self, url: str, once: Callable[[], T], stop: threading.Event, *, is_awaited: bool = True) -> T:
        """Call `once` until it succeeds, with back-off, `attempts` times at most. If `is_awaited`, failures are
        reported on standard error."""
        reasons: list[str] = []
        wrong, tries = True, self.attempts
        while len(reasons) < tries:
            began, asked_s = time.monotonic(), 0.0
            try:
                with _saying_if_slow(hide(url)) if is_awaited else nullcontext():
                    return once()
            except TryFailed as failed:
                reasons.append(str(failed))
                asked_s = failed.retry_after_s
                wrong = wrong and isinstance(failed, WrongContent)
            tries = min(self.attempts, CERTAIN_AFTER) if wrong else self.attempts  # wrong content is not an outage
            if len(reasons) < tries:
                # What a server asks for (Retry-After) is granted up to the time that a try may take: see `patience_s`.
                granted_s = min(asked_s, self.stall_s - (time.monotonic() - began))
                pause_s = self._pause_s(len(reasons)) + max(0.0, granted_s)
                if is_awaited:
                    next_one = f"the next one comes in {pause_s:.1f} s"
                    line = f"{hide(url)}: try {len(reasons)} of {tries} failed ({reasons[-1]}); {next_one}"
                    print(line, file=sys.stderr, flush=True)
                if stop.wait(pause_s):
                    raise Stopped
        numbered = "; ".join(f"{number}: {reason}" for number, reason in enumerate(reasons, start=1))
        problem = (
            f"{hide(url)}: could not be fetched in {counted(len(reasons), 'try')} ({numbered}). Check the address, "
            f"the permissions and the network of this machine, then start again: fetched files are kept. If size or "
            f"sha256 differ each time, the file there is not the one that dataset.json names: upload it again"
        )
        if wrong:
            raise WrongContentError(problem)
        raise UserError(problem, exit_code=EXIT_CRASHED)  # launchers restart the run

    def _pause_s(self, failed: int) -> float:
        """Seconds to wait after this number of failed tries. The mean doubles each time."""
        return self.back_off_s * 2 ** (failed - 1) * _kernel_random.uniform(*JITTER)

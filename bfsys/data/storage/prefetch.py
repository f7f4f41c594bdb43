"""Remote files are fetched before they are needed, in threads of the process that will read them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

from bfsys.data.storage.remote import Cache, RemoteFile


class Prefetcher:
    """Fetches files before they are needed, in daemon threads. The first `want` starts the threads, so none runs while
    loader processes are forked.

    Errors are ignored. The fetch that needs the file retries and reports its errors.
    """

    def __init__(self, cache: Cache, threads: int = 2, queue_limit: int = 1000) -> None:
        self._cache, self._threads_wanted, self._queue_limit = cache, threads, queue_limit
        self._queue: deque[RemoteFile] = deque()
        self._wanted: set[str] = set()  # sha256 of files that are queued or being fetched
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def want(self, files: Iterable[RemoteFile]) -> None:
        """Add files to the queue. If it is full, files are fetched when they are needed."""
        with self._changed:
            for file in files:
                if self._stop.is_set() or len(self._queue) >= self._queue_limit:
                    break
                if file.sha256 not in self._wanted:
                    self._wanted.add(file.sha256)
                    self._queue.append(file)
            self._changed.notify_all()
            while self._queue and len(self._threads) < self._threads_wanted:
                thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
                self._threads.append(thread)
                thread.start()

    def close(self) -> None:
        """Stop at once, and kill running downloads."""
        with self._changed:
            self._stop.set()
            self._queue.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=10)  # a disk that hangs must not block the end of the run

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stop.is_set())
                if self._stop.is_set():
                    return
                file = self._queue.popleft()
            with suppress(Exception):
                self._cache.prefetch(file, self._stop)
            with self._changed:
                self._wanted.discard(file.sha256)

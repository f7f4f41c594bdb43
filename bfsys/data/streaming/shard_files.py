"""The shards of a reader as open files, and files read from them intact.

An error of a disk or a server is retried. After that, it makes a file bad only if it says something about the content
of the shard. Access that is denied and servers that are away end the run instead.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence

import numpy as np
import xxhash

from bfsys.data.storage.remote import WrongContentError
from bfsys.data.storage.shards import Split
from bfsys.errors import DENIED_ERRNOS, EXIT_CRASHED, OUTAGE_ERRNOS, SHORTAGE_ERRNOS, UserError
from bfsys.process import open_files_limit

# Shards that a reader keeps open at a time. The limit is also a third of the files that the process may open, since it
# may have a reader for evaluation too. Each lane reads from the shards of its block in turn, and opening a shard again
# is a request to the server of a network file system.
OPEN_SHARDS = 4096
# Seconds before each retry, for transient errors of a network file system.
RETRY_AFTER_S = (0.1, 0.5, 2.0, 10.0)


class BadFileError(Exception):
    """A file that cannot be read intact; the argument is the reason."""


class ShardFiles:
    """The shards of some splits. Source s is the split s."""

    def __init__(self, splits: Sequence[Split]) -> None:
        self._splits = splits
        self.descriptors: dict[tuple[int, int], int] = {}  # by source and shard; the first opened is the first closed
        # Shards that cannot be fetched, with the reason, and shards of which a sample could not be read in any retry.
        # They are recorded because retries take long, and a shard has thousands of samples.
        self._lost: dict[tuple[int, int], str] = {}
        self._failing: set[tuple[int, int]] = set()

    def open(self, source: int, shard: int) -> int:
        """Descriptor of a shard; raises OSError, or UserError if it cannot be fetched."""
        descriptor = self.descriptors.get((source, shard))
        if descriptor is not None:
            return descriptor
        if (source, shard) in self._lost:
            raise WrongContentError(self._lost[source, shard])
        for one in list(self.descriptors) if self._splits[source].dataset.cache else ():
            if os.fstat(self.descriptors[one]).st_nlink == 0:  # evicted; while it is open, it still uses disk space
                self._forget(*one)
        if len(self.descriptors) >= max(1, min(OPEN_SHARDS, open_files_limit() // 3)):
            os.close(self.descriptors.pop(next(iter(self.descriptors))))
        try:
            descriptor = self.descriptors[source, shard] = self._splits[source].open_shard(shard)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            raise UserError(
                f"{self._splits[source].dataset.shown}: too many open files: this process may have "
                f"{open_files_limit():,}, and {len(self.descriptors):,} are shards; raise the limit (ulimit -n 65536)"
            ) from None
        except WrongContentError as error:
            if not self._splits[source].dataset.is_reachable:
                text = f"{error}; its dataset.json cannot be fetched either: start again when its server is back"
                raise UserError(text, exit_code=EXIT_CRASHED) from None
            self._lost[source, shard] = str(error)
            raise
        return descriptor

    def read(self, source: int, shard: int, offset: int, length: int, checksum: int) -> np.ndarray:
        """The bytes of a file, uint8 [length]. Raises BadFileError, and UserError if the reason lies outside the
        file."""
        content = np.empty(length, np.uint8)
        problem, may_refetch = "", True
        waits_s = (0.0,) if (source, shard) in self._failing else (0.0, *RETRY_AFTER_S)
        for wait_s in waits_s:
            time.sleep(wait_s)
            try:
                got = _read_at(self.open(source, shard), content.data, offset)
            except FileNotFoundError as error:
                self._check_access(source, shard, error)
                raise BadFileError("its shard is missing") from None
            except WrongContentError as error:
                raise BadFileError(f"its shard could not be fetched intact: {error}") from None
            except OSError as error:
                problem = f"cannot be read: {error.strerror}"
                if wait_s == waits_s[-1]:
                    self._check_access(source, shard, error)
                    self._failing.add((source, shard))
                self._refetch(source, shard)
                continue
            if got == length and xxhash.xxh3_64_intdigest(content.data) == checksum:
                return content
            problem = f"ends {length - got:,} bytes early" if got < length else "has a checksum mismatch"
            if not may_refetch or not self._refetch(source, shard):
                break
            may_refetch = False
        raise BadFileError(problem)

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()

    def _check_access(self, source: int, shard: int, error: OSError) -> None:
        """Raise UserError if an error says nothing about the content of a shard, because access is denied or a file
        server is away. Otherwise intact samples would be recorded as bad, and the weights would depend on an outage."""
        dataset, file = self._splits[source].dataset, self._splits[source].shards[shard].file
        text = f"{dataset.shown}: {file} cannot be read: {error.strerror}"
        if error.errno in DENIED_ERRNOS:
            raise UserError(f"{text}; fix this, and start again") from None
        if error.errno in OUTAGE_ERRNOS | SHORTAGE_ERRNOS or not dataset.is_reachable:
            text += "; start again when the server or this machine has recovered"
            raise UserError(text, exit_code=EXIT_CRASHED) from None

    def _forget(self, source: int, shard: int) -> None:
        descriptor = self.descriptors.pop((source, shard), None)
        if descriptor is not None:
            os.close(descriptor)

    def _refetch(self, source: int, shard: int) -> bool:
        """Remove a damaged copy of a remote shard from the cache, so that the next try fetches it again. Returns False
        if there is none."""
        descriptor = self.descriptors.get((source, shard))
        dropped = descriptor is not None and self._splits[source].drop_shard(shard, descriptor)
        self._forget(source, shard)
        return dropped


def _read_at(descriptor: int, content: memoryview, offset: int) -> int:
    """Fill `content` from an offset of a file. Returns the number of bytes read. One `preadv` reads at most 2 GiB."""
    got = 0
    while got < len(content) and (part := os.preadv(descriptor, [content[got:]], offset + got)):
        got += part
    return got

"""Slots of anonymous shared memory, in which loader workers pass micro-batches without a copy.

The mapping has no name: the kernel frees it with the last process that has it, also after SIGKILL. (Named segments of
other loaders stay in /dev/shm, and some refuse to start if such segments exist.) Processes must be forked to inherit
it.
"""

from __future__ import annotations

import mmap
import weakref

import numpy as np


class Ring:
    """Slots of shared memory. The training process reserves a slot for a request, and a worker fills it. The slot is
    free again when no array refers to its content."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        """Only touched memory is allocated, so slots may be large."""
        self.slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, slots * self.slot_bytes)
        self._in_use: list[weakref.ref | bool] = [False] * slots

    def reserve(self) -> int | None:
        """A free slot, or None."""
        for slot, use in enumerate(self._in_use):
            if use is False or (isinstance(use, weakref.ref) and use() is None):
                self._in_use[slot] = True
                return slot
        return None

    def fill(self, slot: int, start: int, size_bytes: int) -> np.ndarray:
        """uint8 [size_bytes], starting at byte `start` of a slot, for a worker to write into."""
        return np.frombuffer(self._memory, np.uint8, size_bytes, slot * self.slot_bytes + start)

    def release(self, slot: int) -> np.ndarray:
        """The content of a filled slot: uint8 [slot_bytes]. The slot becomes free when this array and all its views are
        deleted."""
        content = self.fill(slot, 0, self.slot_bytes)
        self._in_use[slot] = weakref.ref(content)
        return content

"""Slots of anonymous shared memory, through which loader workers hand micro-batches over.

The mapping has no name: it vanishes with the last process that has it, also after SIGKILL. (Named segments of
other loaders stay in /dev/shm and some refuse to start beside them.) Processes must be forked to inherit it.
"""

from __future__ import annotations

import mmap

import numpy as np


class Ring:
    """Request n uses slot n % slots: with one slot more than requests under way, none is overwritten unread."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        """Memory is taken as it is touched, so slots may be made large."""
        self.slots = slots
        self.slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, self.slots * self.slot_bytes)

    def fits(self, size_bytes: int) -> bool:
        return size_bytes <= self.slot_bytes

    def buffer(self, request: int, size_bytes: int) -> np.ndarray:
        """uint8 [size_bytes] in the slot of a request; memory of its own for what does not fit."""
        if not self.fits(size_bytes):
            return np.empty(size_bytes, np.uint8)
        return np.frombuffer(self._memory, np.uint8, size_bytes, request % self.slots * self.slot_bytes)

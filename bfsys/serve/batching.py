"""Micro-batches of the files of concurrent requests: one thread computes, and takes waiting files up to a budget.

Ragged batches need no padding, so files of any lengths may share one. The thread never waits for a batch to fill.
While it computes, the next batch gathers, and a single request is computed at once. Rejected alternative: a waiting
time of some milliseconds, which delays every request of an idle service and gains nothing on a busy one.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Worker(Generic[Item, Answer]):
    """A daemon thread with a queue. Items that are cancelled while they wait are dropped.

    `compute` returns an answer for each of several items. If it raises, each item is computed alone, so that one item
    does not make others fail.
    """

    def __init__(
        self, compute: Callable[[list[Item]], Sequence[Answer]], cost: Callable[[Item], int], budget: int
    ) -> None:
        """Items are computed together if their total cost is at most `budget`. An item that costs more is alone."""
        self._compute, self._cost, self._budget = compute, cost, budget
        self._queue: deque[tuple[Item, Future[Answer]]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="bfsys-serve", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def answers(self, items: Sequence[Item]) -> list[Answer | BaseException]:
        """Return the answer to each item, or its exception. Cancelling this call removes the items from the queue."""
        futures: list[Future[Answer]] = [Future() for _ in items]
        with self._changed:
            self._queue.extend(zip(items, futures, strict=True))
            self._changed.notify()
        return await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)

    def close(self, timeout_s: float) -> bool:
        """Drop the queue, and wait up to `timeout_s` for the current items. Returns whether the thread has ended."""
        with self._changed:
            self._is_closed = True
            self._queue.clear()
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while batch := self._next_batch():
            self._answer(batch)
            del batch  # else its files stay in memory until the next request

    def _next_batch(self) -> list[tuple[Item, Future[Answer]]]:
        """Wait for items. Returns an empty list after the worker is closed."""
        batch: list[tuple[Item, Future[Answer]]] = []
        spent = 0
        with self._changed:
            while not batch and not self._is_closed:
                while self._queue and (not batch or spent + self._cost(self._queue[0][0]) <= self._budget):
                    item, future = self._queue.popleft()
                    if future.set_running_or_notify_cancel():
                        batch.append((item, future))
                        spent += self._cost(item)
                if not batch and not self._is_closed:
                    self._changed.wait()
        return batch

    def _answer(self, batch: list[tuple[Item, Future[Answer]]]) -> None:
        try:
            answers = self._compute([item for item, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            answers = None  # computed below, because here the traceback still holds the memory of the failed batch
        if answers is None:
            for one in batch:
                self._answer([one])
        else:
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)

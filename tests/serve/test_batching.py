"""The worker computes items together, drops cancelled ones, and assigns errors to items."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from bfsys.serve.batching import Worker


class Held:
    """Computes when the test allows it, and records the items of each batch. Negative numbers fail."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go, self.started = threading.Event(), threading.Event()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.started.set()
        assert self.go.wait(900)
        if min(items) < 0:
            raise ValueError("negative")
        return [10 * item for item in items]


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def worker(held: Held) -> Iterator[Worker[int, int]]:
    """The cost of an item is its value. A batch may cost 10."""
    made: Worker[int, int] = Worker(held, abs, 10)
    yield made
    held.go.set()
    made.close(900)
    assert not made._thread.is_alive()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(900):
        while not condition():
            await asyncio.sleep(0.001)


def test_waiting_items_are_computed_together_up_to_the_budget(held: Held, worker: Worker[int, int]) -> None:
    async def ask() -> None:
        first = asyncio.create_task(worker.answers([1]))
        await until(held.started.is_set)
        others = [asyncio.create_task(worker.answers(items)) for items in ([4, 6], [3], [30], [1, 1])]
        await until(lambda: worker.waiting == 6)
        held.go.set()
        assert await first == [10]  # computed at once and alone
        assert await asyncio.gather(*others) == [[40, 60], [30], [300], [10, 10]]

    asyncio.run(ask())
    assert held.batches == [[1], [4, 6], [3], [30], [1, 1]]


def test_an_item_fails_alone(held: Held, worker: Worker[int, int]) -> None:
    async def ask() -> list:
        first = asyncio.create_task(worker.answers([1]))
        await until(held.started.is_set)
        others = [asyncio.create_task(worker.answers(items)) for items in ([2], [-2, 3])]
        await until(lambda: worker.waiting == 3)
        held.go.set()
        return [*await first, *await others[0], *await others[1]]

    *answers, failed, last = asyncio.run(ask())
    assert (answers, last) == ([10, 20], 30)
    assert isinstance(failed, ValueError)


def test_cancelled_items_are_not_computed(held: Held, worker: Worker[int, int]) -> None:
    async def ask() -> None:
        first = asyncio.create_task(worker.answers([1]))
        await until(held.started.is_set)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await worker.answers([2, 3])
        last = asyncio.create_task(worker.answers([4]))
        await until(lambda: worker.waiting == 3)
        held.go.set()
        assert [await first, await last] == [[10], [40]]

    asyncio.run(ask())
    assert held.batches == [[1], [4]]

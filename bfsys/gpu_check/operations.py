"""Counts for a part of a step: PyTorch's operations, and waits of the host."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bfsys.engine import import_deepspeed

# Operations that make a GPU's host wait, since their result, or its size, is needed on the CPU.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")
ALLOCATING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class CountedOperations(TorchDispatchMode):
    """Counts operations by name while it is entered, including those of a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.all: Counter[str] = Counter()
        self.launching: Counter[str] = Counter()
        """The operations that are neither views nor allocations: on a GPU, each launches at least one kernel or copy.
        """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        self.all[name] += 1
        if not func.is_view and name not in ALLOCATING and name != "detach":
            self.launching[name] += 1
        return func(*args, **(kwargs or {}))


def count_waits(run: Callable[[], object], device: torch.device) -> Counter[str]:
    """Count how often the host waits for the device in `run`, by the operation that waits.

    On a GPU, PyTorch reports the waits. On a CPU nothing waits, so operations that would wait on a GPU are counted.
    """
    waits: Counter[str] = Counter()
    with _counting_synchronize(waits):
        if device.type != "cuda":
            with CountedOperations() as counted:
                run()
            waits.update({name: counted.all[name] for name in WAITING if counted.all[name]})
            return waits
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            waits[f"{warning.filename.rpartition('/')[2]}:{warning.lineno}"] += 1
    return waits


@contextmanager
def _counting_synchronize(waits: Counter[str]) -> Iterator[None]:
    """Count DeepSpeed's calls of its accelerator's `synchronize`, which does nothing on a CPU."""
    accelerator = import_deepspeed().accelerator.get_accelerator()
    plain = type(accelerator).synchronize

    def synchronize(self: object, *args: object) -> None:
        waits["synchronize"] += 1
        plain(self, *args)

    type(accelerator).synchronize = synchronize
    try:
        yield
    finally:
        type(accelerator).synchronize = plain

"""The checks of `bfsys check-gpu`, in their order.

Each check is a module of this folder with `check(device, seconds) -> list[Finding]`. `seconds` is the approximate time
for work that can be shortened. Importing this table is quick.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    module: str
    """The name of its module in this folder."""
    share: float
    """The share of --seconds for the part of the check that can be shortened."""
    limit_s: float
    """A check that takes longer than this counts as hung."""
    is_collective: bool = False
    """Whether the check is collective over all ranks of a launcher. In other checks each rank uses only its GPU."""


CHECKS = {
    "environment": Check("environment", 0.05, 120),
    "all-reduce": Check("all_reduce", 0.1, 180, is_collective=True),
    "kernels": Check("kernels", 0.35, 600),
    "engine": Check("engine_waits", 0.1, 300),
    "step": Check("step", 0.2, 300),
    "training": Check("short_training", 0.2, 600),
}

"""The order in which the sources of a mixture take turns.

The two smallest sources are merged into one, again and again, until one is left (a Huffman tree). From the root down,
the draws of a pair are divided between its two sources in exact proportion. After any number of draws each source is
therefore within two samples of its share, for any number of sources.

Rejected alternatives: a random draw of the source, as in other loaders, because shares then deviate by sqrt(n) samples
and a resume needs the state of a random generator; and drawing the i-th sample of a source of share w at time
(i + 1/2) / w, because many sources of equal share are then due at once and delay the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

# Exponent of the sample counts, by the names of the rules in a config.
EXPONENTS = {"weights": 0.0, "sqrt": 0.5, "proportional": 1.0}

# Draws after which the pattern repeats. Shares are rounded to 1 / PERIOD.
PERIOD = 65_536


class Mixture:
    """An endless, periodic sequence of sources. `counts` gives the draws of each source up to any point."""

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights`: one positive number per source, in any unit."""
        share = np.asarray(weights, np.float64)
        if share.size == 0 or not np.all(np.isfinite(share)) or np.any(share <= 0):
            raise ValueError(f"weights must be positive numbers, got {list(weights)}")
        per_period = _round_to_sum(share / share.sum() * PERIOD, PERIOD)
        counts = {2 * share.size - 2: np.arange(PERIOD + 1)}  # counts of the root
        for pair, first, second, first_share, both_shares in reversed(_pairs(per_period.tolist())):
            counts[first] = (2 * counts[pair] * first_share + both_shares) // (2 * both_shares)  # rounded to nearest
            counts[second] = counts.pop(pair) - counts[first]
        self._counts = np.stack([counts[s] for s in range(share.size)], axis=-1)

    @property
    def shares(self) -> np.ndarray:
        """float64 [sources]; they sum to one."""
        return self._counts[-1] / PERIOD

    def counts(self, draws: np.ndarray | int) -> np.ndarray:
        """Samples of each source among the first `draws`: int64 [..., sources]."""
        periods, rest = np.divmod(np.asarray(draws, np.int64), PERIOD)
        return periods[..., None] * self._counts[-1] + self._counts[rest]

    def places(self, source: int, nth: np.ndarray) -> np.ndarray:
        """The places in the sequence of the `nth` draws of a source: int64 [n] -> int64 [n]."""
        periods, rest = np.divmod(nth, self._counts[-1, source])
        return periods * PERIOD + np.searchsorted(self._counts[1:, source], rest, side="right")


def mixture_weights(rule: str | float, weights: Sequence[float], samples: Sequence[int]) -> np.ndarray:
    """Weights of the sources for a `Mixture`: float64 [sources], w · n^(1/T) for a temperature T.

    `rule` is a name in EXPONENTS or T itself. T = 1 is proportional and 2 is the square root. A large T approaches the
    given weights.
    """
    exponent = EXPONENTS[rule] if isinstance(rule, str) else 1 / rule
    scaled = exponent * np.log(np.asarray(samples, np.float64))
    return np.asarray(weights, np.float64) * np.exp(scaled - scaled.max())  # n^20 would overflow


def _pairs(shares: Sequence[int]) -> list[tuple[int, int, int, int, int]]:
    """The inner nodes of the Huffman tree, leaves first: (number of the pair, its first member, its second member,
    share of the first, share of both).

    After two divisions, a member has at most half of the share. Each division adds a deviation of up to 1/2, and
    deviations shrink with the share on the way down. Their sum is at most 1/2 + 1/2 + 1/4 + 1/4 + … = 2.
    """
    heap = [(share, number) for number, share in enumerate(shares)]
    heapq.heapify(heap)
    made: list[tuple[int, int, int, int, int]] = []
    while len(heap) > 1:
        (first_share, first), (second_share, second) = sorted(
            (heapq.heappop(heap), heapq.heappop(heap)), key=lambda member: member[1]
        )
        made.append((len(shares) + len(made), first, second, first_share, first_share + second_share))
        heapq.heappush(heap, (first_share + second_share, len(shares) + len(made) - 1))
    return made


def _round_to_sum(values: np.ndarray, total: int) -> np.ndarray:
    """Integers >= 1 near `values` that sum to `total` (largest remainders are rounded up)."""
    floor = np.maximum(1, np.floor(values).astype(np.int64))
    missing = total - int(floor.sum())
    if missing >= 0:
        floor[np.argsort(floor - values, kind="stable")[:missing]] += 1
    else:  # tiny sources were raised to one draw; the largest source loses these draws
        floor[np.argmax(floor)] += missing
    return floor

"""In which order the sources of a mixture take turns.

Sources are interleaved in exact proportion: the i-th sample of a source of share w is due at time (i + 1/2) / w,
and samples are drawn in the order in which they are due. After any number of draws each source is within a few
samples of its share. Refused: drawing the source by chance, as other loaders do, whose shares wander by
sqrt(n) samples and whose resume needs the state of a random generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Exponent of the sample counts by the names that a config uses.
EXPONENTS = {"weights": 0.0, "sqrt": 0.5, "proportional": 1.0}

# Draws after which the pattern repeats. Shares are rounded to 1 / PERIOD.
PERIOD = 65_536


class Mixture:
    """Counts, at any point of the endless sequence of draws, how many fell on each source."""

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights`: one positive number per source, in any unit."""
        share = np.asarray(weights, np.float64)
        if share.size == 0 or not np.all(np.isfinite(share)) or np.any(share <= 0):
            raise ValueError(f"weights must be positive numbers, got {list(weights)}")
        per_period = _round_to_sum(share / share.sum() * PERIOD, PERIOD)
        source = np.repeat(np.arange(share.size), per_period)
        turn = np.concatenate([np.arange(n) for n in per_period])
        due = (turn + 0.5) / per_period[source]
        order = source[np.argsort(due, kind="stable")]
        self._counts = np.zeros((PERIOD + 1, share.size), np.int64)
        np.cumsum(order[:, None] == np.arange(share.size), axis=0, out=self._counts[1:])

    @property
    def shares(self) -> np.ndarray:
        """float64 [sources]; they sum to one."""
        return self._counts[-1] / PERIOD

    def counts(self, draws: np.ndarray | int) -> np.ndarray:
        """Samples of each source among the first `draws`: int64 [..., sources]."""
        periods, rest = np.divmod(np.asarray(draws, np.int64), PERIOD)
        return periods[..., None] * self._counts[-1] + self._counts[rest]


def mixture_weights(rule: str | float, weights: Sequence[float], samples: Sequence[int]) -> np.ndarray:
    """Weights of the sources for a `Mixture`: float64 [sources], w · n^(1/T) for a temperature T.

    `rule` is a name of EXPONENTS or T itself: 1 is proportional, 2 the square root, and large ones come near the
    given weights alone.
    """
    exponent = EXPONENTS[rule] if isinstance(rule, str) else 1 / rule
    scaled = exponent * np.log(np.asarray(samples, np.float64))
    return np.asarray(weights, np.float64) * np.exp(scaled - scaled.max())  # n^20 would overflow


def _round_to_sum(values: np.ndarray, total: int) -> np.ndarray:
    """Integers >= 1 near `values` that sum to `total` (largest remainders are rounded up)."""
    floor = np.maximum(1, np.floor(values).astype(np.int64))
    missing = total - int(floor.sum())
    if missing >= 0:
        floor[np.argsort(floor - values, kind="stable")[:missing]] += 1
    else:  # tiny sources were lifted to one draw: the largest source gives it up
        floor[np.argmax(floor)] += missing
    return floor

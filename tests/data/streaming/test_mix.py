from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfsys.data.streaming.mix import PERIOD, Mixture

weights = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)


@given(weights, st.integers(0, 10 * PERIOD))
def test_counts_follow_the_shares_closely(weights: list[float], draws: int) -> None:
    mixture = Mixture(weights)
    counts = mixture.counts(draws)
    assert counts.sum() == draws
    assert np.all(np.abs(counts - draws * mixture.shares) <= 1 + len(weights) / 2)
    assert np.allclose(mixture.shares, np.array(weights) / sum(weights), atol=len(weights) / PERIOD)


@given(weights, st.integers(0, 3 * PERIOD))
def test_each_draw_is_one_sample_of_one_source(weights: list[float], draws: int) -> None:
    before, after = Mixture(weights).counts(np.array([draws, draws + 1]))
    assert sorted((after - before).tolist()) == [0] * (len(weights) - 1) + [1]


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0], [float("nan")]])
def test_weights_that_are_not_positive_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        Mixture(weights)

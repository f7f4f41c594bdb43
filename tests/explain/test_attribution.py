"""Both methods find evidence that was planted, and agree with arithmetic."""

from __future__ import annotations

import doctest
import itertools

import numpy as np
import pytest
import torch

from bfsys.batch import ByteBatch, Sample
from bfsys.explain import attribution
from bfsys.explain.attribution import (
    WINDOWS,
    Classifier,
    integrated_gradients,
    log_odds,
    occlusion,
    windows_of,
)
from bfsys.model.byteformer import ByteFormer
from bfsys.model.sizes import architecture
from tests.explain.tiny import BUDGET, trained

PLACE = slice(72, 80)
LENGTH = 160


def planted(count: int, seed: int) -> tuple[list[np.ndarray], list[int]]:
    """Files of random bytes. The class decides whether the bytes at PLACE are low or high."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count).tolist()
    files = [rng.integers(0, 256, LENGTH, dtype=np.uint8) for _ in labels]
    for data, label in zip(files, labels, strict=True):
        data[PLACE] = rng.integers(0, 64, 8) + 160 * label
    return files, labels


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return trained(*planted(4000, 0))


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(attribution).failed == 0


@pytest.mark.parametrize("length", [1, 7, 64, 65, 1000, 4096, 100_003])
def test_windows_cover_a_file(length: int) -> None:
    windows = windows_of(length, 8)
    assert windows[0][0] == 0
    assert windows[-1][1] == length
    assert all(a[1] == b[0] and (a[1] - a[0]) % 8 == 0 for a, b in itertools.pairwise(windows))
    assert len(windows) <= WINDOWS


def test_both_methods_find_planted_evidence(classifier: Classifier) -> None:
    files, labels = planted(60, 1)
    answers = classifier.log_probabilities(files).argmax(1)
    assert (answers == labels).mean() > 0.95
    shares = []
    for i in range(5):
        references = [data for data, label in zip(files, labels, strict=True) if label != labels[i]][:2]
        windows = windows_of(LENGTH, 4)
        evidence = occlusion(classifier, files[i], references, labels[i], windows)
        gradients, error = integrated_gradients(classifier, files[i], references, labels[i])
        assert error < 0.05
        first, end = windows[int(evidence.argmax())]
        assert first < PLACE.stop
        assert end > PLACE.start
        assert PLACE.start <= gradients.argmax() < PLACE.stop
        inside = sum(max(0, e) for (a, b), e in zip(windows, evidence, strict=True) if a < 80 and b > 72)
        shares.append(
            (inside / evidence.clip(min=0).sum(), gradients[PLACE].clip(min=0).sum() / gradients.clip(min=0).sum())
        )
    assert np.mean(shares, axis=0).min() > 0.5, shares


@pytest.mark.parametrize("mode", ["masked", "as_released"])
@pytest.mark.parametrize("length", [19, 160, 401])
def test_attributions_sum_to_the_difference_of_log_odds(
    mode: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attribution, "CHUNK_TOKENS", 7)
    torch.manual_seed(1)
    shape = architecture("custom", dim=16, layers=3, heads=2, kernel=8, window=16, shift=8, max_tokens=64)
    network = ByteFormer(shape, 4, mode, activation_checkpointing=True).eval()
    rng = np.random.default_rng(0)
    data, *references = (rng.integers(0, 256, length, dtype=np.uint8) for _ in range(3))
    gradients, error = integrated_gradients(Classifier(network, 300), data, references, 2)
    assert error < 1e-3
    with torch.no_grad():
        odds = log_odds(network(ByteBatch.from_samples([Sample("", one) for one in (data, *references)])), 2).numpy()
    assert gradients.sum() == pytest.approx(odds[0] - odds[1:].mean(), abs=2e-4)
    assert all(p.grad is None for p in network.parameters())
    same, _ = integrated_gradients(Classifier(network, 300), data, [data], 2)
    assert not same.any()


def test_an_abrupt_change_along_the_path_is_not_missed(classifier: Classifier) -> None:
    files, labels = planted(40, 5)
    data, reference = files[labels.index(0)], files[labels.index(1)]
    gradients, _ = integrated_gradients(classifier, data, [reference], 0)
    with torch.no_grad():
        batch = ByteBatch.from_samples([Sample("", one) for one in (data, reference)])
        ours, theirs = log_odds(classifier.network(batch), 0).tolist()
    assert ours - theirs > 5
    assert gradients.sum() == pytest.approx(ours - theirs, rel=0.03)


def test_a_byte_that_no_reference_changes_has_no_evidence(classifier: Classifier) -> None:
    (data, other), _ = planted(2, 3)
    other[:40] = data[:40]
    assert not integrated_gradients(classifier, data, [other], 0)[0][:40].any()
    assert occlusion(classifier, data, [other], 0, [(0, 40)]) == pytest.approx(0, abs=1e-5)


def test_batches_do_not_change_answers(classifier: Classifier) -> None:
    files, _ = planted(9, 4)
    one_by_one = Classifier(classifier.network, 1).log_probabilities(files)
    np.testing.assert_allclose(Classifier(classifier.network, BUDGET).log_probabilities(files), one_by_one, atol=1e-5)


def test_one_class_has_no_rival() -> None:
    assert log_odds(torch.ones(3, 1), 0).tolist() == [0, 0, 0]

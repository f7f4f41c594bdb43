"""The reference agrees with the published implementation's numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.model import vectors
from tests.model.reference import (
    MODES,
    PAD_ROW,
    ReferenceConfig,
    pad,
    random_weights,
    reference_activations,
    reference_logits,
    weight_shapes,
)
from tests.model.vectors import CASES, FILES, WITH_GRADIENTS, needs_vectors

SMALL = ReferenceConfig(
    dim=8,
    heads=2,
    kernel=4,
    window=4,
    shifts=(0, 2),
    merge=(True, False),
    max_tokens=64,
    classes=3,
)


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Compare. `tolerance` is absolute for values around 1, relative for larger ones."""
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@needs_vectors
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("file", FILES)
def test_logits_are_the_published_ones(file: str, case: str, mode: str) -> None:
    v = vectors.load(file)
    published = v.arrays[f"{case}/{mode}/logits64"]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        got = reference_logits(v.weights(dtype), v.config, v.x(case), mode)
        assert got.dtype == dtype
        assert_near(got.double(), published, tolerance)


@needs_vectors
@pytest.mark.parametrize("file", FILES)
def test_every_step_on_the_way_is_the_published_one(file: str) -> None:
    v = vectors.load(file)
    published = v.under("odd_counts/trace/")
    got = reference_activations(v.weights(torch.float32), v.config, v.x("odd_counts"), "released")
    assert set(published) == set(got) - {"logits"}
    for name, want in published.items():
        assert_near(got[name], want, 2e-5)


@needs_vectors
@pytest.mark.parametrize(("case", "mode"), WITH_GRADIENTS)
@pytest.mark.parametrize("file", FILES)
def test_gradients_are_the_published_ones(file: str, case: str, mode: str) -> None:
    v = vectors.load(file)
    weights = {name: w.requires_grad_() for name, w in v.weights(torch.float64).items()}
    F.cross_entropy(reference_logits(weights, v.config, v.x(case), mode), v.arrays[f"{case}/y"]).backward()
    published = v.under(f"{case}/{mode}/grad/")
    assert set(published) == set(weights)
    for name, want in published.items():
        scale = want.abs().max().clamp(min=1e-3)
        assert_near(weights[name].grad.float() / scale, want / scale, 1e-5)


@needs_vectors
@pytest.mark.parametrize("file", FILES)
def test_weights_have_the_published_names_and_shapes(file: str) -> None:
    v = vectors.load(file)
    assert weight_shapes(v.config) == {name: tuple(w.shape) for name, w in v.weights(torch.float32).items()}


def test_pad() -> None:
    assert pad([b"\x00\xff", b"a"], 1).tolist() == [[0, 255, -1], [97, -1, -1]]
    assert pad([b"ab"], 0).tolist() == [[97, 98]]


def test_random_weights_make_logits_that_depend_on_single_bytes() -> None:
    weights = random_weights(SMALL, seed=0)
    assert not weights["embeddings.weight"][PAD_ROW].any()
    for mode in MODES:
        logits = reference_logits(weights, SMALL, pad([b"hello, world", b"hello, World"], 4), mode)
        assert (logits[0] - logits[1]).abs().max() > 0.01


def test_only_the_intended_mode_is_indifferent_to_batch_padding() -> None:
    weights = random_weights(SMALL, seed=0)

    def change(mode: str) -> float:
        little, much = (reference_logits(weights, SMALL, pad([b"some bytes"], p), mode) for p in (4, 40))
        return (little - much).abs().max().item()

    assert change("intended") < 1e-12
    assert change("released") > 0.01


def test_the_reference_does_not_change_its_input() -> None:
    x = pad([b"some bytes"], 8)
    before = x.clone()
    reference_logits(random_weights(SMALL, seed=0), SMALL, x, "intended")
    assert torch.equal(x, before)

"""The stem: positions of files longer than their table, and smooth initial weights."""

from dataclasses import replace

import pytest
import torch

from bfsys.model.byteformer import ByteFormer
from bfsys.model.sizes import PAD_BYTE, architecture
from tests.model.reference import random_weights
from tests.model.test_byteformer import MODES, TINY, batch_of, build, random_files


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rows", "tokens"), [(300, 299), (300, 300), (300, 301), (300, 1000), (7, 30), (1, 9)])
def test_longer_files_repeat_the_second_half_of_the_positions(mode: str, rows: int, tokens: int) -> None:
    """Logits and gradients equal those of a model whose table contains the repeated positions."""
    weights = random_weights(replace(TINY, max_tokens=rows), seed=0)
    model = build(replace(TINY, max_tokens=rows), weights, mode)
    row_of = list(range(rows))
    while len(row_of) < tokens:
        row_of += range(rows - (rows + 1) // 2, rows)
    spelled_out = ByteFormer(replace(model.architecture, max_tokens=len(row_of)), TINY.classes, mode).double()
    positions = model.stem.positions.detach()[row_of]
    spelled_out.load_state_dict({**model.state_dict(), "stem.positions": positions})
    (file,) = random_files([2 * tokens + (2 if mode == "as_released" else 0)], seed=0)  # kernel 4, stride 2
    results = []
    for m in (model, spelled_out):
        logits = m(batch_of([b"abcdef", file]))
        logits.square().sum().backward()
        results.append((logits.detach(), m.stem.positions.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-10)
    wanted = torch.zeros_like(model.stem.positions).index_add(0, torch.tensor(row_of), results[1][1])
    torch.testing.assert_close(results[0][1], wanted, rtol=0, atol=1e-10)


def test_smooth_weights_have_their_scale_and_near_values_are_alike() -> None:
    torch.manual_seed(0)
    small = architecture("custom", kernel=8, window=8, max_tokens=500, shift=4, dim=64, layers=1, heads=2)
    smooth, published = (ByteFormer(small, 3, init=init).stem for init in ("smooth", "published"))
    for name, scale, tolerance in (("embedding", 1, 0.15), ("kernel", 1, 0.02), ("positions", 0.5**0.5, 0.02)):
        ours, theirs = getattr(smooth, name), getattr(published, name)
        assert ours.shape == theirs.shape
        norms = [value.square().mean().sqrt().item() for value in (ours, theirs)]
        assert norms[0] == pytest.approx(scale * norms[1], rel=tolerance)
    values = smooth.embedding[:PAD_BYTE]
    assert not smooth.embedding[PAD_BYTE].any()
    distance = [(values - values.roll(by, 0)).norm().item() for by in (1, 8, 32, 128)]
    assert distance == sorted(distance)
    assert distance[0] < 0.5 * distance[-1]
    assert (values[0] - values[255]).norm() < 0.5 * (values[0] - values[128]).norm(), "they lie on a circle"
    places = smooth.positions @ smooth.positions.T
    assert (places[200, 199] > places[200, 190]) & (places[200, 190] > places[200, 100])

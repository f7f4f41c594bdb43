"""The formulas count what PyTorch counts, and what is known of the published implementation."""

import timeit

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bfsys.batch import ByteBatch, Sample
from bfsys.model.byteformer import ByteFormer
from bfsys.model.flops import flops_per_step, published_flops
from bfsys.model.published_form import PublishedForm, pad
from bfsys.model.sizes import Architecture, architecture

CLASSES = 10


def random_files(lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, n, dtype=np.uint8) for n in lengths]


def batch_of(lengths: list[int]) -> ByteBatch:
    return ByteBatch.from_samples([Sample("", file) for file in random_files(lengths)])


def counted(model: torch.nn.Module, x: ByteBatch | torch.Tensor, backward: bool) -> int:
    """The operations that PyTorch counts."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(x)
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


def custom(shift: int, kernel: int = 4, max_tokens: int = 4096) -> Architecture:
    return architecture(
        "custom",
        dim=192,
        layers=4,
        heads=3,
        merge_after=(0, 1),
        kernel=kernel,
        shift=shift,
        max_tokens=max_tokens,
    )


@pytest.mark.parametrize("backward", [False, True])
def test_whole_windows_are_counted_as_pytorch_does(backward: bool) -> None:
    """Without shifts, lengths can be whole windows at every level. Then no slot is empty, and the counts are equal."""
    a, lengths = custom(shift=0), [2 * 128 * 4, 2 * 128 * 4 * 2]
    expected = counted(ByteFormer(a, CLASSES), batch_of(lengths), backward)
    assert flops_per_step(np.array(lengths), a, CLASSES, backward).matrix == pytest.approx(expected, rel=1e-9)


def test_shifted_windows_are_counted_as_pytorch_does() -> None:
    """A shift cuts one window of each file into two halves. Both are computed as whole windows, which adds 1 % here."""
    a, lengths = custom(shift=64), [2 * 2048]
    expected = counted(ByteFormer(a, CLASSES), batch_of(lengths), True)
    assert flops_per_step(np.array(lengths), a, CLASSES).matrix == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("length", [1, 2, 7, 129, 256, 1000])
def test_attention_is_counted_as_its_definition_says(length: int) -> None:
    a = architecture("custom", dim=8, layers=5, heads=2, kernel=4, window=16, shift=5, merge_after=(0, 2))
    tokens, pairs, rows, merged = -(-length // 2), 0, 0, 0
    for layer, shift in enumerate(a.shifts):
        window_of = [(t + (16 - shift if shift else 0)) // 16 for t in range(tokens)]
        pairs += sum(window_of.count(w) for w in window_of)
        rows += tokens
        if layer in a.merge_after:
            tokens = -(-tokens // 2)
            merged += tokens
    flops = flops_per_step(np.array([length]), a, CLASSES, backward=False)
    assert flops.scores == flops.values == 2 * pairs * 8
    assert (flops.qkv, flops.proj, flops.mlp) == (rows * 2 * 3 * 64, rows * 2 * 64, rows * 2 * 8 * 64)
    assert (flops.merges, flops.head) == (merged * 4 * 64, 2 * 8 * CLASSES)
    assert (flops.stem, flops.lookups) == (2 * 256 * 4 * 64, -(-length // 2) * 4 * 8)
    assert flops.total == flops.matrix + flops.lookups


def test_files_add_up_but_for_the_table() -> None:
    a, lengths = architecture("tiny", kernel=8), np.array([5, 1_000, 33_333, 64_058])
    together = flops_per_step(lengths, a, CLASSES)
    apart = [flops_per_step(lengths[i : i + 1], a, CLASSES) for i in range(4)]
    assert together.total - together.stem == sum(f.total - f.stem for f in apart)
    assert together.stem == apart[0].stem == 3 * 2 * 256 * 8 * 192**2


# -------------------------------------------------------------------------------------- the published implementation


@pytest.mark.parametrize(
    ("length", "kernel", "gmac", "stem_share"),
    [
        (150_668, 32, 23.68, 0.47),  # TIFF
        (48_564, 8, 19.37, 0.18),  # the average JPEG
        (48_564, 16, 11.57, 0.31),
        (48_564, 32, 7.70, 0.46),
        (64_058, 16, 15.18, 0.31),  # a second of sound in float32
        (64_058, 32, 10.05, 0.47),
        (32_044, 16, 7.69, 0.31),  # in int16
        (16_044, 4, 11.64, 0.10),  # in uint8
        (3_240, 4, 2.75, 0.09),  # MP3
    ],
)
def test_published_multiply_adds(length: int, kernel: int, gmac: float, stem_share: float) -> None:
    """The counts for one file equal those that a profiler reports for the released code."""
    classes = 1000 if length in (150_668, 48_564) else 12
    flops = published_flops(np.array([length]), architecture("tiny", kernel=kernel), classes, backward=False)
    assert flops.total / 2e9 == pytest.approx(gmac, abs=0.006)
    assert flops.stem / flops.total == pytest.approx(stem_share, abs=0.01)


@pytest.mark.parametrize("backward", [False, True])
def test_published_form_is_counted_as_pytorch_does(backward: bool) -> None:
    """The files are whole convolution windows, so the baseline's padding adds none. Other padding is counted."""
    a, lengths = custom(shift=64, kernel=8, max_tokens=400), [300, 4 * 400 - 4]
    x = pad(random_files(lengths), a)
    expected = counted(PublishedForm(a, CLASSES), x, backward)
    got = published_flops(np.array([x.shape[1]] * 2), a, CLASSES, backward).total
    assert got == pytest.approx(expected, rel=1e-6)


def test_counting_takes_no_time() -> None:
    """It takes 30 us on an idle machine; the bound allows for busy ones."""
    a, lengths = architecture("tiny", kernel=8), np.random.default_rng(0).integers(1_000, 60_000, 16)
    assert min(timeit.repeat(lambda: flops_per_step(lengths, a, 1000), number=100, repeat=10)) / 100 < 300e-6

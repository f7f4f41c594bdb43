"""ByteFormer on ragged batches: equal to the published numbers, to the padded reference, and to itself.

The chain of proof: published numbers = reference (test_reference.py); reference = model (here), on any
lengths, kernels, windows, shifts and mergings, values and gradients. Where single rows of the published
batches are free of what bfsys leaves out, the model is also compared with them directly.

All comparisons are in float64, where a wrong index cannot hide in rounding, and those with the published
numbers in float32 too.
"""

import random
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bfsys.batch import ByteBatch, Sample
from bfsys.errors import UserError
from bfsys.import_corenet import to_bfsys
from bfsys.model import byteformer
from bfsys.model.byteformer import ByteFormer
from bfsys.model.sizes import Architecture, architecture
from tests.model import vectors
from tests.model.reference import PAD, PAD_ROW, ReferenceConfig, pad, random_weights, reference_logits
from tests.model.vectors import CASES, FILES, load_corenet, needs_vectors

# Names of the two modes here and in the published numbers.
PUBLISHED_MODE = {"masked": "intended", "as_released": "released"}
MODES = tuple(PUBLISHED_MODE)

TINY = ReferenceConfig(  # has every mechanism at least once: a shift, odd counts before and after a merging
    dim=8,
    heads=2,
    kernel=4,
    window=8,
    shifts=(0, 3, 0, 5),
    merge=(True, True, False, True),
    max_tokens=300,
    classes=5,
)


def architecture_of(config: ReferenceConfig) -> Architecture:
    return Architecture(
        dim=config.dim,
        layers=config.layers,
        heads=config.heads,
        kernel=config.kernel,
        window=config.window,
        shifts=config.shifts,
        merge_after=tuple(layer for layer, merges in enumerate(config.merge) if merges),
        max_tokens=config.max_tokens,
    )


def build(config: ReferenceConfig, weights: dict[str, Tensor], mode: str) -> ByteFormer:
    """The real model with weights by CoreNet's names, in their precision."""
    model = ByteFormer(architecture_of(config), config.classes, mode=mode)
    model = model.to(weights["classifier.weight"].dtype)
    load_corenet(model, weights)
    return model


def batch_of(files: Sequence[bytes]) -> ByteBatch:
    return ByteBatch.from_samples(
        [Sample(key=str(i), data=np.frombuffer(file, np.uint8).copy()) for i, file in enumerate(files)]
    )


def random_files(lengths: Sequence[int], seed: int) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(n) for n in lengths]


def reference_answers(weights: dict[str, Tensor], config: ReferenceConfig, files: Sequence[bytes], mode: str) -> Tensor:
    """The expected logits [B, classes]: for files padded by a kernel, or for each file alone and unpadded."""
    if mode == "masked":
        return reference_logits(weights, config, pad(files, config.kernel), "intended")
    return torch.cat([reference_logits(weights, config, pad([f], 0), "released") for f in files])


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Compare. `tolerance` is relative to the largest expected value, or absolute if that is below 1."""
    scale = max(1.0, want.detach().abs().max().item())
    torch.testing.assert_close(got / scale, want / scale, rtol=0, atol=tolerance)


def assert_same_as_reference(
    config: ReferenceConfig, weights: dict[str, Tensor], files: Sequence[bytes], mode: str
) -> None:
    """Compare logits, and the gradients of all parameters for a loss that weights each logit differently."""
    weights = {name: w.clone().requires_grad_() for name, w in weights.items()}
    want = reference_answers(weights, config, files, mode)
    loss_weights = torch.linspace(-1, 2, want.numel(), dtype=want.dtype).view_as(want)
    (want * loss_weights).sum().backward()

    model = build(config, {name: w.detach() for name, w in weights.items()}, mode)
    got = model(batch_of(files))
    (got * loss_weights).sum().backward()

    assert_near(got, want, 1e-10)
    gradients = to_bfsys({name: w.grad for name, w in weights.items()})
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, gradients[name], 1e-10)
    assert not model.stem.embedding.grad[PAD_ROW].any()


# -------------------------------------------------------------------------------------- the published numbers


def comparable_rows(x: Tensor, kernel: int, mode: str) -> Tensor:
    """Rows of a published batch with logits that bfsys must reproduce, bool [B].

    masked: rows that are padded by at least a kernel; else the published convolution drops tokens with real bytes.
    as_released: rows without padding; else the published logits depend on the other rows.
    """
    padding = (x == PAD).sum(1)
    return padding >= kernel if mode == "masked" else padding == 0


@needs_vectors
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("file", FILES)
def test_logits_are_the_published_ones(file: str, mode: str) -> None:
    v = vectors.load(file)
    compared = 0
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model = build(v.config, v.weights(dtype), mode)
        for case in CASES:
            rows = comparable_rows(v.x(case), v.config.kernel, mode)
            files = [f for f, comparable in zip(v.files(case), rows, strict=True) if comparable]
            if files:
                with torch.no_grad():
                    got = model(batch_of(files))
                assert got.dtype == dtype
                want = v.arrays[f"{case}/{PUBLISHED_MODE[mode]}/logits64"][rows]
                torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
                compared += len(files)
    assert compared >= 2 * 8  # of 28 rows, in two precisions, so the comparison is not empty


@needs_vectors
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("file", FILES)
def test_gradients_with_the_published_weights_are_those_of_the_reference(file: str, mode: str) -> None:
    """No published batch has only comparable rows, so the gradient is compared with the reference."""
    v = vectors.load(file)
    files = v.files("tail_longer_than_window")
    assert_same_as_reference(v.config, v.weights(torch.float64), files, mode)


# ---------------------------------------------------------------------------------------------- the reference


@st.composite
def configs(draw) -> ReferenceConfig:
    heads = draw(st.integers(1, 3))
    layers = draw(st.integers(1, 5))
    window = draw(st.integers(1, 12))
    # Shifts below the window, or multiples of it. For others, the published mask is meaningless.
    shifts = st.integers(0, window - 1) | st.sampled_from([window, 2 * window])
    return ReferenceConfig(
        dim=heads * draw(st.sampled_from([4, 8])),  # a LayerNorm over 2 values amplifies rounding errors
        heads=heads,
        kernel=draw(st.sampled_from([2, 4, 6, 8])),
        window=window,
        shifts=tuple(draw(st.lists(shifts, min_size=layers, max_size=layers))),
        merge=tuple(draw(st.lists(st.booleans(), min_size=layers, max_size=layers))),
        max_tokens=160,
        classes=3,
    )


LENGTHS = st.lists(st.integers(1, 30) | st.integers(1, 150), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(config=configs(), lengths=LENGTHS, seed=st.integers(0, 99))
@example(config=TINY, lengths=[1, 2, 3, 4, 5, 16, 17, 31, 32, 33, 150], seed=0)
def test_masked_is_the_reference_as_intended(config: ReferenceConfig, lengths: list[int], seed: int) -> None:
    weights = random_weights(config, seed)
    assert_same_as_reference(config, weights, random_files(lengths, seed), "masked")


@settings(max_examples=60, deadline=None)
@given(config=configs(), lengths=LENGTHS, seed=st.integers(0, 99))
@example(config=TINY, lengths=[4, 5, 6, 17, 18, 19, 31, 32, 33, 34, 35, 150], seed=0)
def test_as_released_is_the_reference_as_released_one_file_at_a_time(
    config: ReferenceConfig, lengths: list[int], seed: int
) -> None:
    weights = random_weights(config, seed)
    files = random_files([max(n, config.kernel) for n in lengths], seed)
    assert_same_as_reference(config, weights, files, "as_released")


def test_published_shape_of_windows_and_mergings_against_the_reference() -> None:
    """Window 128, shifts 0/64 and merging after 0, 1, 3, 5, 7, 9, like the published models, in a narrow model."""
    arch = architecture("custom", dim=8, layers=12, heads=1, kernel=4, max_tokens=1000)
    config = ReferenceConfig(
        dim=8,
        heads=1,
        kernel=4,
        window=128,
        shifts=(0, 64) * 6,
        merge=tuple(layer in (0, 1, 3, 5, 7, 9) for layer in range(12)),
        max_tokens=1000,
        classes=3,
    )
    assert architecture_of(config) == arch
    for mode in MODES:
        files = random_files([4, 255, 258, 1001, 1998], seed=1)
        assert_same_as_reference(config, random_weights(config, seed=1), files, mode)


# ---------------------------------------------------------------------------------- a file and its neighbours

TINY_WEIGHTS = random_weights(TINY, seed=0)
TINY_MODELS = {
    (mode, dtype): build(TINY, {name: w.to(dtype) for name, w in TINY_WEIGHTS.items()}, mode)
    for mode in MODES
    for dtype in (torch.float32, torch.float64)
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 600), min_size=2, max_size=8), seed=st.integers(0, 99))
@example(lengths=[1, 600, 1], seed=0)
@example(lengths=[599, 5, 4, 17], seed=0)
def test_a_files_logits_do_not_depend_on_its_neighbours(
    mode: str, dtype: torch.dtype, tolerance: float, lengths: list[int], seed: int
) -> None:
    model = TINY_MODELS[mode, dtype]
    shortest = 1 if mode == "masked" else TINY.kernel
    files = random_files([max(n, shortest) for n in lengths], seed)
    with torch.no_grad():
        together = model(batch_of(files))
        alone = torch.cat([model(batch_of([file])) for file in files])
        backwards = model(batch_of(files[::-1])).flip(0)
    torch.testing.assert_close(together, alone, rtol=0, atol=tolerance)
    torch.testing.assert_close(together, backwards, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_native", [True, False])
def test_bfloat16_gives_nearly_the_same(mode: str, is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last windows of files have slots without a token, which as_released attends to."""
    monkeypatch.setattr("bfsys.model.precision.cpu_multiplies_bf16", lambda: is_native)
    batch = batch_of(random_files([4, 61, 333], seed=0))
    model = build(TINY, {name: w.bfloat16() for name, w in TINY_WEIGHTS.items()}, mode)
    with torch.no_grad():
        logits = model(batch).float()
        torch.testing.assert_close(logits, TINY_MODELS[mode, torch.float32](batch), rtol=0, atol=0.05)
    model(batch).float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_every_byte_counts_when_masked() -> None:
    """This includes the last bytes, which the published convolution drops."""
    model = TINY_MODELS["masked", torch.float64]
    (file,) = random_files([61], seed=0)
    changed = [file[:i] + bytes([file[i] ^ 1]) + file[i + 1 :] for i in range(len(file))]
    with torch.no_grad():
        logits = model(batch_of([file, *changed]))
    assert ((logits[1:] - logits[0]).abs().amax(1) > 1e-6).all()


def test_pad_bytes_are_not_byte_zero() -> None:
    """Windows past the end of a file contain padding, not byte 0."""
    model = TINY_MODELS["masked", torch.float64]
    with torch.no_grad():
        logits = model(batch_of([b"abcde", b"abcde\0"]))
    assert (logits[0] - logits[1]).abs().max() > 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_batch_is_left_alone(mode: str) -> None:
    batch = batch_of(random_files([40, 7, 23], seed=0))
    before = {f.name: v.clone() for f in fields(batch) if isinstance(v := getattr(batch, f.name), torch.Tensor)}
    TINY_MODELS[mode, torch.float64](batch).sum().backward()
    TINY_MODELS[mode, torch.float64].zero_grad()
    for name, value in before.items():
        assert torch.equal(getattr(batch, name), value), name


@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing_changes_nothing(mode: str) -> None:
    batch = batch_of(random_files([40, 7, 23], seed=0))
    answers, calls = [], {False: 0, True: 0}
    for checkpointing in (False, True):
        model = ByteFormer(architecture_of(TINY), TINY.classes, mode, activation_checkpointing=checkpointing)
        load_corenet(model.double(), TINY_WEIGHTS)

        def count(*_, on: bool = checkpointing) -> None:
            calls[on] += 1

        model.blocks[0].norm1.register_forward_hook(count)
        logits = model.train()(batch)
        F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
        answers.append({"logits": logits, **{name: p.grad for name, p in model.named_parameters()}})
    assert calls[True] == 2 * calls[False] > 0
    for name, want in answers[0].items():
        torch.testing.assert_close(answers[1][name], want, rtol=0, atol=1e-12)


def test_activation_checkpointing_keeps_the_input_of_a_block_only() -> None:
    files = random_files([4000, 700, 2300], seed=0)
    kept = {}
    for checkpointing in (False, True):
        config = replace(TINY, max_tokens=2000)
        model = ByteFormer(architecture_of(config), TINY.classes, activation_checkpointing=checkpointing).train()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def keep(t: Tensor, seen: dict[int, int] = seen, weights: set[int] = weights) -> Tensor:
            if t.is_floating_point() and t.untyped_storage().data_ptr() not in weights:
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(batch_of(files))
        kept[checkpointing] = sum(seen.values())
    assert kept[True] < 0.2 * kept[False]


@pytest.mark.parametrize("training", [False, True])
def test_blocks_in_chunks_give_the_same(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks contain whole windows, both in inference and in activation checkpointing."""
    batch, results, most = batch_of(random_files([900, 7, 1, 333, 64], seed=0)), [], 0

    def count(module: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal most
        most = max(most, len(inputs[0]))

    for chunk_tokens in (10**6, 32):
        monkeypatch.setattr(byteformer, "CHUNK_TOKENS", chunk_tokens)
        model = ByteFormer(architecture_of(TINY), TINY.classes, activation_checkpointing=True)
        load_corenet(model.double(), TINY_WEIGHTS)
        model.stem.requires_grad_(False)
        for block in model.blocks:
            block.fc1.register_forward_pre_hook(count)
        most = 0
        with torch.set_grad_enabled(training):
            logits = model.train(training)(batch)
        if training:
            logits.square().sum().backward()
        assert chunk_tokens > 32 or most <= 32 + 2 * TINY.window
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"logits": logits.detach(), **gradients})
    for name, want in results[0].items():
        torch.testing.assert_close(results[1][name], want, rtol=0, atol=1e-12)


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("mode", MODES)
def test_empty_file_is_an_error_that_names_it(mode: str) -> None:
    with pytest.raises(UserError, match=r"file 1 .* 0 bytes"):
        TINY_MODELS[mode, torch.float32](batch_of([b"abcdef", b"", b"ghijkl"]))


def test_file_shorter_than_the_kernel_is_an_error_as_released_only() -> None:
    with pytest.raises(UserError, match=r"file 0 .* 3 bytes.* 4"):
        TINY_MODELS["as_released", torch.float32](batch_of([b"abc"]))
    assert TINY_MODELS["as_released", torch.float32](batch_of([b"abcd"])).shape == (1, 5)
    assert TINY_MODELS["masked", torch.float32](batch_of([b"abc"])).shape == (1, 5)


# --------------------------------------------------------------------------------------- published properties


@pytest.mark.parametrize(
    ("size", "kernel", "max_tokens", "classes", "published"),
    [
        ("tiny", 32, 50_000, 1000, 16_805_416),
        ("tiny", 32, 9_415, 1000, 9_013_096),
        ("tiny", 16, 50_000, 1000, 16_215_592),
        ("tiny", 8, 50_000, 1000, 15_920_680),
        ("tiny", 4, 50_000, 1000, 15_773_224),
        ("tiny", 8, 12_140, 1000, 8_651_560),
        ("tiny", 32, 50_000, 12, 16_614_732),
        ("tiny", 32, 4_002, 12, 7_783_116),
        ("small", 32, 50_000, 1000, 47_470_696),
        ("small", 32, 9_415, 1000, 31_886_056),
        ("base", 32, 50_000, 1000, 150_383_848),
        ("base", 32, 9_415, 1000, 119_214_568),
        ("huge", 32, 50_000, 1000, 767_395_560),
        ("huge", 32, 9_415, 1000, 715_446_760),
    ],
)
def test_parameter_counts_are_the_published_ones(
    size: str, kernel: int, max_tokens: int, classes: int, published: int
) -> None:
    with torch.device("meta"):
        model = ByteFormer(architecture(size, kernel=kernel, window=128, max_tokens=max_tokens), classes)
    assert sum(p.numel() for p in model.parameters()) == published
    if size == "tiny":
        assert len(model.state_dict()) == 169


def test_initialisation_is_the_published_one() -> None:
    torch.manual_seed(0)
    model = ByteFormer(architecture("tiny", max_tokens=2000), 1000)
    stds = {  # those of the published tiny with kernel 32 and 1000 classes
        "stem.kernel": 0.0074,
        "stem.positions": 0.0722,
        "blocks.0.qkv.weight": 0.0512,
        "blocks.11.proj.weight": 0.0722,
        "blocks.5.fc1.weight": 0.0457,
        "blocks.5.fc2.weight": 0.0457,
        "merges.3.reduction.weight": 0.0589,
        "head.weight": 0.0410,
    }
    parameters = dict(model.named_parameters())
    for name, std in stds.items():
        weight = parameters[name]
        assert weight.std().item() == pytest.approx(std, rel=0.02), name
        # A uniform distribution ends at sqrt(3) standard deviations; a normal one does not.
        uniform = name != "stem.positions"
        assert (weight.abs().max() < 1.75 * weight.std()) == uniform, name
    embedding = parameters["stem.embedding"]
    assert embedding[:PAD_ROW].std().item() == pytest.approx(0.0722, rel=0.02)
    assert not embedding[PAD_ROW].any()
    for name, weight in parameters.items():
        if name.endswith(".bias"):
            assert not weight.any(), name
        elif weight.ndim == 1:  # the scale of a LayerNorm
            assert (weight == 1).all(), name


def test_the_mean_over_tokens_is_exact_in_bfloat16() -> None:
    """A bfloat16 sum of ones stops growing at 256."""
    from bfsys.model.attention import segment_mean

    rows = torch.ones(1400, 3, dtype=torch.bfloat16)
    mean = segment_mean(rows, torch.tensor([400, 1000]))
    assert mean.dtype == torch.bfloat16
    assert mean.tolist() == [[1.0] * 3] * 2

"""The rules by which format, model and steps are chosen, and the config that comes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bfsys.config import Jitter, load_config
from bfsys.fitting.choice import (
    ENOUGH_STEPS,
    LEAST_STEPS,
    PICTURE_SIDES,
    Choice,
    Format,
    Machine,
    choose,
    first_format,
    settings_of,
    to_yaml,
)
from bfsys.fitting.survey import Survey

CPU, GPU = Machine("cpu", 2, multiplies_bf16=False), Machine("gpu", 1, multiplies_bf16=True)


def survey(
    kind: str, modality: str | None, length: int = 5000, size: float = 0.0, rate_hz: int = 0, files: int = 900
) -> Survey:
    lengths = np.full(files, length)
    return Survey(("a", "b"), {"train": files, "val": 100}, lengths, 2 * length, {kind: 200}, modality, size, rate_hz)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (survey("other", None), Format()),
        (survey("a TIFF", "image", size=64), Format(jittered=True)),
        (survey("a TIFF", "image", size=2_000), ("tiff", 224, None, None, False)),
        (survey("a compressed TIFF", "image", size=64), ("tiff", 64, None, None, False)),
        (survey("a WAV", "audio", size=1.0, rate_hz=16_000), Format(jittered=True)),
        (survey("a PNG", "image", size=28), ("tiff", 28, None, None, False)),
        (survey("a PNG", "image", size=5), ("tiff", 16, None, None, False)),
        (survey("a JPEG", "image", size=240), ("tiff", 224, None, None, True)),
        (survey("an MP3", "audio", size=1.0, rate_hz=44_100), ("wav:uint8", None, 16_000, 1.0, True)),
        (survey("a WAV", "audio", size=3600.0, rate_hz=8_000), ("wav:uint8", None, 8_000, 10.0, True)),
    ],
)
def test_compressed_and_large_files_are_encoded(found: Survey, expected: Format | tuple) -> None:
    got = first_format(found, as_stored=False)
    if isinstance(expected, Format):
        assert got == expected
    else:
        assert (got.encoding, got.image_size, got.sample_rate_hz, got.seconds, got.augmented) == expected
        assert got.jittered is not got.augmented
    assert first_format(found, as_stored=True) == Format(jittered=found.modality is not None)


@pytest.mark.parametrize(
    ("modality", "steps", "jitter"), [(None, 600, False), ("audio", 100, False), ("audio", 600, True)]
)
def test_sounds_that_are_read_often_are_changed_a_little(
    modality: str | None, steps: int, jitter: bool, tmp_path: Path
) -> None:
    choice = choose(survey("a WAV", modality, 9_000, size=1.0, rate_hz=8_000), CPU, 600, as_stored=True)
    file = tmp_path / "chosen.yaml"
    file.write_text(to_yaml(settings_of(choice, "data/a", "data/a", steps, 10), []))
    (source,) = load_config(file).data.sources
    assert (source.jitter == Jitter(), source.augment) == (jitter, None)
    assert ("jitter changes them slightly" in file.read_text()) is jitter


def test_pictures_are_as_large_as_the_time_allows() -> None:
    photographs = survey("a JPEG", "image", 40_000, size=500)
    sides = [choose(photographs, CPU, seconds, as_stored=False).format.image_size for seconds in (60, 600, 6000, 10**6)]
    assert sides == sorted(sides)
    assert sides[0] < sides[-1] == PICTURE_SIDES[0]
    for seconds, side in zip((60, 600, 6000), sides[:3], strict=True):
        choice = choose(photographs, CPU, seconds, as_stored=False)
        allowed = choice.estimated_step_s(2) * min(ENOUGH_STEPS, choice.most_steps()) <= seconds
        assert allowed or side == PICTURE_SIDES[-1]


@pytest.mark.parametrize("files", [2, 5, 40, 3000])
@pytest.mark.parametrize("length", [1, 300, 9_000, 300_000, 50_000_000])
@pytest.mark.parametrize("machine", [CPU, GPU])
def test_the_config_can_be_loaded(files: int, length: int, machine: Machine, tmp_path: Path) -> None:
    choice = choose(survey("other", None, length, files=files), machine, 600, as_stored=False)
    file = tmp_path / "chosen.yaml"
    file.write_text(to_yaml(settings_of(choice, "data/a: 'b'", "data/c", LEAST_STEPS, 10), ["header: #"]))
    config = load_config(file)
    assert config.data.sources[0].path == "data/a: 'b'"
    assert config.data.batch_samples <= max(choice.lanes, files)
    assert config.model.architecture() == choice.architecture
    assert (config.optim.name, config.model.init) == ("muon", "smooth")


def test_each_choice_has_its_reason() -> None:
    choice = choose(survey("a JPEG", "image", 40_000, size=500), CPU, 600, as_stored=False)
    text = to_yaml(settings_of(choice, "data/a", "data/b", 100, 10), [])
    for key in ("sources", "batch_samples", "kernel", "max_tokens", "steps", "precision"):
        line = next(i for i, line in enumerate(text.split("\n")) if line.strip().startswith(f"{key}:"))
        assert "#" in text.split("\n")[line] + text.split("\n")[line - 1], key


def settings(found: Survey, machine: Machine, *, as_stored: bool = False) -> dict[tuple[str, str], object]:
    choice = choose(found, machine, 600, as_stored=as_stored)
    return {(one.section, one.key): one.value for one in settings_of(choice, "data/a", "data/a", 100, 10)}


@pytest.mark.parametrize(
    ("machine", "precision"), [(CPU, "fp32"), (Machine("cpu", 2, multiplies_bf16=True), "bf16"), (GPU, "bf16")]
)
def test_precision_is_what_the_machine_multiplies(machine: Machine, precision: str) -> None:
    assert settings(survey("other", None), machine)["train", "precision"] == precision


def test_no_content_is_learned_from_files_whose_class_is_their_kind() -> None:
    mixed = replace(survey("a PNG", "image", size=28), kinds_tell_classes=True)
    assert settings(mixed, CPU, as_stored=True)["optim", "content_loss"] == 0
    # Re-encoded files are all of one kind, so only their content can tell the class.
    assert ("optim", "content_loss") not in settings(mixed, CPU)
    assert ("optim", "content_loss") not in settings(survey("a PNG", "image", size=28), CPU, as_stored=True)


def test_few_files_are_not_repeated_forever() -> None:
    few: Choice = choose(survey("other", None, 500, files=100), CPU, 36_000, as_stored=False)
    assert few.most_steps() * few.batch_samples <= max(200 * few.batch_samples, 60 * 100)


@pytest.mark.parametrize(
    ("found", "kernel"),
    [
        (survey("a WAV", "audio", 900, size=0.1, rate_hz=8_000), 4),
        (survey("a WAV", "audio", 2_500, size=0.2, rate_hz=8_000), 16),
        (survey("a WAV", "audio", 6_800, size=0.4, rate_hz=8_000), 32),
        (survey("an MP3", "audio", 2_500, size=0.7, rate_hz=8_000), 32),  # becomes a WAV of 5,644 bytes
        (replace(survey("a WAV", "audio", 6_800, size=0.4, rate_hz=8_000), kinds_tell_classes=True), 16),
        (survey("a TIFF", "image", 6_800, size=48), 16),
        (survey("other", None, 6_800), 16),
        (survey("other", None, 30_000), 32),
    ],
)
def test_uncompressed_sounds_have_longer_tokens(found: Survey, kernel: int) -> None:
    assert choose(found, CPU, 1e9, as_stored=False).kernel == kernel


def test_compressed_sounds_that_stay_as_they_are_have_the_tokens_of_other_files() -> None:
    assert choose(survey("an MP3", "audio", 6_800, size=1.0, rate_hz=8_000), CPU, 1e9, as_stored=True).kernel == 16

"""Choose encoding, model, batch size and steps for a folder, and give a reason for each.

The rules are few and come from measurements (docs/results.md, docs/experiments.md). Models learn uncompressed bytes
much faster than compressed ones. The kernel grows with the length of a file. The model of `configs/small.yaml` has
been tried most. A few thousand files need 400 to 1,500 steps. A short training on this machine measures how many steps
the time allows (fit.py).

Rejected alternative: a search over models, which would need the time of the run itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import yaml

from bfsys.errors import counted
from bfsys.fitting.survey import Survey
from bfsys.model.flops import flops_per_step
from bfsys.model.sizes import Architecture, architecture

SMALL = {"dim": 96, "layers": 6, "heads": 3, "merge_after": [0, 1, 3], "window": 64, "shift": 32}  # configs/small.yaml
# Assumed until it is measured: one core in float32 with the small model, one GPU in bfloat16 with the tiny model
FLOPS_PER_S = {"cpu": 3e10, "gpu": 5e13}
ENOUGH_STEPS = 400
LEAST_STEPS = 60
MOST_PASSES = 60  # over the training files
JITTER_PASSES = 10  # with fewer passes, jitter only slows learning (docs/experiments.md)
ENOUGH_FOR_FEW_FILES = 200  # steps, even if they are more than MOST_PASSES
LONGEST_WARMUP = 200
LARGEST_STORED_SIDE = 128  # pixels; larger pictures that are not compressed have more than 49 kB in colour
PICTURE_SIDES = (224, 160, 128, 96, 64, 48, 32, 16)
SAMPLE_RATES_HZ = (16_000, 8_000)
WAV_HEADER_BYTES = 44
# (largest median file length in bytes, kernel). Longer tokens of uncompressed sounds cost less and learn as well;
# where the kind of a file is the class, they lose ten points (docs/experiments.md).
KERNELS = ((1_000, 4), (12_000, 16))
KERNELS_OF_SOUNDS = ((1_000, 4), (3_000, 16))
LARGEST_KERNEL = 32
MOST_POSITIONS = 35_000
LONGEST_SOUND_S = 10.0


@dataclass(frozen=True)
class Machine:
    """The machine that trains."""

    device: str  # cpu or gpu
    ranks: int
    multiplies_bf16: bool
    """Whether it has instructions for bfloat16 products."""

    def describe(self) -> str:
        return counted(self.ranks, "GPU" if self.device == "gpu" else "CPU core")


@dataclass(frozen=True)
class Format:
    """The format in which files reach the model."""

    encoding: str = "as_stored"
    image_size: int | None = None
    sample_rate_hz: int | None = None
    seconds: float | None = None
    augmented: bool = False
    """Whether files get the published augmentation."""
    jittered: bool = False
    """Whether files get small changes in their own format, if training makes at least JITTER_PASSES passes."""
    reason: str = "the files are used as stored"
    """A sentence, or its beginning if the name of the format completes it."""

    def lengths(self, survey: Survey) -> np.ndarray:
        """int64 [training files]: bytes of each file in this format."""
        if self.image_size:
            return np.full(len(survey.train_bytes), 3 * self.image_size**2 + 140)
        if self.sample_rate_hz and self.seconds:
            return np.full(len(survey.train_bytes), round(self.sample_rate_hz * self.seconds) + WAV_HEADER_BYTES)
        return survey.train_bytes

    def smaller(self) -> Format | None:
        """The next smaller format; None if there is none."""
        if self.image_size and self.image_size > PICTURE_SIDES[-1]:
            return replace(self, image_size=max(side for side in PICTURE_SIDES if side < self.image_size))
        if self.sample_rate_hz and self.sample_rate_hz > SAMPLE_RATES_HZ[-1]:
            return replace(self, sample_rate_hz=SAMPLE_RATES_HZ[-1])
        return None

    def why(self) -> str:
        return self.reason if self.encoding == "as_stored" else f"{self.reason} {self.describe()}"

    def describe(self) -> str:
        sizes = (
            f"{self.image_size} × {self.image_size} pixels" if self.image_size else "",
            f"{self.seconds:g} s at {self.sample_rate_hz:,} Hz" if self.seconds else "",
        )
        return " of ".join(part for part in (self.encoding, *sizes) if part)


@dataclass(frozen=True)
class Choice:
    """The choices for a config, except the number of steps."""

    format: Format
    machine: Machine
    kernel: int
    max_tokens: int
    batch_samples: int
    lanes: int
    eval_split: str
    shows_classes: bool
    """Whether the class is a property of the content. False if the file format tells the class."""
    lengths: np.ndarray
    """int64 [training files]: bytes of each file in `format`."""

    @property
    def architecture(self) -> Architecture:
        if self.machine.device == "gpu":
            return architecture("tiny", kernel=self.kernel, max_tokens=self.max_tokens, pool="attention")
        return architecture(
            "custom",
            kernel=self.kernel,
            max_tokens=self.max_tokens,
            pool="attention",
            **{**SMALL, "merge_after": tuple(SMALL["merge_after"])},  # type: ignore[arg-type]
        )

    def most_steps(self) -> int:
        """Return the largest useful number of steps, by the number of passes over the training files."""
        return max(ENOUGH_FOR_FEW_FILES, MOST_PASSES * len(self.lengths) // self.batch_samples)

    def passes(self, steps: int) -> float:
        """The number of passes over the training files."""
        return steps * self.batch_samples / len(self.lengths)

    def estimated_step_s(self, classes: int) -> float:
        typical = self.lengths[np.linspace(0, len(self.lengths) - 1, 64).astype(int)]
        flops = flops_per_step(typical, self.architecture, classes).total * self.batch_samples / len(typical)
        return flops / (FLOPS_PER_S[self.machine.device] * self.machine.ranks)


def first_format(survey: Survey, *, as_stored: bool) -> Format:
    """The largest format that adds information for these files."""
    if as_stored or survey.modality is None:
        return Format(jittered=survey.modality is not None)
    if survey.modality == "image" and (survey.is_compressed or survey.typical_size > LARGEST_STORED_SIDE):
        side = min(PICTURE_SIDES[0], max(PICTURE_SIDES[-1], int(survey.typical_size)))
        augmented = survey.is_photographs and side >= 64
        slow, large = "models learn slowly from compressed pictures", "large pictures take much time"
        cause = slow if survey.is_compressed else large
        return Format(
            "tiff",
            image_size=side,
            augmented=augmented,
            jittered=not augmented,
            reason=f"{cause}, so all files are re-encoded as",
        )
    if survey.modality == "audio" and (survey.is_compressed or survey.typical_size > 2 or survey.rate_hz > 16_000):
        seconds = round(min(LONGEST_SOUND_S, max(0.25, survey.typical_size)), 2)
        rate_hz = max((r for r in SAMPLE_RATES_HZ if r <= survey.rate_hz), default=SAMPLE_RATES_HZ[-1])
        cause = "models learn slowly from compressed sounds" if survey.is_compressed else "long sounds take much time"
        why = f"{cause}, so all files are re-encoded as"
        return Format("wav:uint8", sample_rate_hz=rate_hz, seconds=seconds, augmented=True, reason=why)
    return Format(jittered=True)


def choose(survey: Survey, machine: Machine, train_s: float, *, as_stored: bool) -> Choice:
    """Choose the largest format with which `train_s` seconds are estimated to allow ENOUGH_STEPS."""
    form = first_format(survey, as_stored=as_stored)
    while True:
        choice = choice_of(survey, machine, form)
        wanted = min(ENOUGH_STEPS, choice.most_steps())
        smaller = form.smaller()
        if smaller is None or wanted * choice.estimated_step_s(len(survey.classes)) <= train_s:
            return choice
        form = smaller


def choice_of(survey: Survey, machine: Machine, form: Format, lengths: np.ndarray | None = None) -> Choice:
    """The choices for a format. `lengths` are those of the packed training files; without them they are estimated."""
    lengths = form.lengths(survey) if lengths is None else lengths
    median = float(np.median(lengths))
    shows_classes = form.encoding != "as_stored" or not survey.kinds_tell_classes
    is_plain_sound = survey.modality == "audio" and (form.encoding != "as_stored" or not survey.is_compressed)
    kernels = KERNELS_OF_SOUNDS if is_plain_sound and shows_classes else KERNELS
    kernel = next((kernel for limit, kernel in kernels if median <= limit), LARGEST_KERNEL)
    longest = max(int(lengths.max()), survey.longest if form.encoding == "as_stored" else 0)
    positions = min(MOST_POSITIONS, -(-2 * longest // kernel))
    lanes = 8 if machine.device == "gpu" else max(n for n in (1, 2, 4, 8) if n <= machine.ranks)
    batch = 64 if median <= 3_000 or machine.device == "gpu" else 32
    while batch > max(lanes, len(lengths) // 2):
        batch //= 2
    return Choice(
        format=form,
        machine=machine,
        kernel=kernel,
        max_tokens=max(64, -(-positions // 64) * 64),
        batch_samples=max(batch, lanes),
        lanes=lanes,
        eval_split="val" if "val" in survey.files else "test",
        shows_classes=shows_classes,
        lengths=lengths,
    )


@dataclass(frozen=True)
class Setting:
    """A key of a config, its value and the reason."""

    section: str
    key: str
    value: object
    reason: str = ""


def settings_of(choice: Choice, data: str, eval_data: str, steps: int, minutes: float) -> list[Setting]:
    """The settings that differ from the defaults."""
    return [
        *_of_data(choice, data, eval_data, steps),
        *_of_model(choice),
        *_of_training(choice, steps, minutes),
    ]


def _of_data(choice: Choice, data: str, eval_data: str, steps: int) -> Iterator[Setting]:
    form, why, median = choice.format, choice.format.why(), float(np.median(choice.lengths))
    source: dict[str, object] = {"path": data}
    if form.augmented:
        of_form: dict[str, object] = {"encoding": form.encoding}
        if form.image_size:
            of_form |= {"image_size": form.image_size}
        else:
            of_form |= {"sample_rate_hz": form.sample_rate_hz, "seconds": form.seconds, "mixup": False}
            of_form |= {"speeds": [0.9, 0.95, 1.0, 1.05, 1.1]}
        source |= {"eval_path": eval_data, "augment": of_form}
    elif form.jittered and choice.passes(steps) >= JITTER_PASSES:
        source["jitter"] = {}
        why += f"; jitter changes them slightly each time, since each is read about {choice.passes(steps):.0f} times"
    yield Setting("data", "sources", [source], why)
    if choice.eval_split != "val":
        yield Setting("data", "eval_split", choice.eval_split, "there is no validation split")
    yield Setting(
        "data", "batch_samples", choice.batch_samples, f"{counted(len(choice.lengths), 'file')} of {median:,.0f} bytes"
    )
    yield Setting("data", "lanes", choice.lanes, "the number of ranks must divide this")
    if (form.augmented or form.jittered) and choice.machine.device == "gpu":
        yield Setting("data", "workers", 4, "files are decoded and changed while the GPU computes")


def _of_model(choice: Choice) -> Iterator[Setting]:
    if choice.machine.device == "gpu":
        yield Setting("model", "size", "tiny", "the smallest published size; a GPU trains it fast")
    else:
        yield Setting("model", "size", "custom", "the model of configs/small.yaml, which a CPU trains in minutes")
        for key, value in SMALL.items():
            yield Setting("model", key, value)
    yield Setting("model", "kernel", choice.kernel, "bytes of a token, by the median length of a file")
    yield Setting("model", "max_tokens", choice.max_tokens, f"files of up to {choice.architecture.max_bytes:,} bytes")


def _of_training(choice: Choice, steps: int, minutes: float) -> Iterator[Setting]:
    every = max(1, -(-steps // 4))
    warmup_steps = min(LONGEST_WARMUP, steps // 8)
    yield Setting("optim", "warmup_steps", warmup_steps, f"an eighth of the steps, at most {LONGEST_WARMUP}")
    if not choice.shows_classes:
        yield Setting("optim", "content_loss", 0, "off, since the format of a file says much about its class")
    yield Setting(
        "optim", "ema_decay", 0.999 if steps >= 3000 else 0.99 if steps >= 300 else 0.95, "suits this number of steps"
    )
    limited = (
        "the maximum for this number of files"
        if steps == choice.most_steps()
        else f"measured: as many as {minutes:g} minutes allow"
    )
    yield Setting("train", "steps", steps, f"{limited}; {choice.passes(steps):.1f} passes over the training files")
    bf16 = choice.machine.multiplies_bf16
    why = "bfloat16 is faster" if bf16 else "there are no instructions for bfloat16"
    why = f"{why} on {choice.machine.describe()}"
    yield Setting("train", "precision", "bf16" if bf16 else "fp32", why)
    yield Setting("train", "log_every", max(1, steps // 40))
    yield Setting("train", "eval_every", every, "a quarter of the steps")
    yield Setting("train", "save_every", every)


def to_yaml(settings: list[Setting], header: list[str]) -> str:
    """A config with the reasons as comments."""
    lines = [f"# {line}" for line in header] + ["recipe: recommended   # docs/learning.md"]
    section = ""
    for one in settings:
        if one.section != section:
            section = one.section
            lines.append(f"{section}:")
        if isinstance(one.value, str | int | float):
            line = f"  {one.key}: {yaml.safe_dump(one.value).splitlines()[0]}"
            lines.append(f"{line:<24}  # {one.reason}" if one.reason else line)
            continue
        flow = None if one.key == "sources" else True  # sources are written in block style
        block = yaml.safe_dump(one.value, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=10**6)
        lines += [f"  # {one.reason}"] if one.reason else []
        if flow:
            lines.append(f"  {one.key}: {block.strip()}")
        else:
            lines += [f"  {one.key}:", *(f"    {line}" for line in block.rstrip().split("\n"))]
    return "\n".join(lines) + "\n"

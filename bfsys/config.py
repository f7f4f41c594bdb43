"""Every setting of a run, as frozen dataclasses. The text below a field explains it.

Defaults are those of the published recipe (the configurations that were released with the paper) if it has one, and
conservative choices otherwise. RECIPES has other defaults. A loaded config is complete: nothing is filled in later.
In a path, ~ and $VARIABLE are expanded as in a shell, unless a file of exactly that name exists; a loaded config holds
the expanded path. typed_yaml.py explains how overrides on the command line are read.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo

from bfsys import typed_yaml
from bfsys.errors import UserError, collecting, counted
from bfsys.locations import expanded, expanded_folder, is_remote
from bfsys.model import sizes
from bfsys.object_stores import problem_of_url


def _with_expanded_key_file(transform: str, info: ValidationInfo) -> str:
    name, _, file = transform.partition(":")
    return f"{name}:{expanded(file, info)}" if file and name == "permute" else transform


Location = Annotated[str, AfterValidator(expanded)]
Folder = Annotated[str, AfterValidator(expanded_folder)]
Transform = Annotated[str, AfterValidator(_with_expanded_key_file)]
MOST = 2**40  # limit of all counts: larger ones are mistakes, and a product of two could overflow 64 bits
MOST_WIDE = 2**20  # limit of sizes that are allocated at once
Count = Annotated[int, Field(ge=1, le=MOST)]
Whole = Annotated[int, Field(ge=0, le=MOST)]
Width = Annotated[int, Field(ge=1, le=MOST_WIDE)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0.1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Strict:
    """A base of dataclasses whose unknown keys are errors."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Augment(_Strict):
    """Augmentation of a source's training files, as published (data/streaming/augment.py). The files are decoded,
    changed at random and encoded again. Evaluation files are not changed."""

    encoding: str
    """Format that the model reads: tiff, png, jpeg:60, fhwc, fchw for pictures; wav:int16, mp3, flac, … for sounds."""
    image_size: Width = 224
    """Side of the square that is cropped from a picture, in pixels."""
    sample_rate_hz: Count = 16_000
    """Sample rate to which sound is resampled."""
    seconds: Positive = 1.0
    """Length to which sound is cut or padded with silence."""
    background: Folder | None = None
    """Folder of recordings; a quiet part of one is added to every sound. Default: no background."""
    mixup: bool = True
    """Mix every sound with another one, and their classes in the same proportion. Pictures are not mixed."""
    speeds: tuple[Positive, ...] = ()
    """Speed factors, one of which is chosen for every sound. Default: the speed stays the same (published)."""


@dataclass(frozen=True)
class Jitter(_Strict):
    """Small random changes to a source's training files, each of which keeps its own format (data/streaming/jitter.py).
    Only pictures and lossless sounds are changed. Evaluation files are not changed."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Probability that a file is changed when it is read."""
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 10.0
    """Largest angle by which a picture is rotated, in either direction."""
    zoom: Share = 0.1
    """Largest share by which the width and the height of a picture's content grow or shrink, independently of each
    other. The size in pixels stays the same."""
    shift: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """For a picture, the largest share of its width and height by which its content is moved. For a sound, the largest
    share of its length that is cut, or added as silence, at its beginning and at its end."""
    mirror: bool = False
    """Mirror half of the pictures, left to right."""
    speed: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Largest share by which the speed and the pitch of a sound rise or fall."""
    gain_db: Annotated[float, Field(ge=0, le=60)] = 6.0
    """Largest change of a sound's loudness, in decibels. Peaks above full scale are clipped."""


@dataclass(frozen=True)
class Source(_Strict):
    """One packed dataset."""

    path: Location
    """Folder that `bfsys pack` made (it contains dataset.json), or its URL: s3://, gs://, http(s)://, or a command
    that prints one of its files, such as `pipe:ssh host cat /data/{file}`."""
    weight: Positive = 1.0
    """Relative share of the samples of every step (see data.mixture). Shares are rounded to multiples of 1/65,536."""
    eval_path: Location | None = None
    """Dataset for evaluation; default: `path`. With `augment`, give a dataset that was packed in the encoding of
    `augment`, unless the training files are stored in it already."""
    augment: Augment | None = None
    """Decode, augment and re-encode the files during training. Default: no augmentation."""
    jitter: Jitter | None = None
    """Change the files a little during training and keep their formats. `jitter: {}` uses the defaults of its keys."""


@dataclass(frozen=True)
class Data(_Strict):
    """The data, and the global batch: the samples of one step over all ranks. A rank is one training process, usually
    one per GPU."""

    sources: tuple[Source, ...]
    """Datasets to mix. Classes of the same name are one class; the head has the union of all classes."""
    mixture: Literal["weights", "proportional", "sqrt"] | Temperature = "weights"
    """Rule that divides the samples of a step among the sources. The share of a source is proportional to its weight
    (weights), to weight times number of samples (proportional), to weight times the square root of the number of
    samples (sqrt), or to weight times samples^(1/T) (a number T)."""
    train_split: str = "train"
    """Split on which the model is trained."""
    eval_split: str = "val"
    """Split that is evaluated during the run, for the sources that have it."""
    batch_samples: Width = 768
    """Samples of one step, over all ranks."""
    lanes: Width = 64
    """Number of equal parts (lanes) into which the global batch is divided. It is fixed for a run. The number of ranks
    must divide it, and each rank computes lanes / ranks of the parts. train.micro_batch_tokens decides how many of them
    a rank computes together."""
    micro_batch_bytes: Count | None = None
    """Limit for the mean number of bytes of a lane in a step, which is the smallest micro-batch. If the mean is larger,
    the run does not start. (All lanes have nearly the same number of bytes.) Default: no limit."""
    shuffle_block: Count = 4096
    """Samples in a block. The samples of a block are shuffled together, and divided among its steps by length."""
    eval_batch_bytes: Count = 1_000_000
    """Largest number of bytes that evaluation and prediction compute together. A larger file is computed alone."""
    byte_transforms: tuple[Transform, ...] = ()
    """Transforms that change the bytes of every file, in training, evaluation and prediction, in the order of the list:
    reverse, random_shuffle, cyclic_half_length, stride:1024, window_shuffle:1024, keep:0.1, noise:-5:5, permute or
    permute:KEYFILE; head:4096 reads the start of each file; and damage: flip:0.01, truncate:0.5, skip:64. See
    data/streaming/byte_transforms.py."""
    max_bad_share: Share = 0.01
    """Largest share of a source's files that may be unreadable or damaged. Such files are replaced by other files of
    the source and listed in the run's quarantine.tsv. If there are more, the run ends."""
    workers: Whole = 0
    """Loader processes per rank. With 0, the training process reads the files itself, which is fastest if it need not
    decode them."""
    cache_dir: Folder | None = None
    """Cache for shards of remote sources, on a disk that the ranks of a node share. Default: a folder of the user in
    the system's temporary folder."""
    fetch_tries: Count = 9
    """Number of tries to fetch a remote file. The pauses between tries double (1, 2, 4, … s, changed at random by up to
    a quarter); with the default they take 4 minutes in all. Each failed try is printed on standard error. After the
    last one, the run ends with code 1, and launchers restart it."""
    cache_gb: Positive = 100.0
    """Largest size of the cache in 1e9 bytes. If it is full, the least recently used shards are removed."""


@dataclass(frozen=True)
class Model(_Strict):
    """Shape of the model: see model/sizes.py."""

    size: Literal["tiny", "small", "base", "huge", "custom"] = "tiny"
    """A published size, or custom, which needs dim and layers."""
    kernel: Annotated[int, Field(ge=2, le=MOST_WIDE, multiple_of=2)] = 32
    """Number of bytes that become one token. Each token begins kernel / 2 bytes (the stride) after the previous one."""
    window: Count = 128
    """Length of an attention window in tokens. A token attends only to the tokens of its window."""
    shift: Whole = sizes.PUBLISHED_SHIFT
    """Tokens by which the windows of every second layer are shifted."""
    max_tokens: Count = 50_000
    """Number of positions that are learned, one per token. In a file of more than max_tokens * kernel / 2 bytes, the
    second half of the positions is repeated (model/stem.py)."""
    dim: Width | None = None
    """Number of channels of a token; for `size: custom` only."""
    layers: Width | None = None
    """Number of layers; for `size: custom` only."""
    heads: Width | None = None
    """Number of attention heads; for `size: custom` only. Default: dim / 64."""
    merge_after: tuple[Whole, ...] | None = None
    """Layers, numbered from 0, after which pairs of tokens are merged. Default: the published 0, 1, 3, 5, 7, 9."""
    mode: Literal["masked", "as_released"] = "masked"
    """masked: padding and neighbouring files never change a prediction. as_released: the arithmetic of Apple's released
    code, for weights that were trained with it (`bfsys import-corenet`); files then need at least `kernel` bytes."""
    pool: Literal["mean", "attention"] = "mean"
    """How the tokens of a file become one vector. mean: as published. attention: a weighted mean with learned weights,
    so that a few tokens of a long file, such as its header, can decide the class: see model/pool.py."""
    init: Literal["published", "smooth"] = "published"
    """Initial weights. smooth: similar byte values start with similar embeddings, and positions start as sines. Muon
    learns faster with it, and AdamW more slowly: see model/stem.py."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass. This needs less memory and about a fifth more time."""
    compiled: bool = False
    """Fuse the operations between matrix products with torch.compile. This takes some minutes at each start, and has no
    effect on a CPU."""

    def architecture(self) -> sizes.Architecture:
        return sizes.architecture(
            self.size,
            kernel=self.kernel,
            window=self.window,
            max_tokens=self.max_tokens,
            shift=self.shift,
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            merge_after=self.merge_after,
            pool=self.pool,
        )

    @property
    def least_bytes(self) -> int:
        """Length of the shortest file that the model accepts."""
        return 1 if self.mode == "masked" else self.kernel


@dataclass(frozen=True)
class Optim(_Strict):
    """AdamW with a cosine schedule, as published, or Muon together with AdamW."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon updates the matrices of blocks and token merges and the stem's kernel, and AdamW everything else: see
    optim.py."""
    lr: Positive = 1e-3
    """Peak learning rate of AdamW. With `name: muon`, AdamW updates only embedding, positions, head, norms and biases.
    """
    muon_lr: Positive = 5e-3
    """Peak learning rate of Muon; it follows the same schedule as AdamW's."""
    muon_momentum: Share = 0.95
    """Momentum of Muon, that is, the decay of its running mean of the gradients."""
    final_lr: NotNegative = 2e-5
    """Learning rate at the last step. It is not reached if warmup_steps leaves fewer than two steps."""
    warmup_lr: NotNegative = 1e-6
    """Learning rate of the first step."""
    warmup_steps: Whole = 7500
    """Steps of the linear warm-up from warmup_lr to lr."""
    beta1: Share = 0.9
    """Decay of AdamW's running mean of the gradients."""
    beta2: Share = 0.999
    """Decay of AdamW's running mean of the squared gradients."""
    eps: Positive = 1e-8
    """Number that AdamW adds to the divisor of its update."""
    weight_decay: NotNegative = 0.05
    """Weight decay of parameters with two or more dimensions; biases and norms have none."""
    clip_norm: NotNegative = 0.0
    """Largest norm of the global gradient; 0 means no clipping (published)."""
    label_smoothing: Share = 0.1
    """Label smoothing, in training only."""
    content_loss: NotNegative = 0.0
    """Weight of the content loss: in training, the loader also decodes pictures and sounds, and the tokens predict the
    decoded content at their places (docs/learning.md). 0: no content loss and no decoding (published). With
    data.byte_transforms, which move or hide content, there is no content loss."""
    ema_decay: Share = 0.9999
    """Decay of the average of the weights, which evaluation and prediction use by default; 0: no average. The decay
    after t steps is at most (1 + t) / (10 + t). In a run of fewer than 9 / (1 - ema_decay) steps, a greater value
    therefore has no effect."""


@dataclass(frozen=True)
class Train(_Strict):
    """The training loop."""

    steps: Count = 500_456
    """Optimizer steps of the whole run; default: 300 epochs of ImageNet in batches of 768 (published)."""
    seed: Whole = 0
    """Seed of the initial weights and the data order."""
    init_from: Location | None = None
    """Run, or imported weights, from which the initial weights are copied. If there are averaged weights, these are
    used. The architecture must be the same; init_from.py explains which heads and positions may differ. A resumed run
    ignores this setting."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of the computation. In bf16, the optimizer still keeps float32 weights."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """What DeepSpeed ZeRO divides among ranks. 0: nothing; 1: the optimizer's state; 2: also gradients; 3: also
    weights."""
    micro_batch_tokens: Whole = 0
    """Largest number of tokens of a micro-batch, which is what a rank computes at once. A rank joins its lanes up to
    this number; a single lane may have more. On CPUs, 0 means one lane per micro-batch. On GPUs, 0 means 2^27 / dim
    tokens, which keep a GPU busy, and whose activations take about 11 GB in bf16 and twice as much in fp32. If that is
    more than half of the smallest GPU's memory, 0 means as many tokens as fit into half of it. The value may change at
    a resume, because it changes the gradient only by rounding."""
    log_every: Count = 20
    """Steps between lines in metrics.jsonl, TensorBoard and the console."""
    eval_every: Whole = 5000
    """Steps between evaluations; 0: only at the end."""
    save_every: Count = 1000
    """Steps between checkpoints; the last step is always saved."""
    checkpoint_copy: Location | None = None
    """URL of a folder in an object store, such as s3://bucket/folder. Every checkpoint is copied there during training,
    as URL/NAME/checkpoints/step_…. If the run's disk is lost, the run resumes from the newest intact copy."""
    keep_checkpoints: Count = 3
    """Number of newest checkpoints that are kept on disk."""
    keep_every: Whole = 0
    """Steps between checkpoints that are never deleted; 0: every checkpoint may be deleted."""
    keep_best: Whole = 1
    """Number of best checkpoints that are kept on disk. To find them, eval_every should be a multiple of save_every."""
    best_metric: Literal["top1", "top5", "loss"] = "top1"
    """Score that decides which checkpoints are best. It is the score over the evaluation files of all sources."""
    max_bad_steps: Count = 3
    """Number of consecutive bad steps after which the run rolls back to the checkpoint before them and skips them. A
    step is bad if its loss or gradient is non-finite, or if its loss spikes. The update of a non-finite step is always
    skipped (supervision/guard.py)."""
    spike_zscore: NotNegative = 10.0
    """A loss spikes if the robust z-score of its logarithm, relative to the last good losses, is above this number. 0:
    no test."""
    hang_timeout_s: NotNegative = 0.0
    """Seconds without progress after which a run counts as hung. The watchdog then ends it, and launchers restart it.
    0: a minute, or ten times the longest interval so far if that is longer."""
    collective_timeout_s: Count = 600
    """Timeout of collectives, which are operations that all ranks make together, until the watchdog watches them. It
    is also the watchdog's limit while a run starts, saves or evaluates."""


# Values that a recipe sets if the config does not. The recommended recipe learns faster from few files
# (docs/experiments.md).
RECIPES: dict[str, dict] = {
    "recommended": {
        "model": {"pool": "attention", "init": "smooth"},
        "optim": {"name": "muon", "clip_norm": 1.0, "content_loss": 5.0},
    },
}


@dataclass(frozen=True)
class Config(_Strict):
    """A whole run."""

    data: Data
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    recipe: Literal["published", "recommended"] = "published"
    """Defaults of model and optim. published: the defaults that are documented here. recommended: model.pool is
    attention, model.init smooth, optim.name muon, optim.clip_norm 1 and optim.content_loss 5; it learns faster from
    small datasets. The config.yaml in a run directory gives every value, so the recipe has no effect there."""
    name: str = ""
    """Name of the run's directory; default: the config file's name."""
    runs_dir: Folder = "runs"
    """Folder of run directories."""

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def content_weight(self) -> float:
        """The effective weight of the content loss."""
        return 0.0 if self.data.byte_transforms else self.optim.content_loss

    @property
    def copy_url(self) -> str:
        """URL of the run's copy in an object store; "" without train.checkpoint_copy."""
        return f"{self.train.checkpoint_copy.rstrip('/')}/{self.name}" if self.train.checkpoint_copy else ""


def _is_same_folder(url: str, folder: Path) -> bool:
    scheme, _, path = url.partition("://")
    return scheme in ("file", "local") and Path(path).resolve() == folder.resolve()


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read and check a config; raises UserError with every problem."""
    config = typed_yaml.load(Config, path, overrides, {"recipe": RECIPES})
    if not config.name:
        config = replace(config, name=Path(path).stem)
    problems = []
    data, train, optim = config.data, config.train, config.optim
    if not data.sources:
        problems.append("data.sources: the list is empty; give at least one `- path: FOLDER`")
    if "/" in config.name or config.name.startswith(".") or any(character < " " for character in config.name):
        problems.append(
            f"name: got {config.name!r}; must be a folder name in one line without '/' that does not begin with a dot; "
            "set the parent folder with runs_dir"
        )
    for key, text in (("name", config.name), ("runs_dir", config.runs_dir)):
        if any("\ud800" <= character <= "\udfff" for character in text):
            problems.append(f"{key}: got {text!r}, which is not UTF-8, as TensorBoard and safetensors require")
    if data.sources and data.batch_samples < data.lanes * len(data.sources):
        problems.append(  # with fewer, a lane could have no sample in a step
            f"data.batch_samples: got {data.batch_samples}; with {counted(data.lanes, 'lane')} (data.lanes) and "
            f"{counted(len(data.sources), 'source')}, at least {data.lanes * len(data.sources)} are needed"
        )
    if optim.warmup_steps > train.steps:
        problems.append(
            f"optim.warmup_steps: got {optim.warmup_steps}, but train.steps is {train.steps}; the warm-up must not be "
            "longer than the run"
        )
    if optim.final_lr > optim.lr:
        problems.append(f"optim.final_lr: got {optim.final_lr}; it must not exceed optim.lr, which is {optim.lr}")
    if train.checkpoint_copy and (problem := problem_of_url(config.copy_url, train.checkpoint_copy)):
        problems.append(f"train.checkpoint_copy: {problem}")
    elif _is_same_folder(config.copy_url, config.run_dir):
        problems.append(
            f"train.checkpoint_copy: got {train.checkpoint_copy!r}, in which {config.name} is the run directory "
            "itself; give another folder"
        )
    problems += [
        f"data.sources.{i}: augment and jitter are both given; give one of them: augment encodes all files alike, "
        "jitter keeps each file's own format"
        for i, source in enumerate(data.sources)
        if source.augment and source.jitter
    ]
    names = [
        f"{key}: got {value!r}, which cannot be the name of a file"
        for key, value in typed_yaml.flatten(typed_yaml.to_tree(config)).items()
        if isinstance(value, str) and not _can_be_a_name(value)
    ]
    problems += names or _sources_given_twice(data.sources)
    with collecting(problems):
        config.model.architecture()
    if problems:
        raise UserError(*(f"config {path}: {p}" for p in problems))
    return config


def _can_be_a_name(text: str) -> bool:
    try:
        return bool(os.fsencode(text)) or not text
    except UnicodeEncodeError:
        return False


def _sources_given_twice(sources: tuple[Source, ...]) -> list[str]:
    paths: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        paths[source.path.rstrip("/") if is_remote(source.path) else os.path.realpath(source.path)].append(source.path)
    return [
        f"data.sources: {' = '.join(dict.fromkeys(same))} is given twice; give it once, with a larger weight"
        for same in paths.values()
        if len(same) > 1
    ]

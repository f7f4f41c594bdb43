"""Every knob of a run: frozen dataclasses, with what a knob means written under it.

Defaults are the published recipe where there is one (section 3 of the paper's released configurations), and
otherwise what a careful user would choose; RECIPES has others. A config that loads is complete: nothing is filled in
later. In a path, ~ and $VARIABLE mean what they mean in a shell, unless a file of just that name exists; a loaded
config holds what they stand for. An override on the command line is taken as typed: see typed_yaml.py.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo

from bfsys import typed_yaml
from bfsys.errors import UserError, collecting
from bfsys.model import sizes

PIPE = "pipe:"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)


def is_remote(location: str) -> bool:
    """Whether `location` is a URL, or a command that prints a file, rather than a path."""
    return location.startswith(PIPE) or _SCHEME.match(location) is not None


def _expanded(path: str, info: ValidationInfo) -> str:
    """What a path that was typed stands for; ValueError if that is nothing."""
    if not info.context:
        return path
    if not path:
        raise ValueError("got an empty path; write . for the current folder, or null where the path may be left out")
    if "\0" in path:
        raise ValueError(f"got {path!r}; a path cannot hold a NUL character")
    if is_remote(path) or ("$" in path and os.path.lexists(path)):
        return path
    for name in ("".join(names) for names in _VARIABLE.findall(path)):
        if name not in os.environ:
            raise ValueError(f"got {path!r}; the environment variable {name!r} is not set: set it, or write its value")
    return os.path.expanduser(os.path.expandvars(path))


def _with_expanded_key_file(transform: str, info: ValidationInfo) -> str:
    name, _, file = transform.partition(":")
    return f"{name}:{_expanded(file, info)}" if file and name == "permute" else transform


Location = Annotated[str, AfterValidator(_expanded)]
Transform = Annotated[str, AfterValidator(_with_expanded_key_file)]
MOST = 2**40  # of anything that is counted: more is a slip, and would not fit into 64 bits when it is multiplied
MOST_WIDE = 2**20  # of what memory is spent on at once
Count = Annotated[int, Field(ge=1, le=MOST)]
Whole = Annotated[int, Field(ge=0, le=MOST)]
Width = Annotated[int, Field(ge=1, le=MOST_WIDE)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0.1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Augment:
    """What happens to a training file of a source, as published: see data/streaming/augment.py. Evaluation files go in
    as they are."""

    __pydantic_config__ = _STRICT

    encoding: str
    """What the model gets: tiff, png, jpeg:60, fhwc, fchw for pictures; wav:int16, mp3, flac, … for sound."""
    image_size: Width = 224
    """Pixels of the square that is cropped from a picture."""
    sample_rate_hz: Count = 16_000
    """Sound is resampled to it."""
    seconds: Positive = 1.0
    """Sound is cut, or filled up with silence, to this length."""
    background: Location | None = None
    """Folder of recordings, parts of which are added softly to every sound; default: none is."""
    mixup: bool = True
    """Blend every sound with another one, and the classes likewise."""
    speeds: tuple[Positive, ...] = ()
    """Factors, one of which is chosen for every sound; default: the speed stays (published)."""


@dataclass(frozen=True)
class Source:
    """One packed dataset."""

    __pydantic_config__ = _STRICT

    path: Location
    """Folder that tools/pack.py made (it holds dataset.json), or its URL: s3://, gs://, http(s)://, or a command
    that writes a file of it to its standard output, as in `pipe:ssh host cat /data/{file}`."""
    weight: Positive = 1.0
    """Share of the samples of every step, relative to the other sources' weights; see data.mixture."""
    eval_path: Location | None = None
    """Dataset for evaluation; default: `path`. For sources that are augmented: training files are kept as they came,
    evaluation files are packed in the encoding that the model is to take."""
    augment: Augment | None = None
    """Decode, augment and encode again while training."""


@dataclass(frozen=True)
class Data:
    """What is read, and how the global batch of a step is made."""

    __pydantic_config__ = _STRICT

    sources: tuple[Source, ...]
    """Datasets that are mixed. Classes of equal name are one class; the head has the union of all."""
    mixture: Literal["weights", "proportional", "sqrt"] | Temperature = "weights"
    """How the samples of a step are shared among the sources: by their weights alone; by weight times samples
    (proportional) or times the square root of samples (sqrt); or by a temperature T: weight times samples^(1/T)."""
    train_split: str = "train"
    eval_split: str = "val"
    """Evaluated during the run, where a source has it."""
    batch_samples: Width = 768
    """Samples of one step, over all ranks."""
    lanes: Width = 64
    """Equal parts of the global batch, fixed for the life of a run. A world size must divide it; a rank carries
    lanes / world size of them. How many are computed together is train.micro_batch_tokens."""
    micro_batch_bytes: Count | None = None
    """Byte budget of the smallest micro-batch, a lane's samples of a step: a start is refused when their mean would
    exceed it (the plan keeps each one near the mean)."""
    shuffle_block: Count = 4096
    """Samples of a lane's slice that are shuffled, and dealt to steps by length, together."""
    eval_batch_bytes: Count = 1_000_000
    """Byte budget of a micro-batch during evaluation; a single larger file is a batch of its own."""
    byte_transforms: tuple[Transform, ...] = ()
    """What is done to the bytes of every file, in training, evaluation and prediction, in this order: reverse,
    random_shuffle, cyclic_half_length, stride:1024, window_shuffle:1024, keep:0.1, noise:-5:5, permute or
    permute:KEYFILE, and damage: flip:0.01, truncate:0.5, skip:64; see data/streaming/byte_transforms.py."""
    max_bad_share: Share = 0.01
    """Files that cannot be read whole are replaced by others and listed in the run's quarantine.tsv, up to this share
    of a source; beyond it the run stops."""
    workers: Whole = 0
    """Loader processes per rank. 0 reads in the training process, which is fastest when nothing is decoded."""
    cache_dir: Location | None = None
    """Where shards of remote sources are kept, on a disk of the node that its ranks share; default: a folder of the
    user in the system's temporary folder."""
    fetch_tries: Count = 9
    """Times that a remote file is asked for while its server fails: with pauses of 1, 2, 4, … s, 4 minutes by default,
    besides what a try takes. Standard error names each try that failed. After the last one the run ends with code 1,
    which launchers start again."""
    cache_gb: Positive = 100.0
    """Size of that cache in 1e9 bytes; what was not used for longest makes room."""


@dataclass(frozen=True)
class Model:
    """Shape of the model: see model/sizes.py."""

    __pydantic_config__ = _STRICT

    size: Literal["tiny", "small", "base", "huge", "custom"] = "tiny"
    kernel: Annotated[int, Field(ge=2, le=MOST_WIDE, multiple_of=2)] = 32
    """Bytes that a token sees. The stride is half of it."""
    window: Count = 128
    """Tokens that attend to each other."""
    shift: Whole = sizes.PUBLISHED_SHIFT
    """Tokens by which the windows of every second layer are shifted."""
    max_tokens: Count = 50_000
    """Rows of the learned position table. For a file of more than max_tokens * kernel / 2 bytes its
    second half is repeated, see model/stem.py."""
    dim: Width | None = None
    """With size: custom. Likewise layers, heads (default: dim / 64) and merge_after."""
    layers: Width | None = None
    heads: Width | None = None
    merge_after: tuple[Whole, ...] | None = None
    """Layers after which pairs of tokens are merged (default: the published 0, 1, 3, 5, 7, 9)."""
    mode: Literal["masked", "as_released"] = "masked"
    """masked: padding and neighbours never change an answer. as_released: the arithmetic of Apple's released code, for
    weights that were trained with it (tools/import_corenet.py); files then need at least `kernel` bytes."""
    init: Literal["published", "smooth"] = "published"
    """Weights of step 0. smooth: bytes of near values begin alike, and positions begin as sines. Muon learns faster
    from it, and AdamW more slowly: see model/stem.py."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a fifth more time."""
    compiled: bool = False
    """Fuse what lies between matrix products, by torch.compile: for GPUs, at the price of some minutes at each start.
    It has no effect on a CPU."""

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
        )

    @property
    def least_bytes(self) -> int:
        """The shortest file that the model takes."""
        return 1 if self.mode == "masked" else self.kernel


@dataclass(frozen=True)
class Optim:
    """AdamW under a cosine, as published; or Muon beside it."""

    __pydantic_config__ = _STRICT

    name: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of blocks and mergings and the stem's kernel are updated by Muon, everything else by AdamW:
    see optim.py."""
    lr: Positive = 1e-3
    """Highest learning rate of AdamW; with `name: muon` that of embedding, positions, head, norms and biases only."""
    muon_lr: Positive = 5e-3
    """Highest learning rate of Muon; it has the shape of AdamW's over the steps."""
    muon_momentum: Share = 0.95
    """Momentum of the running mean of gradients, which Muon orthogonalises."""
    final_lr: NotNegative = 2e-5
    """Learning rate at the last step."""
    warmup_lr: NotNegative = 1e-6
    """Learning rate of the first step."""
    warmup_steps: Whole = 7500
    """Steps of the straight line from warmup_lr to lr."""
    beta1: Share = 0.9
    beta2: Share = 0.999
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.05
    """On every parameter of two or more dimensions; none on biases and norms."""
    clip_norm: NotNegative = 0.0
    """Largest norm of the global gradient; 0 leaves it alone (published)."""
    label_smoothing: Share = 0.1
    """Training only."""
    ema_decay: Share = 0.9999
    """Decay of the averaged copy of the weights, which evaluation (in training, too), bfsys.evaluate and bfsys.predict
    use; 0: none is kept."""


@dataclass(frozen=True)
class Train:
    """The loop."""

    __pydantic_config__ = _STRICT

    steps: Count = 500_456
    """Optimizer steps of the whole run; default: 300 epochs of ImageNet in batches of 768 (published)."""
    seed: Whole = 0
    """Decides the initial weights and the data order."""
    init_from: Location | None = None
    """Run, or imported weights, that step 0 starts from: their average where they keep one. The architecture must be
    the same; see init_from.py for heads and positions that differ. A run that continues takes no notice."""
    precision: Literal["fp32", "bf16"] = "bf16"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed ZeRO: 0 none, 1 optimizer state, 2 gradients, 3 parameters divided among the ranks."""
    micro_batch_tokens: Whole = 0
    """Tokens up to which a rank's lanes of a step are computed together, as one micro-batch; a single lane may have
    more. 0: on GPUs 2^27 / dim tokens, which keep a GPU busy and whose activations take about 11 GB in bf16; on CPUs a
    lane each. It may change when a run continues: the gradient stays the same sum, but for rounding."""
    log_every: Count = 20
    """Steps between lines in metrics.jsonl, TensorBoard and the console."""
    eval_every: Whole = 5000
    """Steps between evaluations; 0: only at the end."""
    save_every: Count = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: Count = 3
    """Newest checkpoints that stay on disk."""
    keep_every: Whole = 0
    """Steps between checkpoints that stay for good; 0: none do."""
    keep_best: Whole = 1
    """Checkpoints that stay because they were evaluated best; for this, eval_every should be a multiple of
    save_every."""
    best_metric: Literal["top1", "top5", "loss"] = "top1"
    """What best means, jointly over all sources."""
    max_bad_steps: Count = 3
    """Bad steps in a row (no finite number, or a spike of the loss) before the run goes back to the checkpoint before
    them and passes them over. One bad step alone is skipped if it is no number, and noted: see guard.py."""
    spike_zscore: NotNegative = 10.0
    """Robust z-score of the log-loss from which it is a spike; 0: none is."""
    hang_timeout_s: NotNegative = 0.0
    """A run without progress for so long is ended, to be started again; 0: a minute or ten times the longest interval
    so far, whichever is more."""
    collective_timeout_s: Count = 600
    """A rank that waits longer than this for the others gives up."""


# What a recipe sets, where the config does not: the recommended one learns from few files in a quarter of the steps
# (docs/experiments.md).
RECIPES: dict[str, dict] = {
    "recommended": {"model": {"init": "smooth"}, "optim": {"name": "muon", "clip_norm": 1.0}},
}


@dataclass(frozen=True)
class Config:
    """A whole run."""

    __pydantic_config__ = _STRICT

    data: Data
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    recipe: Literal["published", "recommended"] = "published"
    """Which defaults model and optim have. published: those that are documented here. recommended: model.init is
    smooth, optim.name muon and optim.clip_norm 1, which learns faster from people's own files. A run's own config.yaml
    gives every value, so it changes nothing there."""
    name: str = ""
    """Of the run's directory; default: the config file's name."""
    runs_dir: Location = "runs"

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read and check a config; raises UserError with every problem."""
    config = typed_yaml.load(Config, path, overrides, {"recipe": RECIPES})
    if not config.name:
        config = replace(config, name=Path(path).stem)
    problems = []
    data, train, optim = config.data, config.train, config.optim
    if not data.sources:
        problems.append("data.sources: the list is empty; give at least one `- path: FOLDER`")
    if set("/\0") & set(config.name) or config.name.startswith("."):
        problems.append(f"name: got {config.name!r}; a plain folder name is expected, runs_dir says where")
    for key, text in (("name", config.name), ("runs_dir", config.runs_dir)):
        if any("\ud800" <= character <= "\udfff" for character in text):
            problems.append(f"{key}: got {text!r}, which is not text in UTF-8; TensorBoard and safetensors want that")
    if data.sources and data.batch_samples < data.lanes * len(data.sources):
        problems.append(  # fewer could leave a lane without a sample in some step
            f"data.lanes: {data.lanes} lanes of {len(data.sources)} sources need batch_samples of "
            f"{data.lanes * len(data.sources)} or more, got {data.batch_samples}"
        )
    if optim.warmup_steps > train.steps:
        problems.append(f"optim.warmup_steps: got {optim.warmup_steps}, more than the run's train.steps {train.steps}")
    if optim.final_lr > optim.lr:
        problems.append(f"optim.final_lr: got {optim.final_lr}, more than optim.lr {optim.lr}, which it ends")
    problems += _sources_given_twice(data.sources)
    with collecting(problems):
        config.model.architecture()
    if problems:
        raise UserError(*(f"config {path}: {p}" for p in problems))
    return config


def _sources_given_twice(sources: tuple[Source, ...]) -> list[str]:
    paths: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        paths[source.path.rstrip("/") if is_remote(source.path) else os.path.realpath(source.path)].append(source.path)
    return [
        f"data.sources: {' = '.join(dict.fromkeys(same))} is given twice; give it once, with a larger weight"
        for same in paths.values()
        if len(same) > 1
    ]

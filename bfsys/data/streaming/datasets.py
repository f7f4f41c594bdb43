"""The datasets of a config, opened: the same split of each, the union of their classes, and the plan over them."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bfsys.config import Config
from bfsys.data.media.pictures import PECULIARITIES, peculiarities_of
from bfsys.data.storage.classes import Spelling, notes_on_classes, too_alike
from bfsys.data.storage.remote import Cache
from bfsys.data.storage.shards import Dataset, Split, open_dataset
from bfsys.data.storage.streams import PIPE
from bfsys.data.streaming.augment import Augmentation
from bfsys.data.streaming.byte_transforms import ByteTransform, lengths_after, parse_transforms
from bfsys.data.streaming.jitter import Jitter
from bfsys.data.streaming.mix import mixture_weights
from bfsys.data.streaming.plan import Plan
from bfsys.errors import UserError, collecting, counted, one_line
from bfsys.locations import is_remote

# The content of dataset.json by the location of a remote dataset.
Descriptions = Mapping[str, dict]
# Number of files of an augmented source that are examined for content that decoding drops.
LOOKED_INTO = 200


@dataclass(frozen=True, eq=False)
class OpenSource:
    """One split of a source."""

    number: int  # position of the source in the config
    name: str  # does not depend on the split
    origin: str  # name for the quarantine; a separate evaluation dataset has a separate name
    split: Split
    label_map: np.ndarray  # the position of each of the dataset's classes in those of the run
    augmentation: Augmentation | None = None  # of training sources, as is the jitter
    jitter: Jitter | None = None


@dataclass(frozen=True)
class Sources:
    """One split of each source. A source without the split (for example, an evaluation split) is left out."""

    classes: tuple[str, ...]
    opened: tuple[OpenSource, ...]
    transforms: tuple[ByteTransform, ...] = ()

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(source.split for source in self.opened)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self.opened)

    @property
    def sizes(self) -> dict[tuple[str, str], int]:
        """Number of samples by (split, source), for `Quarantine.share`."""
        return {(source.split.split, source.origin): len(source.split) for source in self.opened}

    def key_of(self, source: int, sample: int) -> str:
        """A readable name of the sample: its source and its key."""
        return f"{self.opened[source].name}/{self.opened[source].split.key(sample)}"


def make_cache(config: Config) -> Cache:
    folder = config.data.cache_dir or Path(tempfile.gettempdir()) / f"bfsys-cache-{os.getuid()}"
    return Cache(
        Path(folder),
        int(config.data.cache_gb * 1e9),
        attempts=config.data.fetch_tries,
        is_private=config.data.cache_dir is None,
    )


def open_training(config: Config, descriptions: Descriptions | None = None) -> Sources:
    """The training split of every source, and the union of their classes, which are the rows of the head.

    Raises UserError with all problems.
    """
    datasets = _open_datasets(config, [source.path for source in config.data.sources], descriptions or {})
    classes = sorted({name for dataset in datasets for name in dataset.classes})
    return _open_sources(config, datasets, config.data.train_split, classes, training=True)


def open_evaluation(
    config: Config, split: str, classes: Sequence[str], descriptions: Descriptions | None = None
) -> Sources:
    """A split of the sources that have it; possibly of no source. Raises UserError with all problems."""
    datasets = _open_datasets(config, _evaluated(config), descriptions or {})
    return _open_sources(config, datasets, split, classes, training=False)


def no_such_split(config: Config, split: str) -> UserError:
    """The error for a split that no source has. It names the existing splits."""
    there = ", ".join(evaluable_splits(config, {}))
    return UserError(f"no source of the run has a split {split!r}; there are: {there}")


def evaluable_splits(config: Config, descriptions: Descriptions) -> list[str]:
    """The names of all splits in the sources' evaluation data."""
    datasets = _open_datasets(config, _evaluated(config), descriptions)
    return sorted({name for dataset in datasets for name in dataset.splits})


def _evaluated(config: Config) -> list[str]:
    return [source.eval_path or source.path for source in config.data.sources]


def fetch_descriptions(config: Config) -> Descriptions:
    """The dataset.json of every remote dataset of a config. Raises UserError with the problems."""
    check_patience(config)
    return {dataset.location: dataset.description for dataset in _open_datasets(config, _remote(config), {})}


def check_patience(config: Config) -> None:
    """Raise UserError if the tries to fetch a remote file may take longer than other ranks wait for this rank."""
    cache = make_cache(config)
    if _remote(config) and cache.patience_s >= config.train.collective_timeout_s:
        raise UserError(
            f"data.fetch_tries: {cache.attempts} tries to fetch a file may take {cache.patience_s:.0f} s, but ranks "
            f"wait for each other for {config.train.collective_timeout_s} s (train.collective_timeout_s); lower the "
            "number of tries, or raise the timeout"
        )


def _remote(config: Config) -> list[str]:
    paths = [path for source in config.data.sources for path in (source.path, source.eval_path) if path]
    return list(dict.fromkeys(filter(is_remote, paths)))


def _open_datasets(config: Config, locations: Sequence[str], descriptions: Descriptions) -> list[Dataset]:
    cache, datasets = make_cache(config), []
    problems: list[str] = []
    for location in locations:
        with collecting(problems):
            datasets.append(open_dataset(location, cache, descriptions.get(location)))
    if problems:
        raise UserError(*problems)
    return datasets


def _open_sources(
    config: Config, datasets: Sequence[Dataset], split: str, classes: Sequence[str], *, training: bool
) -> Sources:
    number_of = {name: i for i, name in enumerate(classes)}
    opened: list[OpenSource] = []
    problems: list[str] = []
    transforms: tuple[ByteTransform, ...] = ()
    with collecting(problems):
        transforms = parse_transforms(config.data.byte_transforms)
    if training:
        problems += [f"data.sources: {problem}" for problem in too_alike(_spellings(datasets))]
    for number, (name, dataset) in enumerate(zip(source_names(config), datasets, strict=True)):
        if not training and split not in dataset.splits:
            continue
        with collecting(problems):
            unknown = [one for one in dataset.classes if one not in number_of]
            if unknown:
                known = {one: Spelling(["the model"]) for one in classes}
                alike = too_alike(known | {one: Spelling([dataset.shown]) for one in unknown})
                raise UserError(
                    f"{dataset.shown}: the model does not know the classes {', '.join(unknown[:10])}", *alike
                )
            settings = config.data.sources[number]
            augment, jitter = (settings.augment, settings.jitter) if training else (None, None)
            separate = not training and settings.eval_path is not None
            opened.append(
                OpenSource(
                    number=number,
                    name=name,
                    origin=one_line(f"{name} (eval_path)" if separate else name),
                    split=dataset.open(split),
                    label_map=np.array([number_of[one] for one in dataset.classes]),
                    augmentation=Augmentation(augment) if augment else None,
                    jitter=Jitter(jitter, config.model.least_bytes, transforms) if jitter else None,
                )
            )
    if problems:
        raise UserError(*problems)
    return Sources(tuple(classes), tuple(opened), transforms)


def _spellings(datasets: Sequence[Dataset]) -> dict[str, Spelling]:
    """The spellings of each class of all datasets, with their places."""
    spellings: defaultdict[str, Spelling] = defaultdict(Spelling)
    for dataset in datasets:
        for name in dataset.classes:
            spellings[name].places.append(dataset.shown)
        for split, part in dataset.description["splits"].items():
            for name, count in part.get("class_counts", {}).items():
                spellings[name].splits |= {split} if count else set()
    return spellings


def source_names(config: Config) -> list[str]:
    """A short name for each source: the name of its folder. The source's number is added if two are equal, and if one
    of several is called "all", as the scores of all of them are."""
    names = [_folder_name(source.path) for source in config.data.sources]
    taken = [*names, *(["all"] if len(names) > 1 else [])]
    unique = [name if taken.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
    return unique if len(set(unique)) == len(unique) else [f"{name}_{i}" for i, name in enumerate(names)]


def _folder_name(location: str) -> str:
    if location.startswith(PIPE):
        name = re.search(r"([\w.+-]+)/\{file\}", location)  # without the command around it, which may contain a secret
        return name[1] if name else "pipe"
    return Path(location.partition("?")[0]).name if is_remote(location) else Path(location).resolve().name


def trained_transforms(manifest: dict) -> list[str]:
    """The identities of the byte transforms that a checkpoint was trained with."""
    return (manifest["plan"] or {}).get("byte_transforms", [])


def check_transforms(transforms: Sequence[ByteTransform], manifest: dict) -> None:
    """Raise UserError if a key file is no longer the one that a checkpoint was trained with."""
    trained = trained_transforms(manifest)
    ours = [transform.identity for transform in transforms]
    if ours != trained:
        raise UserError(
            f"data.byte_transforms: the run was trained with {trained}, now they are {ours}; restore the key"
        )


def content_facts(sources: Sources) -> dict:
    """The settings that change the bytes of files between the dataset and the model. Equal facts mean equal bytes.
    Empty if files are not changed."""
    facts: dict = {}
    if sources.transforms:
        facts["byte_transforms"] = [transform.identity for transform in sources.transforms]
    for i, source in enumerate(sources.opened):
        if source.augmentation:
            options = asdict(source.augmentation.options)
            options |= {"speeds": list(options["speeds"]), "background": source.augmentation.background}
            facts.update({f"source {i} augment.{name}": value for name, value in options.items()})
        if source.jitter:
            facts.update({f"source {i} jitter.{name}": value for name, value in asdict(source.jitter.options).items()})
    return facts


def make_plan(config: Config, sources: Sources) -> Plan:
    """The data order; raises UserError if its micro-batches would exceed the byte budget."""
    data = config.data
    weights = [data.sources[source.number].weight for source in sources.opened]
    means = [_mean_bytes(source) for source in sources.opened]
    plan = Plan(
        sources.splits,
        mixture_weights(data.mixture, weights, [max(1, len(split)) for split in sources.splits]).tolist(),
        batch_samples=data.batch_samples,
        lanes=data.lanes,
        shuffle_block=data.shuffle_block,
        seed=config.train.seed,
        mean_bytes=lengths_after(sources.transforms, np.array(means)).tolist(),
    )
    budget, mean = data.micro_batch_bytes, plan.mean_micro_batch_bytes
    if budget and mean > budget:
        lanes = -(-data.lanes * mean // budget)
        raise UserError(
            f"data.micro_batch_bytes: {data.batch_samples} samples in {counted(data.lanes, 'lane')} make "
            f"micro-batches of {mean:,.0f} bytes on average, over the budget of "
            f"{budget:,}; {lanes:.0f} or more lanes would fit"
        )
    return plan


def _mean_bytes(source: OpenSource) -> int:
    """The mean length of the files. That of augmented files is known if their encoding does not compress."""
    if source.augmentation and not source.augmentation.compresses:
        return source.augmentation.least_bytes
    return source.split.bytes // max(1, len(source.split))


def index_problems(sources: Sources, share: int, of: int) -> list[str]:
    """Problems of the index, for part `share` of `of` parts of each source's shards: see `Split.damaged_index`."""
    return [problem for split in sources.splits for problem in split.damaged_index(range(share, len(split.shards), of))]


def any_remote(sources: Sources) -> bool:
    return any(is_remote(split.dataset.location) for split in sources.splits)


def long_files(config: Config, sources: Sources) -> list[str]:
    """A note for each source with files that have more tokens than the model has positions; see model/stem.py."""
    architecture, notes = config.model.architecture(), []
    for source in sources.opened:
        split, augmentation = source.split, source.augmentation
        most = augmentation.least_bytes if augmentation else split.length_quantiles["max"]
        longest = int(lengths_after(sources.transforms, np.array([most]))[0])
        if longest <= architecture.max_bytes:
            continue
        if augmentation:
            which = f"the augmented files of {split.split}"
        else:
            lengths = lengths_after(sources.transforms, split.samples["length"].astype(np.int64))
            which = f"{np.count_nonzero(lengths > architecture.max_bytes)} of {len(split)} files in {split.split}"
        notes.append(
            f"{split.dataset.shown}: {which} are longer than the {architecture.max_bytes:,} bytes for which "
            f"model.max_tokens {architecture.max_tokens:,} has positions, up to {longest:,}: positions repeat; "
            f"model.max_tokens={-(-longest // architecture.stride)} would give each token its own position"
        )
    return notes


def notes_on_data(sources: Sources) -> list[str]:
    """Notes on the training data: classes that cannot be learned, and files of which decoding drops content."""
    counts = dict.fromkeys(sources.classes, 0)
    for split in sources.splits:
        for name, count in split.dataset.description["splits"][split.split]["class_counts"].items():
            counts[name] += count
    notes = notes_on_classes(counts, len(counts))
    for source in sources.opened:
        split, augmentation = source.split, source.augmentation
        where = split.dataset.shown
        notes += [f"{where}: {note}" for note in split.dataset.description.get("notes", [])]
        if augmentation and split.dataset.cache is None:  # remote shards are not fetched for notes
            modality = augmentation.encoding.modality
            found = Counter(name for data in first_files(split) for name in peculiarities_of(data, modality))
            looked = min(len(split), LOOKED_INTO)
            notes += [
                f"{where}: {n} of the first {looked} files have {PECULIARITIES[name]}" for name, n in found.items()
            ]
    return notes


def first_files(split: Split) -> Iterator[bytes]:
    """The content of the first files of a local split. Unreadable shards are skipped; training reports them."""
    rows = split.samples[:LOOKED_INTO]
    for number in np.unique(rows["shard"]).tolist():
        with suppress(OSError), open(split.open_shard(number), "rb") as file:
            for row in rows[rows["shard"] == number]:
                yield os.pread(file.fileno(), int(row["length"]), int(row["offset"]))

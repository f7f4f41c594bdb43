"""A summary of a run before it starts: config, model size, batch arithmetic, data. Nothing is trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from bfsys import typed_yaml
from bfsys.checkpoint.store import Store, StoreError
from bfsys.config import Config
from bfsys.data.streaming.datasets import Sources, check_patience
from bfsys.data.streaming.plan import fitting_world_sizes, lanes_of_rank
from bfsys.data.streaming.run_data import RunData, open_run_data
from bfsys.dist import Ranks
from bfsys.errors import UserError, collecting, counted
from bfsys.init_from import initial_weights
from bfsys.locations import without_secrets
from bfsys.micro_batches import largest_micro_batch, micro_batches_of
from bfsys.model.byteformer import ByteFormer, parameter_count
from bfsys.model.layout import token_counts
from bfsys.run_dir import newest_checkpoint, notes_on_resume, run_facts

# Tries for a remote file. There are few, since a user waits for the result and can run the command again.
DRY_RUN_TRIES = 2


def dry_run(config: Config, world_size: int, *, with_data: bool) -> None:
    """Print what a run would do. Raises UserError with the problems of config and data."""
    print(typed_yaml.dump(without_secrets(typed_yaml.to_tree(config))))
    check_patience(config)
    problems: list[str] = []
    tries = min(DRY_RUN_TRIES, config.data.fetch_tries)
    config = replace(config, data=replace(config.data, fetch_tries=tries))
    data, architecture = config.data, config.model.architecture()
    fitting = fitting_world_sizes(data.lanes)
    shared = counted(data.lanes, "lane")
    print(f"batch       {data.batch_samples} samples a step in {shared}; world sizes that fit: {fitting}")
    print(f"model       {config.model.size}: positions for files of up to {architecture.max_bytes:,} bytes; the "
          f"token merges reduce {architecture.alignment} tokens to one")  # fmt: skip
    with collecting(problems):
        for note in check_copies(config):
            print(note)
    if not with_data:
        print(f"parameters  {parameter_count(architecture, 1) - architecture.dim - 1:,} and {architecture.dim + 1} "
              "per class (data not opened)")  # fmt: skip
        with collecting(problems):
            lanes_of_rank(data.lanes, 0, world_size)
        if problems:
            raise UserError(*problems)
        return
    opened = None
    with collecting(problems):
        opened = open_run_data(config, Ranks())
        classes = len(opened.training.classes)
        print(f"parameters  {parameter_count(architecture, classes):,} with {counted(classes, 'class')}")
        _show_sources(data.train_split, opened.training)
        _show_plan(opened)
        if notes := notes_on_start(opened):
            print("\n".join(notes))
        _show_sources(data.eval_split, opened.validation)
        for note in opened.notes:
            print(f"note        {note}")
    with collecting(problems):
        lanes = len(lanes_of_rank(data.lanes, 0, world_size))
        if opened:
            _, largest = largest_micro_batch(opened, Ranks(), data.lanes)
            on_gpu, on_cpu = (micro_batches_of(lanes, largest, config, on_gpu=gpu) for gpu in (True, False))
            counts = f"{on_cpu}" if on_cpu == on_gpu else f"{on_gpu} on large GPUs, {on_cpu} on CPUs"
            print(f"ranks       {world_size}, each {counted(lanes, 'lane')}; micro-batches a step: {counts}")
    if problems:
        raise UserError(*problems)


def check_copies(config: Config) -> list[str]:
    """Check that the object store of train.checkpoint_copy, if any, can be written. Raises UserError if it cannot."""
    if not config.copy_url:
        return []
    try:
        Store(config.copy_url, pauses_s=()).probe()
    except StoreError as error:
        raise UserError(f"train.checkpoint_copy: {error}") from None
    return [f"copies      {config.copy_url}: can be written"]


def notes_on_start(data: RunData) -> list[str]:
    """Notes on the checkpoint from which a run would resume, or on the weights that train.init_from would copy. Raises
    UserError if the run could not start."""
    path, manifest = newest_checkpoint(data.config, run_facts(data))
    if path:
        notes = notes_on_resume(data.config, path, manifest)
        return [f"checkpoint  {path}: a start resumes from it, if it is intact", *notes]
    classes = data.training.classes
    with torch.device("meta"):
        model = ByteFormer(data.config.model.architecture(), len(classes), with_content=data.config.content_weight > 0)
    return initial_weights(model, data.config, classes, Ranks())[1]


def _show_sources(split: str, sources: Sources) -> None:
    if not sources.splits:
        print(f"{split:<11} no source has this split: nothing will be evaluated")
    for source in sources.opened:
        part = source.split
        files, shards = counted(len(part), "file"), counted(len(part.shards), "shard")
        print(
            f"{split:<11} {source.name}: {files}, {part.bytes / 1e6:,.1f} MB in {shards}, "
            f"median {part.length_quantiles['50%']:,} bytes, longest {part.length_quantiles['max']:,}"
        )


def _show_plan(data: RunData) -> None:
    config, plan = data.config, data.plan
    architecture, steps = config.model.architecture(), data.first_steps()
    for source, share in zip(data.training.opened, plan.mixture.shares, strict=True):
        epochs = config.train.steps * plan.batch_samples * share / len(source.split)
        about = f"{100 * share:.1f} % of each step, {epochs:.1f} epochs in {config.train.steps:,} steps"
        print(f"mixture     {source.name}: {about}")
    sizes = np.array([[batch.stored_bytes for batch in lanes] for lanes in steps], np.float64)
    lengths = np.concatenate([batch.lengths for lanes in steps for batch in lanes])
    tokens = token_counts(lengths, architecture, config.model.mode)
    rounded = -(-tokens // architecture.alignment) * architecture.alignment
    print(
        f"lane        {sizes.mean() / 1e3:,.1f} kB a step on average, {sizes.max() / 1e3:,.1f} at most; "
        f"busiest lane of a step {np.mean(sizes.max(1) / sizes.mean(1)):.3f} x the mean; "
        f"{tokens.sum() / len(steps):,.0f} tokens a step, {100 * (1 - tokens.sum() / rounded.sum()):.1f} % rounding"
    )

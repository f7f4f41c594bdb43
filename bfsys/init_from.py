"""Initial weights from another run, or from imported weights (train.init_from).

Tensors are matched by name, and the console shows which ones are copied. The head belongs to the classes, so it is
copied only if the classes are the same, in the same order. A head that merely has the same size would give wrong names.
A row of the position table belongs to a place in the file, so if the tables differ in length, the rows that both have
are copied. All other tensors must have equal shapes, or the run does not start. Rejected alternative: stretching
positions to another length, because the rows stand for places, not for shares of a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor, nn

from bfsys import dist
from bfsys.checkpoint.files import CONTENT_HEAD, find_whole
from bfsys.checkpoint.loading import read_weights
from bfsys.config import Config
from bfsys.data.streaming.byte_transforms import parse_transforms
from bfsys.data.streaming.datasets import trained_transforms
from bfsys.errors import UserError

HEAD = ("head.weight", "head.bias")
POSITIONS = "stem.positions"


def initial_weights(
    model: nn.Module, config: Config, classes: Sequence[str], ranks: dist.Ranks
) -> tuple[dict[str, Tensor], list[str]]:
    """(float32 weights by name, notes on what was copied) for a run at step 0; collective.

    Both are empty without train.init_from. Weights that cannot be copied are those of `model`. Raises AgreedError if
    there is no intact checkpoint, or if its architecture is different.
    """
    origin = config.train.init_from
    if origin is None:
        return {}, []
    path = dist.on_rank0(lambda: _origin(Path(origin)), ranks)
    return dist.same_errors_on_all(lambda: _take_over(model, config, classes, path))


def _origin(run: Path) -> Path:
    try:
        return find_whole(run)
    except UserError as error:
        raise UserError(*(f"train.init_from: {problem}" for problem in error.problems)) from None


def _take_over(
    model: nn.Module, config: Config, classes: Sequence[str], path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    theirs, their_config, manifest = read_weights(path)
    _check_architecture(config, their_config, path)
    kind = "averaged weights" if their_config.optim.ema_decay else "weights"
    notes = [f"starting from the {kind} of {path}"]
    weights = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    if manifest["classes"] == list(classes):
        notes.append(f"  the head is copied: the {len(classes)} classes are the same")
    else:
        notes.append(
            f"  the head starts from new weights: {len(classes)} classes here, {len(manifest['classes'])} there"
            + (", of other names or in another order" if len(classes) == len(manifest["classes"]) else "")
        )
        theirs = {name: value for name, value in theirs.items() if name not in HEAD}
    ours_rows, their_rows = len(weights[POSITIONS]), len(theirs[POSITIONS])
    if ours_rows != their_rows:
        both = min(ours_rows, their_rows)
        rest = (
            f"the other {ours_rows - both:,} start from new weights" if ours_rows > both else "the others are left out"
        )
        notes.append(f"  {both:,} of {their_rows:,} positions are copied; {rest}")
        weights[POSITIONS][:both] = theirs.pop(POSITIONS)[:both]
    if config.content_weight and not their_config.content_weight:
        notes.append("  the content head starts from new weights: the other run has none")
    elif their_config.content_weight and not config.content_weight:
        notes.append("  the content head is not copied: this run has none")
        theirs = {name: value for name, value in theirs.items() if not name.startswith(CONTENT_HEAD)}
    if their_config.model.pool != config.model.pool:
        notes.append("  the query of model.pool starts at zero, so tokens are first averaged: the other run has none")
    if their_config.model.mode != config.model.mode:
        notes.append(f"  model.mode was {their_config.model.mode} there and is {config.model.mode} here")
    read_there = trained_transforms(manifest)
    read_here = [transform.identity for transform in parse_transforms(config.data.byte_transforms)]
    if read_there != read_here:
        there, here = (", ".join(transforms) or "none" for transforms in (read_there, read_here))
        notes.append(f"  data.byte_transforms were {there} there and are {here} here, so the model reads other bytes")
    weights.update(theirs)
    return weights, notes


def _check_architecture(config: Config, other: Config, path: Path) -> None:
    ours, theirs = config.model.architecture(), other.model.architecture()
    # Attention pooling initially equals the mean
    pool = ours.pool if theirs.pool == "mean" else theirs.pool
    different = asdict(replace(theirs, max_tokens=ours.max_tokens, pool=pool))
    problems = [
        f"train.init_from: {path}: {name} is {_short(different[name])} there and {_short(value)} here"
        for name, value in asdict(ours).items()
        if different[name] != value
    ]
    if problems:
        raise UserError(
            *problems,
            "train.init_from: the architecture must be the same, except that max_tokens may differ and pool may change "
            "from mean to attention",
        )


def _short(value: int | str | tuple[int, ...]) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)

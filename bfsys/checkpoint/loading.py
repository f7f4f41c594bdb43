"""Loading: a checkpoint into an engine on any number of ranks, or its weights into a model.

For an engine, one rank reads and hashes each file, and then sends its tensors to the other ranks. If a file is damaged
or missing, all ranks take the previous checkpoint. Rejected alternative: rank 0 reads everything to verify it, and then
all ranks read everything again to load it.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from bfsys import dist, typed_yaml
from bfsys.checkpoint.files import (
    CONTENT_HEAD,
    MANIFEST,
    METRICS,
    all_checkpoints,
    checksum_mismatch,
    cover,
    find_whole,
    manifest_or_problems,
    move_aside,
    parse_piece,
    read_manifest,
    step_of,
    with_retries,
)
from bfsys.config import Config, Model, Optim
from bfsys.engine import WEIGHT, Engine
from bfsys.errors import UserError
from bfsys.files import begins_with, describe, exists, read_regular, replace_by_copy
from bfsys.model.byteformer import ByteFormer
from bfsys.optim import EMA
from bfsys.process import usable_cores


def resume(
    engine: Engine,
    run_dir: Path,
    ranks: dist.Ranks,
    say: Callable[[str], None],
    replace_damaged: Callable[[Path, int], Path | None] = lambda path, after: None,
) -> dict:
    """Restore the newest intact checkpoint of a run into the engine; collective. Returns its manifest.

    Damaged newer checkpoints are reported through `say` and moved aside. `replace_damaged` (collective) gets one, and
    the step of the next older checkpoint (-1 if there is none). It may fetch a copy of a step between them, and returns
    its path. Raises AgreedError if no checkpoint is intact.
    """
    damaged: list[Path] = []
    paths = dist.on_rank0(lambda: list(reversed(all_checkpoints(run_dir))), ranks)
    for path, after in zip(paths, [*map(step_of, paths), -1][1:], strict=True):
        manifest, problems = _load_checkpoint(engine, path, ranks)
        for problem in problems:
            say(f"skipped a damaged checkpoint: {problem}")
        if problems and (copy := replace_damaged(path, after)):
            if copy != path:  # otherwise the copy has taken its place
                damaged.append(path)
            path = copy
            manifest, problems = _load_checkpoint(engine, path, ranks)
        if manifest is not None and not problems:
            dist.on_rank0(partial(_tidy, run_dir, path, manifest, damaged), ranks)
            return manifest
        damaged.append(path)
    raise dist.AgreedError(
        f"{run_dir}: no intact checkpoint, see above; to start from scratch, set another name=… "
        "or move the directory away"
    )


def _load_checkpoint(engine: Engine, path: Path, ranks: dist.Ranks) -> tuple[dict | None, list[str]]:
    manifest, problems = dist.on_rank0(partial(manifest_or_problems, path), ranks)
    return manifest, problems if manifest is None else _load(engine, path, manifest, ranks)


def _tidy(run_dir: Path, path: Path, manifest: dict, damaged: list[Path]) -> None:
    """Tidy up after `path` was loaded: restore the run's history if a crash of the machine lost it, and move damaged
    checkpoints aside, so that retention does not count them."""
    if METRICS in manifest["files"]:
        live = run_dir / METRICS
        if not exists(live) or not begins_with(live, path / METRICS):
            replace_by_copy(live, path / METRICS)
    for other in damaged:
        move_aside(other)


def _load(engine: Engine, path: Path, manifest: dict, ranks: dist.Ranks) -> list[str]:
    """Restore weights, moments and average; collective.

    Returns the problems of a damaged checkpoint. The engine is then only partly loaded, and the caller must load
    another checkpoint. Raises AgreedError if files cannot be read but may be intact.
    """
    stored = {name.partition("-")[0] for name in manifest["files"]}
    for state in engine.state_names():
        # If the checkpoint has no average, the average starts at the weights.
        origin = WEIGHT if state == EMA and EMA not in stored else state
        mine, problems = dist.same_errors_on_all(partial(_read_share, path, manifest, origin, ranks))
        if dist.agree_on_max(bool(problems))[0]:
            return [p for of_rank in dist.gather_to_all(problems) for p in of_rank]
        found = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
        _check_shapes(engine.parameter_shapes(WEIGHT), found, path)
        expected = engine.parameter_shapes(state)
        pieces = [piece for of_rank in dist.gather_to_rank0(list(mine)) for piece in of_rank]
        if not dist.on_rank0(partial(cover, pieces, expected), ranks):
            return [f"{path}: its {origin} files do not hold the whole state"]
        engine.write_state(state, _FromOwners(mine, expected, engine.device))
    engine.set_step(manifest["step"], manifest["updates"])
    return []


def _read_share(path: Path, manifest: dict, state: str, ranks: dist.Ranks) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors, problems) of the files of a state that this rank reads."""
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    names = [n for n in manifest["files"] if n.startswith(f"{state}-")]
    if state == WEIGHT:  # files that hold no state are verified too
        names += [n for n in manifest["files"] if not n.endswith(".safetensors")]
    for name in names[ranks.rank :: ranks.world_size]:
        try:
            if not name.endswith(".safetensors"):
                if with_retries(describe, path / name) != manifest["files"][name]:
                    problems.append(checksum_mismatch(path / name))
                continue
            content = with_retries(read_regular, path / name)
            if {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} != manifest["files"][name]:
                problems.append(checksum_mismatch(path / name))
            else:
                tensors |= parse_safetensors(content)
        except OSError as error:
            problems.append(f"{path / name}: {error.strerror}")
        except SafetensorError as error:
            problems.append(f"{path / name}: {error}")
    return tensors, problems


class _FromOwners:
    """Whole tensors by parameter name, from the pieces that the ranks have read. Each element was read by one rank.
    Look-ups are collective: all ranks must make the same ones in the same order."""

    def __init__(self, mine: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        self._shapes, self._device = shapes, device
        self._pieces: dict[str, list[str]] = {}  # pieces of this rank, by parameter
        self._mine = mine
        for piece in mine:
            self._pieces.setdefault(parse_piece(piece)[0], []).append(piece)

    def __getitem__(self, name: str) -> Tensor:
        # One all-reduce per parameter, however many ranks have pieces. Adding zeros to integers changes no bit.
        whole = torch.zeros(math.prod(self._shapes[name]), dtype=torch.int32, device=self._device)
        for piece in self._pieces.get(name, ()):
            _, first, end = parse_piece(piece)
            whole[first:end] = self._mine.pop(piece).flatten().view(torch.int32).to(self._device)
        return dist.all_reduce(whole).view(torch.float32).view(self._shapes[name])


def _check_shapes(expected: dict, found: dict, path: Path) -> None:
    if expected != found:
        differing = sorted({name for name, _ in set(expected.items()) ^ set(found.items())})
        raise dist.AgreedError(
            f"{path}: a checkpoint of another model: {len(differing)} parameters are missing, superfluous or of "
            f"another shape ({', '.join(differing[:6])}, …)"
        )


def set_weights(engine: Engine, weights: Mapping[str, Tensor]) -> None:
    """Set the float32 weights, and the average, of an engine at step 0; collective."""
    engine.write_state(WEIGHT, weights)
    if EMA in engine.state_names():
        engine.write_state(EMA, weights)


def newest_readable(run_dir: Path) -> tuple[Path | None, dict, list[str]]:
    """The newest checkpoint with a manifest, whether or not its files are intact, the manifest, and the problems of
    newer ones."""
    problems = []
    for path in reversed(all_checkpoints(run_dir)):
        manifest, found = manifest_or_problems(path)
        problems += found
        if manifest:
            return path, manifest, problems
    return None, {}, problems


def check_same_run(path: Path, manifest: dict, facts: dict, origin: str = "") -> None:
    """Raise UserError with the differences unless the checkpoint has this model, these classes and this data.

    `origin` is the URL that it was fetched from.
    """
    problems, where = [], origin or str(path)
    if "imported" in manifest:
        raise UserError(
            f"{where}: imported weights, not a run that can be resumed; give this run a name of its own (name=…) and "
            f"train.init_from={path.parent.parent}"
        )
    # Settings that are newer than the checkpoint get their defaults.
    theirs, ours = (
        {
            "model": typed_yaml.to_tree(Model()) | c["model"],
            "optim": _of_optim(c),
        }
        for c in (manifest["config"], facts["config"])
    )
    parts = [(part, theirs[part], ours[part]) for part in theirs]
    for part, old, new in (*parts, ("data plan", manifest["plan"], facts["plan"])):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) and key not in ("activation_checkpointing", "compiled"):
                problems.append(f"{part}: {key} was {old.get(key)!r}, is now {new.get(key)!r}")
    if manifest["classes"] != facts["classes"]:
        problems.append(
            f"classes: the run was started with {len(manifest['classes'])} classes and the data has "
            f"{len(facts['classes'])} now, or their names differ"
        )
    if remedy := _remedy(manifest["config"], facts["config"]):
        problems.append(f"to resume it, add {remedy}")
    if problems:
        place = "the object store" if origin else "the run directory"
        raise UserError(
            *(f"{where}: {p}" for p in problems),
            f"{place} holds a run with other settings: give this one a name of its own (name=…), or restore these "
            "settings",
        )


def _of_optim(config: dict) -> dict:
    """The settings of the optimizer that decide which parameters and states exist."""
    optim = config["optim"]
    is_on = optim.get("content_loss", Optim.content_loss) and not config.get("data", {}).get("byte_transforms")
    return {"name": optim.get("name", Optim.name), "content_loss": "on" if is_on else "off"}


def _remedy(theirs: dict, ours: dict) -> str:
    """The overrides with which this config can resume the checkpoint if their recipes differ; "" if none are needed."""
    old, new = (
        {
            f"{section}.{key}": value
            for section, defaults in (("optim", Optim()), ("model", Model()))
            for key, value in (typed_yaml.to_tree(defaults) | config[section]).items()
        }
        for config in (theirs, ours)
    )
    of_model = ("model.pool", "model.init")
    if _of_optim(theirs) == _of_optim(ours) and all(old[key] == new[key] for key in of_model):
        return ""
    keys = ("optim.name", "optim.clip_norm", "optim.content_loss", *of_model)
    return " ".join(f"{key}={old[key]}" for key in keys if old[key] != new[key])


def load_model(run: Path, *, average: bool = True) -> tuple[ByteFormer, Config, dict]:
    """(model in eval mode on the CPU, config, manifest) of a run directory or of one checkpoint directory.

    `average` takes the EMA where the run keeps one. Needs no DeepSpeed.
    """
    while True:
        path = find_whole(run)
        try:
            weights, config, manifest = read_weights(path, average=average)
            break
        except (OSError, UserError):
            if exists(path) or path == run:
                raise  # otherwise training has pruned it meanwhile, and there is a newer one
    if torch.get_num_threads() > usable_cores():  # PyTorch does not know the quota of a container
        torch.set_num_threads(usable_cores())
    model = ByteFormer(config.model.architecture(), len(manifest["classes"]), config.model.mode).float()
    try:
        model.load_state_dict({name: value for name, value in weights.items() if not name.startswith(CONTENT_HEAD)})
    except RuntimeError:  # other names or shapes
        raise UserError(
            f"{path}: its weights are not those of the model that its config describes; it was written by another "
            f"version of bfsys ({manifest.get('versions', {}).get('bfsys', 'unknown')}), or changed"
        ) from None
    if not manifest["step"] and "imported" not in manifest:
        print(f"note: {path}: no training step is saved yet, so the weights are the initial ones", file=sys.stderr)
    return model.eval(), config, manifest


def read_weights(path: Path, *, average: bool = True) -> tuple[dict[str, Tensor], Config, dict]:
    """(float32 weights by parameter name, config, manifest) of a checkpoint that is known to be intact."""
    manifest = read_manifest(path)
    config = typed_yaml.from_tree(Config, manifest["config"], f"{path / MANIFEST}: config")
    state = EMA if average and config.optim.ema_decay else WEIGHT
    weights = {name: torch.empty(shape, dtype=torch.float32) for name, shape in manifest["shapes"].items()}
    pieces: list[str] = []
    incomplete = UserError(f"{path}: its {state} files do not hold the whole state")
    for file_name in manifest["files"]:
        if file_name.startswith(f"{state}-"):
            for piece, tensor in parse_safetensors(read_regular(path / file_name)).items():
                pieces.append(piece)
                name, first, end = parse_piece(piece)
                part = weights[name].view(-1)[first:end] if name in weights else None
                if part is None or part.numel() != tensor.numel():
                    raise incomplete
                part.copy_(tensor.flatten())
    if not cover(pieces, manifest["shapes"]):
        raise incomplete
    return weights, config, manifest

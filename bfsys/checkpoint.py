"""Checkpoints: written beside, proven, renamed; independent of the number of ranks and the ZeRO stage.

    checkpoints/
      latest                   the name of the newest, for people; bfsys takes the newest that is whole
      step_00001000/
        manifest.json          step, classes, config, plan, the sha256 of every file and its own; written last
        weight-0-of-2.safetensors, ema-…, exp_avg-…, exp_avg_sq-…

Every tensor is stored whole under its parameter's name, and each rank holds and writes a share of them, so that
any number of ranks at any ZeRO stage can read them back, and `weight` or `ema` files alone are a model.
A directory without a manifest, or with a file that does not match it, is no checkpoint.

Refused: DeepSpeed's own format (tied to world size and stage, neither atomic nor hashed) and torch.save (a flipped
byte loads without a word).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bfsys import dist, typed_yaml
from bfsys.config import Config, Model
from bfsys.engine import WEIGHT, Engine
from bfsys.errors import UserError
from bfsys.model.byteformer import ByteFormer
from bfsys.optim import EMA

FORMAT = 1
MANIFEST = "manifest.json"


class StateSource(Protocol):
    """What a checkpoint is written from: an Engine, or weights that come from elsewhere."""

    def state_names(self) -> tuple[str, ...]: ...

    def read_state(self, state: str) -> Iterator[tuple[str, Tensor]]: ...


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def save(engine: StateSource, run_dir: Path, facts: dict, *, ranks: dist.Ranks, keep: int) -> Path:
    """Write the checkpoint of step `facts["step"]`; collective. Returns its directory.

    `facts` goes into the manifest as it is. Until the final rename nothing of an earlier checkpoint is touched; if a
    rank cannot write, all ranks raise AgreedError and the earlier checkpoints stay in force.
    """
    root = checkpoints_dir(run_dir)
    final = root / checkpoint_name(facts["step"])
    work = root / f".{final.name}.part"
    dist.same_errors_on_all(lambda: _make_room(root, work) if ranks.is_first else None)
    hashes, problem = _write_share(engine, work, ranks)

    def commit() -> None:
        if problem:
            raise UserError(f"checkpoint {final}: cannot be written: {problem}; earlier ones are untouched")

    dist.same_errors_on_all(commit)
    files = {name: entry for part in dist.gather_to_all(hashes) for name, entry in part.items()}
    # Nobody goes on before the checkpoint counts.
    dist.same_errors_on_all(lambda: _commit(work, final, facts, files, keep) if ranks.is_first else None)
    return final


def _make_room(root: Path, work: Path) -> None:
    """An empty `work` directory, and none that killed saves left behind."""
    for left_over in root.glob(".step_*.part"):
        shutil.rmtree(left_over)
    work.mkdir(parents=True)


def _write_share(engine: StateSource, work: Path, ranks: dist.Ranks) -> tuple[dict[str, dict], str]:
    """This rank's files and their descriptions; and why it failed, if it did. It takes part in every collective
    all the same, since the others wait in them."""
    hashes: dict[str, dict] = {}
    problem = ""
    for state in engine.state_names():
        share = {
            name: value.to("cpu", torch.float32, copy=True).contiguous()
            for i, (name, value) in enumerate(engine.read_state(state))
            if i % ranks.world_size == ranks.rank
        }
        if not share or problem:
            continue
        file = work / f"{state}-{ranks.rank}-of-{ranks.world_size}.safetensors"
        try:
            save_file(share, file)
            hashes[file.name] = _describe(file)
        except (OSError, SafetensorError) as error:
            problem = str(error)
    return hashes, problem


def _commit(work: Path, final: Path, facts: dict, files: dict[str, dict], keep: int) -> None:
    """Write the manifest, give the directory its name, point `latest` at it, remove what is older than `keep`."""
    root = final.parent
    manifest = {"format": FORMAT, **facts, "files": dict(sorted(files.items()))}
    manifest["sha256"] = _fingerprint(manifest)
    _write_durably(work / MANIFEST, json.dumps(manifest, indent=1))
    _sync_directory(work)
    if final.exists():  # a damaged one of the same step: the run was resumed before it
        shutil.rmtree(final)
    os.rename(work, final)
    _sync_directory(root)
    _write_durably(root / "latest.part", final.name + "\n")
    os.rename(root / "latest.part", root / "latest")
    _sync_directory(root)
    # Later steps than this one are damaged, or the run would have been resumed there: they do not count.
    for old in [step for step in _steps(root) if step <= facts["step"]][:-keep]:
        shutil.rmtree(root / checkpoint_name(old))


def make_empty_folder(path: Path) -> None:
    """Make `path`, or take it if it is an empty folder; raises UserError otherwise."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise UserError(f"{path}: not empty; give a folder that is empty or does not exist")
        if not os.access(path, os.W_OK):
            raise UserError(f"{path}: cannot be written: no permission")
    except OSError as error:
        raise UserError(f"{path}: cannot be made: {error.strerror}") from None


def find_newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, or None; and what is wrong with newer ones."""
    root, problems = checkpoints_dir(run_dir), []
    for step in reversed(_steps(root)):
        path = root / checkpoint_name(step)
        found = problems_of(path)
        if not found:
            return path, problems
        problems.extend(found)
    return None, problems


def problems_of(path: Path) -> list[str]:
    """What makes a checkpoint unusable: nothing, if every file is there and has its sha256."""
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return list(error.problems)
    problems = []
    for name, entry in manifest["files"].items():
        try:
            if _describe(path / name, sync=False) != entry:
                problems.append(f"{path / name}: differs from what was written (sha256 or size)")
        except OSError as error:
            problems.append(f"{path / name}: {error.strerror}")
    return problems


def read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint; raises UserError if there is none, or it is not as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise UserError(f"{path}: format {manifest['format']!r}; this version reads {FORMAT}")
        intact = manifest.pop("sha256") == _fingerprint(manifest)
    except OSError as error:
        raise UserError(f"{path}: not a checkpoint, {MANIFEST}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise UserError(f"{path / MANIFEST}: differs from what was written")
    return manifest


def load(engine: Engine, path: Path) -> dict:
    """Restore weights, moments and EMA into the engine; collective. Returns the manifest."""
    manifest, expected = read_manifest(path), engine.parameter_shapes()
    for state in engine.state_names():
        values = _StoredTensors(path, manifest, state)
        if not values.names() and state == EMA:  # the run kept none so far: the average starts at the weights
            values = _StoredTensors(path, manifest, WEIGHT)
        if expected != values.shapes():
            differing = sorted(n for n, _ in set(expected.items()) ^ set(values.shapes().items()))
            raise UserError(
                f"{path}: a checkpoint of another model: {state} of {len(set(differing))} parameters is missing, "
                f"superfluous or of another shape ({', '.join(dict.fromkeys(differing[:6]))}, …)"
            )
        engine.write_state(state, values)
    engine.set_step(manifest["step"])
    return manifest


def set_weights(engine: Engine, weights: Mapping[str, Tensor]) -> None:
    """Give an engine at step 0 other float32 weights, from which its average starts too; collective."""
    engine.write_state(WEIGHT, weights)
    if EMA in engine.state_names():
        engine.write_state(EMA, weights)


def check_same_run(path: Path, facts: dict) -> None:
    """Raise UserError, with what differs, unless the checkpoint belongs to this model, these classes and data."""
    manifest, problems = read_manifest(path), []
    if "imported" in manifest:
        raise UserError(
            f"{path}: imported weights, not a run to go on with; give this run a name of its own (name=…) and "
            f"train.init_from={path.parent.parent}"
        )
    # Knobs that came later than the checkpoint had their default then.
    theirs, ours = typed_yaml.to_tree(Model()) | manifest["config"]["model"], facts["config"]["model"]
    for part, old, new in (("model", theirs, ours), ("data plan", manifest["plan"], facts["plan"])):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) and key != "activation_checkpointing":
                problems.append(f"{part}: {key} was {old.get(key)!r}, is now {new.get(key)!r}")
    if manifest["classes"] != facts["classes"]:
        problems.append(f"classes: {len(manifest['classes'])} then, {len(facts['classes'])} now, or other names")
    if problems:
        raise UserError(
            *(f"{path}: {p}" for p in problems),
            "the run directory holds another run: give this one a name of its own (name=…), or restore the above",
        )


def load_model(run: Path, *, average: bool = True) -> tuple[ByteFormer, Config, dict]:
    """(model in eval mode on the CPU, config, manifest) of a run directory or of one checkpoint directory.

    `average` takes the EMA where the run keeps one. Needs no DeepSpeed.
    """
    weights, config, manifest = read_weights(find_whole(run), average=average)
    model = ByteFormer(config.model.architecture(), len(manifest["classes"]), config.model.mode)
    model.load_state_dict(weights)
    return model.eval(), config, manifest


def find_whole(run: Path) -> Path:
    """The newest whole checkpoint of a run directory, or `run` itself if it is a checkpoint.

    Newer ones that are damaged are named on standard error. Raises UserError if there is no whole one.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory; runs lie in runs/NAME")
    if (run / MANIFEST).exists():
        path, problems = run, problems_of(run)
    else:
        path, problems = find_newest(run)
    for problem in problems if path != run else ():
        print(f"skipped a damaged checkpoint: {problem}", file=sys.stderr)
    if path is None or (path == run and problems):
        raise UserError(*problems or [f"{run}: holds no checkpoint yet; is it a run directory (runs/NAME)?"])
    return path


def read_weights(path: Path, *, average: bool = True) -> tuple[dict[str, Tensor], Config, dict]:
    """(float32 weights by parameter name, config, manifest) of a checkpoint that is known to be whole."""
    manifest = read_manifest(path)
    config = typed_yaml.from_tree(Config, manifest["config"], f"{path / MANIFEST}: config")
    values = _StoredTensors(path, manifest, EMA if average and config.optim.ema_decay else WEIGHT)
    return {name: values[name] for name in values.names()}, config, manifest


class _StoredTensors:
    """The tensors of one state, by parameter name; each is read when it is asked for."""

    def __init__(self, path: Path, manifest: dict, state: str) -> None:
        self._file_of = {
            name: file
            for filename in manifest["files"]
            if filename.startswith(f"{state}-")
            for file in [safe_open(path / filename, framework="pt")]
            for name in file.keys()  # noqa: SIM118 (not a dict)
        }

    def names(self) -> set[str]:
        return set(self._file_of)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)


def _steps(root: Path) -> list[int]:
    names = (re.fullmatch(r"step_(\d{8,})", p.name) for p in root.glob("step_*") if p.is_dir())
    return sorted(int(name[1]) for name in names if name)


def _fingerprint(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _describe(path: Path, sync: bool = True) -> dict:
    with open(path, "rb") as f:
        if sync:
            os.fsync(f.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

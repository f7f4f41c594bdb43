"""Checkpoints: written beside, proven, renamed; independent of the number of ranks and the ZeRO stage.

    checkpoints/
      latest                   the name of the newest
      step_00001000/
        manifest.json          step, classes, config, plan, and the sha256 of every file; written last
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
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bfsys import dist, typed_yaml
from bfsys.config import Config
from bfsys.engine import WEIGHT, Engine
from bfsys.errors import UserError
from bfsys.model.byteformer import ByteFormer
from bfsys.optim import EMA

FORMAT = 1
MANIFEST = "manifest.json"


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def save(engine: Engine, run_dir: Path, facts: dict, *, ranks: dist.Ranks, keep: int) -> Path:
    """Write the checkpoint of step `facts["step"]`; collective. Returns its directory.

    `facts` goes into the manifest as it is. Until the final rename nothing of an earlier checkpoint is touched.
    """
    root = checkpoints_dir(run_dir)
    final = root / checkpoint_name(facts["step"])
    work = root / f".{final.name}.part"
    if ranks.is_first:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    dist.barrier()  # the directory is there
    hashes: dict[str, dict] = {}
    for state in engine.state_names():
        share = {
            name: value.to("cpu", torch.float32, copy=True).contiguous()
            for i, (name, value) in enumerate(engine.read_state(state))
            if i % ranks.world_size == ranks.rank
        }
        if share:
            file = work / f"{state}-{ranks.rank}-of-{ranks.world_size}.safetensors"
            save_file(share, file)
            hashes[file.name] = _describe(file)
    files = {name: entry for part in dist.gather_to_all(hashes) for name, entry in part.items()}
    if ranks.is_first:
        manifest = {"format": FORMAT, **facts, "files": dict(sorted(files.items()))}
        _write_durably(work / MANIFEST, json.dumps(manifest, indent=1))
        _sync_directory(work)
        if final.exists():  # an unproven one of the same step: a run that was resumed before it
            shutil.rmtree(final)
        os.rename(work, final)
        _sync_directory(root)
        _write_durably(root / "latest.part", final.name + "\n")
        os.rename(root / "latest.part", root / "latest")
        _sync_directory(root)
        for old in _steps(root)[:-keep]:
            shutil.rmtree(root / checkpoint_name(old))
    dist.barrier()  # nobody goes on before the checkpoint counts
    return final


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
    """The manifest of a checkpoint; raises UserError if there is none or it is not ours."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except OSError as error:
        raise UserError(f"{path}: not a checkpoint, {MANIFEST}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path / MANIFEST}: damaged: {error}") from None
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: format {manifest.get('format')!r}; this version reads {FORMAT}")
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


def check_same_run(path: Path, facts: dict) -> None:
    """Raise UserError, with what differs, unless the checkpoint belongs to this model, these classes and data."""
    manifest, problems = read_manifest(path), []
    theirs, ours = manifest["config"]["model"], facts["config"]["model"]
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
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory; runs lie in runs/NAME")
    if (run / MANIFEST).exists():
        path, problems = run, problems_of(run)
    else:
        path, problems = find_newest(run)
    if path is None or (path == run and problems):
        raise UserError(*problems or [f"{run}: holds no checkpoint yet; is it a run directory (runs/NAME)?"])
    manifest = read_manifest(path)
    config = typed_yaml.from_tree(Config, manifest["config"], f"{path / MANIFEST}: config")
    state = EMA if average and config.optim.ema_decay else WEIGHT
    model = ByteFormer(config.model.architecture(), len(manifest["classes"]))
    values = _StoredTensors(path, manifest, state)
    model.load_state_dict({name: values[name] for name in values.names()})
    return model.eval(), config, manifest


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
    return sorted(int(p.name.removeprefix("step_")) for p in root.glob("step_[0-9]*") if p.is_dir())


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

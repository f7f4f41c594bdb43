"""A trained model for use elsewhere: its weights, and programs that run without bfsys.

The folder of an export holds model.json (architecture, classes in order, the sha256 of each file), a model card for
people (README.md, see model_card.py) and the requested ones of
  model.safetensors  weights by the names of bfsys, float32
  model.pt2          torch.export program:  torch.export.load(path).module()(bytes)
  model.onnx         the same for ONNX Runtime: input `bytes`, output `probabilities`
Both programs take the bytes of one file, uint8 [n], of any length that the model accepts, and give the probabilities of
its classes, float32 [classes]. Before the command ends, it compares the programs with the model. The programs do not
apply data.byte_transforms; the caller must, and model.json lists them.

Rejected alternative: a program for batches. Ragged batches need index arithmetic that an exported program cannot hold,
and padded batches would waste memory and time. A server can run several files at the same time.
"""

from __future__ import annotations

if __name__ == "__main__":  # `python -m bfsys.export`
    from bfsys.start import main

    main("export", "python -m bfsys.export")

import io
import json
import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import NotRequired

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from typing_extensions import TypedDict  # pydantic requires this one before Python 3.12

from bfsys import __version__, files, model_card, typed_yaml
from bfsys.batch import ByteBatch, Sample
from bfsys.checkpoint.files import EXPORTED, checksum_mismatch
from bfsys.config import Config
from bfsys.data.streaming.datasets import trained_transforms
from bfsys.errors import UserError
from bfsys.locations import without_secrets
from bfsys.model.byteformer import ByteFormer
from bfsys.model.dense import DenseByteFormer

SAFETENSORS, TORCH, ONNX = "safetensors", "torch", "onnx"
FORMATS = {SAFETENSORS: "model.safetensors", TORCH: "model.pt2", ONNX: "model.onnx"}
FORMAT = 1  # version of model.json
MOST_BYTES = 2**31 - 1  # largest file that a program accepts
MOST_BYTES_CHECKED = 100_000
TOLERANCE = {TORCH: 1e-5, ONNX: 1e-4}  # largest difference of a probability
ONNX_LIMIT_BYTES = 1_900_000_000  # a protocol buffer is limited to 2 GiB; larger weights go into a separate file


class _InputFormat(TypedDict):
    encoding: str


class _Facts(TypedDict):
    """The keys of a model.json that prediction needs. Their types are checked, since people edit the file."""

    format: int
    classes: list[str]
    step: int
    files: dict[str, dict]
    config: dict
    input_formats: NotRequired[list[_InputFormat]]
    transform_identities: NotRequired[list[str]]
    reference_files: NotRequired[dict | None]


_FACTS = TypeAdapter(_Facts)


def export(
    model: ByteFormer,
    config: Config,
    manifest: dict,
    out: Path,
    formats: list[str],
    weights: str,
    scores: dict | None = None,
) -> dict:
    """Write the files of `formats`, model.json and the model card into the folder `out`. Returns the content of
    model.json.

    `model` is in eval mode on the CPU. `scores` are those of the run's evaluation after the manifest's step, if there
    was one. Raises UserError if the answers of a program differ from the model's.
    """
    facts = describe(model, config, manifest, weights)
    if SAFETENSORS in formats:
        tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
        # safetensors' `save_file` makes a file that other users cannot read.
        files.replace_file(out / FORMATS[SAFETENSORS], save(tensors, metadata={"format": "pt"}))
    if TORCH in formats or ONNX in formats:
        program = as_program(model, facts["least_bytes"])
        if TORCH in formats:
            content = io.BytesIO()  # PyTorch aborts the process if the disk is full
            with _quiet():
                torch.export.save(program, content)
            files.replace_file(out / FORMATS[TORCH], content.getvalue())
            check(TORCH, torch_runner(out / FORMATS[TORCH]), model, facts)
        if ONNX in formats:
            write_onnx(program, out / FORMATS[ONNX])
            check(ONNX, onnx_runner(out / FORMATS[ONNX]), model, facts)
    facts["files"] = {p.name: files.describe(p) for p in sorted(out.iterdir()) if not p.name.startswith(".")}
    files.replace_file(out / EXPORTED, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    parameters = sum(p.numel() for p in model.parameters())
    files.replace_file(out / model_card.NAME, model_card.model_card(facts, manifest, config, parameters, scores))
    return facts


def describe(model: ByteFormer, config: Config, manifest: dict, weights: str) -> dict:
    return {
        "format": FORMAT,
        "architecture": asdict(model.architecture),
        "mode": model.mode,
        "least_bytes": config.model.least_bytes,
        "byte_transforms": list(config.data.byte_transforms),
        "transform_identities": trained_transforms(manifest),
        "input_formats": manifest.get("input_formats", []),
        "reference_files": manifest.get("reference_files"),
        "classes": manifest["classes"],
        "run": config.name,
        "step": manifest["step"],
        "weights": weights if config.optim.ema_decay else "last",
        "config": without_secrets(typed_yaml.to_tree(config)),
        "versions": {"bfsys": __version__, "torch": version("torch")},
    }


def read_exported(folder: Path) -> tuple[ByteFormer, Config, dict]:
    """(model in eval mode on the CPU, config, facts) of a folder that `export` wrote with safetensors.

    The facts are the content of model.json, with the keys of a checkpoint's manifest that prediction needs. Raises
    UserError for damaged or missing files.
    """
    path, weights = folder / EXPORTED, folder / FORMATS[SAFETENSORS]
    try:
        facts = json.loads(files.read_regular(path))
        if facts["format"] != FORMAT:
            raise UserError(f"{path}: format {facts['format']!r}; this version reads {FORMAT}")
        _FACTS.validate_python(facts, strict=True)
        classes, entry = facts["classes"], facts["files"].get(weights.name)
        if entry is None:
            raise UserError(f"{folder}: holds no {weights.name}; export the run again with --format {SAFETENSORS}")
        if files.describe(weights) != entry:
            raise UserError(checksum_mismatch(weights))
        config = typed_yaml.from_tree(Config, facts["config"], f"{path}: config")
        model = ByteFormer(config.model.architecture(), len(classes), config.model.mode).float()
        model.load_state_dict(load_file(weights))
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
    except SafetensorError as error:
        raise UserError(f"{weights}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):  # RuntimeError: weights of another shape
        raise UserError(
            f"{path}: is damaged, or no description that bfsys export wrote; export the run again"
        ) from None
    # Exports of earlier versions do not identify the key of `permute`.
    facts["plan"] = {"byte_transforms": facts["transform_identities"]} if "transform_identities" in facts else None
    return model.eval(), config, facts


def as_program(model: ByteFormer, least_bytes: int) -> torch.export.ExportedProgram:
    """The model for one file: uint8 [n] -> float32 [classes], with n >= least_bytes."""
    dense = DenseByteFormer(model).eval()
    # The example may have any length except 0 and 1, which would become constants.
    example = torch.zeros(max(least_bytes, 1000), dtype=torch.uint8)
    length = torch.export.Dim("n", min=least_bytes, max=MOST_BYTES)
    with torch.no_grad(), _quiet():
        return torch.export.export(dense, (example,), dynamic_shapes=({0: length},))


def write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    weights_bytes = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    with _quiet():
        torch.onnx.export(
            program,
            f=str(path),
            dynamo=True,
            input_names=["bytes"],
            output_names=["probabilities"],
            external_data=weights_bytes > ONNX_LIMIT_BYTES,
        )


def torch_runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A function uint8 [n] -> probabilities that runs an exported program."""
    with _quiet(), open(path, "rb") as file:  # PyTorch opens no path that is not UTF-8
        module = torch.export.load(file).module()

    def answer(data: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(data)).numpy()

    return answer


def onnx_runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A function uint8 [n] -> probabilities that runs ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda data: session.run(["probabilities"], {"bytes": data})[0]


def check(name: str, answer: Callable[[np.ndarray], np.ndarray], model: ByteFormer, facts: dict) -> float:
    """The largest difference from the model's probabilities. Raises UserError if it is above TOLERANCE."""
    rng, worst = np.random.default_rng(0), 0.0
    for length in lengths_to_check(model, facts["least_bytes"]):
        data = rng.integers(0, 256, length, dtype=np.uint8)
        difference = np.abs(answer(data) - probabilities(model, data).numpy()).max()
        worst = max(worst, float(difference) if np.isfinite(difference) else float("inf"))
    if worst > TOLERANCE[name]:
        raise UserError(
            f"{FORMATS[name]}: differs from the model by {worst:.1e} in a probability; {TOLERANCE[name]:.0e} are fine; "
            f"leave out --format {name}, and please report this with the versions of torch and onnxruntime"
        )
    return worst


def lengths_to_check(model: ByteFormer, least_bytes: int) -> list[int]:
    """Lengths in bytes: shorter than a token, odd, one window, several windows, and longer than a small position
    table."""
    a = model.architecture
    window = a.window * a.stride
    wanted = (1, 2, a.kernel - 1, a.kernel, a.kernel + 1, window, window + 1, 3 * window + a.stride + 1)
    longer = [a.max_bytes + a.max_bytes // 2] if a.max_bytes < MOST_BYTES_CHECKED else []
    return sorted({max(n, least_bytes) for n in (*wanted, *longer)})


@torch.no_grad()
def probabilities(model: ByteFormer, data: np.ndarray) -> Tensor:
    return model(ByteBatch.from_samples([Sample("", data)])).float().softmax(1)[0]


@contextmanager
def _quiet():
    """Hide the exporters' progress lines and warnings, which concern only their internals."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)

"""Turn ByteFormer weights that Apple published (CoreNet) into a directory that bfsys accepts like a run.

Size, kernel, positions, layers, merges and the number of classes follow from the names and shapes of the tensors. The
shapes do not show window and shift, so these must be given if they are not the published 128 and 64. The model computes
`as_released`, that is, as Apple's code does for one file at a time. Files are read with weights_only, so nothing in
them is executed. Rejected alternative: CoreNet's YAML as a source of window and shift; it would need a parser of its
own for two numbers.
"""

from __future__ import annotations

import pickle
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from bfsys import __version__, files, typed_yaml
from bfsys.checkpoint.files import filling
from bfsys.checkpoint.retention import RetentionPolicy
from bfsys.checkpoint.saving import save
from bfsys.config import Config, Data, Model, Optim
from bfsys.data.streaming.byte_transforms import parse_transforms
from bfsys.dist import Ranks
from bfsys.engine import WEIGHT
from bfsys.errors import UserError, collecting
from bfsys.files import decoded, open_regular, read_regular
from bfsys.model.layout import AS_RELEASED
from bfsys.model.sizes import BYTE_VALUES, HEAD_DIM, PAD_BYTE, PUBLISHED_MERGES, SIZES

NESTS = ("ema_model_state_dict", "model_state_dict", "state_dict", "model")  # the first existing one is used
PREFIX = "module."
EMBEDDING, KERNEL, POSITIONS = "embeddings.weight", "token_reduction_net.weight", "pos_embed.pos_embed.pos_embed"
HEAD = "classifier.weight"
DECISIVE = {EMBEDDING: 2, KERNEL: 3, POSITIONS: 4, HEAD: 2}  # name: number of dimensions
NAMES_SHOWN = 6

# CoreNet's names: names in bfsys
WHOLE_NAMES = {EMBEDDING: "stem.embedding", KERNEL: "stem.kernel", POSITIONS: "stem.positions"}
MODULES = {
    "pre_norm_mha.0": "norm1",
    "pre_norm_mha.1.qkv_proj": "qkv",
    "pre_norm_mha.1.out_proj": "proj",
    "pre_norm_ffn.0": "norm2",
    "pre_norm_ffn.1": "fc1",
    "pre_norm_ffn.4": "fc2",
    "post_transformer_norm": "norm",
    "classifier": "head",
}


class Weights:
    """Tensors with bfsys' names, as a StateSource for `save`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def state_names(self) -> tuple[str, ...]:
        return (WEIGHT,)

    def parameter_shapes(self, state: str) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read_pieces(self, state: str) -> Iterator[tuple[str, int, Tensor]]:
        return ((name, 0, tensor) for name, tensor in self.tensors.items())


def import_weights(
    weights: Path,
    out: Path,
    *,
    classes_file: Path | None,
    window: int,
    shift: int,
    heads: int | None,
    byte_transforms: Sequence[str],
) -> None:
    """Make the run directory `out` from the state dict in `weights`. Raises UserError for weights that do not fit."""
    check_windows(window, shift)
    transforms = parse_transforms(byte_transforms)
    named, nest = read_state_dict(weights)
    model = describe_model(named, window, shift, heads)
    problems: list[str] = []
    classes: list[str] = []
    with collecting(problems):
        check_tensors(named, model)
    with collecting(problems):
        classes = class_names(classes_file, len(named[HEAD]))
    if problems:
        raise UserError(*problems)

    config = Config(
        data=Data(sources=(), byte_transforms=tuple(byte_transforms)),
        model=model,
        optim=Optim(ema_decay=0.0),  # the imported weights, averaged or not, are the only ones
        name=out.resolve().name,
        runs_dir=str(out.parent),
    )
    facts = {
        "step": 0,
        "metrics": None,
        "classes": classes,
        "plan": {"byte_transforms": [t.identity for t in transforms]} if transforms else None,
        "config": typed_yaml.to_tree(config),
        "versions": {"bfsys": __version__, "torch": version("torch")},
        "imported": {"file": weights.name, "part": nest, "sha256": files.describe(weights)["sha256"]},
    }
    with filling(out):
        path = save(Weights(to_bfsys(named)), out, facts, ranks=Ranks(), keep=RetentionPolicy(1))
        (out / "config.yaml").write_text(typed_yaml.dump(config), encoding="utf-8")
    describe(config, len(classes), nest, path)


def check_windows(window: int, shift: int) -> None:
    problems = []
    if window < 1:
        problems.append(f"--window: got {window}; at least 1 is needed")
    elif shift < 0 or (shift >= window and shift % window):
        problems.append(
            f"--shift: got {shift}; with windows of {window} tokens, 0 to {window - 1} are allowed, or a multiple of "
            f"{window}, which shifts nothing (as the published 64 with windows of 32)"
        )
    if problems:
        raise UserError(*problems)


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """(tensors by CoreNet's names, the key that held them or None). No code in the file is executed."""
    try:
        with open_regular(path) as file:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        unsupported = re.search(r"Unsupported (?:global|class): (?:GLOBAL )?([\w.]+)", str(error))
        if unsupported:
            raise UserError(
                f"{path}: holds more than tensors ({unsupported[1]}), which could run code when it is loaded; "
                f"save its state dict alone: torch.save(model.state_dict(), …)"
            ) from None
        raise UserError(f"{path}: not a file that torch.save wrote, or damaged") from None
    except Exception:  # damaged archives raise RuntimeError, EOFError, KeyError, UnicodeDecodeError, …
        raise UserError(f"{path}: not a file that torch.save wrote, or damaged") from None
    nest = None
    if isinstance(found, Mapping):
        nest = next((key for key in NESTS if isinstance(found.get(key), Mapping)), None)
        found = found[nest] if nest else found
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{path}: holds a {type(found).__name__}; a state dict, tensors by name, is expected")
    others = [str(key) for key, value in found.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(
            f"{path}: holds other values than tensors: {_some(others)}; keys under which a state dict is looked for: "
            f"{', '.join(NESTS)}"
        )
    prefixed = all(str(name).startswith(PREFIX) for name in found)
    return {str(name).removeprefix(PREFIX) if prefixed else str(name): t for name, t in found.items()}, nest


def describe_model(named: Mapping[str, Tensor], window: int, shift: int, heads: int | None) -> Model:
    """Derive the model from the names and shapes. Raises UserError for shapes that no architecture has."""
    problems = [f"tensor {name}: missing" for name in DECISIVE if name not in named]
    problems += [
        f"tensor {name}: has {named[name].ndim} dimensions, not {dimensions}"
        for name, dimensions in DECISIVE.items()
        if name in named and named[name].ndim != dimensions
    ]
    if problems:
        raise UserError(*problems, "these are not weights of CoreNet's ByteFormer")
    dim, kernel, max_tokens = named[EMBEDDING].shape[1], named[KERNEL].shape[2], named[POSITIONS].shape[2]
    layers = 1 + max(_numbers(named, r"transformer\.(\d+)\."), default=-1)
    merge_after = tuple(sorted(_numbers(named, r"downsamplers\.downsample_(\d+)\.")))
    if not layers:
        raise UserError("tensors transformer.0…: missing; these are not weights of CoreNet's ByteFormer")
    if heads is None and dim % HEAD_DIM:
        raise UserError(f"{dim} channels are not a multiple of {HEAD_DIM}, the channels of a head; give --heads")
    heads = heads or dim // HEAD_DIM
    size = next((name for name, shape in SIZES.items() if shape == (dim, layers, heads)), "custom")
    custom = {"dim": dim, "layers": layers, "heads": heads} if size == "custom" else {}
    published = merge_after == tuple(i for i in PUBLISHED_MERGES if i < layers)
    tree = {
        "size": size, "kernel": kernel, "window": window, "shift": shift, "max_tokens": max_tokens,
        "merge_after": None if published else list(merge_after), "mode": AS_RELEASED, **custom,
    }  # fmt: skip
    model = typed_yaml.from_tree(Model, tree, "these weights fit no architecture")
    model.architecture()
    if window > max_tokens:
        raise UserError(f"--window: got {window}, more than the {max_tokens} positions of these weights")
    return model


def check_tensors(named: Mapping[str, Tensor], model: Model) -> None:
    """Raise UserError unless the tensors are exactly those of the model, with the right shapes and finite values."""
    expected = expected_shapes(model, len(named[HEAD]))
    missing, superfluous = sorted(expected.keys() - named.keys()), sorted(named.keys() - expected.keys())
    problems = [f"tensors missing: {_some(missing)}"] if missing else []
    problems += [f"superfluous tensors: {_some(superfluous)}"] if superfluous else []
    common = [name for name in expected if name in named]
    problems += [
        f"tensor {name}: shape {list(named[name].shape)}; the other tensors require {list(expected[name])}"
        for name in common
        if tuple(named[name].shape) != expected[name]
    ][:NAMES_SHOWN]
    problems += [
        f"tensor {name}: is not floating-point, or holds non-finite values"
        for name in common
        if not named[name].is_floating_point() or not named[name].isfinite().all()
    ][:NAMES_SHOWN]
    if not problems and named[EMBEDDING][PAD_BYTE].any():
        problems = [f"tensor {EMBEDDING}: row {PAD_BYTE}, which stands for no byte, is not zero"]
    if problems:
        raise UserError(*problems)


def expected_shapes(model: Model, classes: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of such a model, by CoreNet's name."""
    a = model.architecture()
    d = a.dim
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (BYTE_VALUES + 1, d),
        KERNEL: (d, d, a.kernel),
        POSITIONS: (1, 1, a.max_tokens, d),
    }

    def add(module: str, *weight: int, bias: bool = True) -> None:
        shapes[f"{module}.weight"] = weight
        if bias:
            shapes[f"{module}.bias"] = weight[:1]

    for layer in range(a.layers):
        block = f"transformer.{layer}"
        add(f"{block}.pre_norm_mha.0", d)
        add(f"{block}.pre_norm_mha.1.qkv_proj", 3 * d, d)
        add(f"{block}.pre_norm_mha.1.out_proj", d, d)
        add(f"{block}.pre_norm_ffn.0", d)
        add(f"{block}.pre_norm_ffn.1", 4 * d, d)
        add(f"{block}.pre_norm_ffn.4", d, 4 * d)
    for layer in a.merge_after:
        add(f"downsamplers.downsample_{layer}.reduction", d, 2 * d, bias=False)
        add(f"downsamplers.downsample_{layer}.norm", d)
    add("post_transformer_norm", d)
    add("classifier", classes, d)
    return shapes


def to_bfsys(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights or gradients from CoreNet's names and layout to those of bfsys."""
    converted = {}
    for name, tensor in named.items():
        if name == POSITIONS:
            tensor = tensor[0, 0]
        elif name.endswith(".reduction.weight"):  # column 2 c + t -> column t * dim + c
            tensor = torch.cat([tensor[:, 0::2], tensor[:, 1::2]], dim=1)
        converted[bfsys_name(name)] = tensor
    return converted


def bfsys_name(name: str) -> str:
    """`transformer.3.pre_norm_mha.1.qkv_proj.bias` -> `blocks.3.qkv.bias`"""
    if name in WHOLE_NAMES:
        return WHOLE_NAMES[name]
    module, _, kind = name.rpartition(".")
    if module.startswith("transformer."):
        _, layer, module = module.split(".", 2)
        return f"blocks.{layer}.{MODULES[module]}.{kind}"
    if module.startswith("downsamplers."):
        _, which, part = module.split(".")
        return f"merges.{which.removeprefix('downsample_')}.{part}.{kind}"
    return f"{MODULES[module]}.{kind}"


def class_names(path: Path | None, count: int) -> list[str]:
    """The names in the file, one per line; without a file, numbers of equal width."""
    if path is None:
        return [f"{i:0{len(str(count - 1))}}" for i in range(count)]
    try:
        names = [line.strip() for line in decoded(read_regular(path)).rstrip().split("\n")]
    except OSError as error:
        raise UserError(f"--classes {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--classes {path}: not a text file ({error.reason} at byte {error.start})") from None
    problems = [f"--classes {path}, line {i}: empty" for i, name in enumerate(names, 1) if not name][:NAMES_SHOWN]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        problems.append(f"--classes {path}: given twice: {_some(twice)}")
    if len(names) != count:
        problems.append(f"--classes {path}: {len(names)} names, but the weights have {count} classes")
    if problems:
        raise UserError(*problems)
    return names


def describe(config: Config, classes: int, nest: str | None, path: Path) -> None:
    model, a = config.model, config.model.architecture()
    print(
        f"{model.size}: {a.dim} channels, {a.layers} layers, {a.heads} heads, kernel {a.kernel}, window {a.window}, "
        f"shift {model.shift}, pairs merged after layers {', '.join(map(str, a.merge_after)) or 'none'}, "
        f"{a.max_tokens:,} positions, {classes} classes" + (f", from {nest}" if nest else "")
    )
    print(f"wrote {path}; use it by\n  bfsys predict {shlex.quote(str(path.parent.parent))} FILE…")


def _numbers(named: Mapping[str, Tensor], pattern: str) -> set[int]:
    return {int(match[1]) for name in named if (match := re.match(pattern, name))}


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")

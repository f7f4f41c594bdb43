"""Published weights become a directory like a run's: the same logits, and an error for every wrong input."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bfsys.checkpoint import files, loading
from bfsys.cli import call
from bfsys.errors import UserError
from tests.forked import Forked, run_python
from tests.model import vectors
from tests.model.reference import ReferenceConfig, pad, random_weights, reference_logits
from tests.model.test_byteformer import batch_of, random_files
from tests.model.vectors import CASES, FILES, needs_vectors

PUBLISHED_MERGES = (True, True, False, True, False, True, False, True, False, True, False, False)
SMALL = ReferenceConfig(
    dim=64, heads=1, kernel=4, window=8, shifts=(0, 4, 0), merge=(True, True, False), max_tokens=80, classes=3
)
SMALL_WINDOWS = ("--window", "8", "--shift", "4")


@pytest.fixture(name="weights")
def _weights() -> dict[str, Tensor]:
    return random_weights(SMALL, 0, torch.float32)


def imported(folder: Path, weights: object, *arguments: str) -> Path:
    """Import weights that torch.save writes, and return the directory."""
    torch.save(weights, folder / "weights.pt")
    call("import-corenet", [str(folder / "weights.pt"), str(folder / "imported"), *arguments])
    return folder / "imported"


def problems(folder: Path, weights: object, *arguments: str) -> str:
    with pytest.raises(UserError) as error:
        imported(folder, weights, *SMALL_WINDOWS, *arguments)
    assert not (folder / "imported").exists()
    return str(error.value)


@torch.no_grad()
def logits(run: Path, files: list[bytes]) -> Tensor:
    return loading.load_model(run)[0](batch_of(files))


@needs_vectors
@pytest.mark.parametrize("file", FILES)
def test_logits_are_the_published_ones(file: str, tmp_path: Path) -> None:
    v = vectors.load(file)
    run = imported(
        tmp_path, v.weights(torch.float32),
        "--window", str(v.config.window), "--shift", str(v.config.shifts[1]), "--heads", str(v.config.heads),
    )  # fmt: skip
    compared = 0
    for case in CASES:
        whole = (v.x(case) >= 0).all(1)  # published logits of padded rows depend on other rows
        files = [f for f, comparable in zip(v.files(case), whole, strict=True) if comparable]
        if files:
            want = v.arrays[f"{case}/released/logits64"][whole]
            torch.testing.assert_close(logits(run, files).double(), want, rtol=0, atol=1e-5)
            compared += len(files)
    assert compared >= 8


@pytest.mark.parametrize(
    ("size", "dim", "heads", "nest"), [("tiny", 192, 3, None), ("small", 384, 6, "model_state_dict")]
)
def test_whole_sizes_are_recognised_and_equal_the_reference(
    size: str, dim: int, heads: int, nest: str | None, tmp_path: Path, capsys
) -> None:
    layers = 12 if size == "tiny" else 4
    config = ReferenceConfig(
        dim=dim, heads=heads, kernel=32, window=128, shifts=(0, 64) * (layers // 2), merge=PUBLISHED_MERGES[:layers],
        max_tokens=400, classes=11,
    )  # fmt: skip
    weights = random_weights(config, 1, torch.float32)
    named = {f"module.{name}": w for name, w in weights.items()} if nest else weights
    run = imported(tmp_path, {nest: named, "epoch": 7} if nest else named)
    model = loading.load_model(run)[1].model
    assert model.size == (size if layers == 12 else "custom")
    assert (model.merge_after, model.mode, model.max_tokens, model.kernel) == (None, "as_released", 400, 32)
    assert f"{dim} channels, {layers} layers, {heads} heads" in capsys.readouterr().out
    files = random_files([32, 33, 2 * 32, 6000], seed=2)
    wide = {name: w.double() for name, w in weights.items()}
    want = torch.cat([reference_logits(wide, config, pad([f], 0), "released") for f in files])
    got = logits(run, files).double()
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * max(1.0, want.abs().max().item()))


def test_imported_weights_can_be_used_like_a_run(
    tmp_path: Path, weights, predict_files, evaluate_run, datasets: Path, capsys
) -> None:
    (tmp_path / "names").write_text("b0\nb1\nb2\n", "utf-16")  # as Notepad may save it
    run = imported(tmp_path, weights, *SMALL_WINDOWS, "--classes", str(tmp_path / "names"))
    assert files.find_newest(run) == (run / "checkpoints" / "step_00000000", [])
    manifest = files.read_manifest(run / "checkpoints" / "step_00000000")
    assert manifest["classes"] == ["b0", "b1", "b2"]
    assert manifest["imported"]["file"] == "weights.pt"
    assert f"bfsys predict {run} FILE" in capsys.readouterr().out
    (tmp_path / "file").write_bytes(b"seven b")
    (answer,) = json.loads(predict_files(run, tmp_path / "file", "--json"))
    want = logits(run, [b"seven b"])[0].softmax(0)
    assert {a["class"]: a["probability"] for a in answer["top"]} == pytest.approx(
        dict(zip(["b0", "b1", "b2"], want.tolist(), strict=True)), abs=1e-6
    )
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(UserError, match="short: 3 bytes; this model needs at least 4"):
        predict_files(run, tmp_path / "short")
    with pytest.raises(UserError, match="come without data; give a packed dataset with --data"):
        evaluate_run(run)
    result = json.loads(evaluate_run(run, "--data", datasets / "b", "--json"))
    assert result["samples"] == 14
    assert list(result["sources"]) == ["b"]
    with pytest.raises(UserError, match=r"files in train are shorter than the 4 bytes that a model needs"):
        evaluate_run(run, "--data", datasets / "b", "--split", "train")


def test_other_datasets_than_the_runs_can_be_evaluated(finished_run: Path, datasets: Path, evaluate_run) -> None:
    result = json.loads(evaluate_run(finished_run, "--data", datasets / "b", "--json"))
    assert result["sources"]["b"] == json.loads(evaluate_run(finished_run, "--json"))["sources"]["b"]
    assert result["samples"] == 14


def test_classes_are_numbers_of_equal_width_and_transforms_are_kept(tmp_path: Path) -> None:
    config = ReferenceConfig(**{**SMALL.__dict__, "classes": 12})
    run = imported(
        tmp_path, random_weights(config, 0, torch.float16), *SMALL_WINDOWS, "--byte-transform", "reverse"
    )  # fmt: skip
    _, config, manifest = loading.load_model(run)
    assert manifest["classes"] == [f"{i:02d}" for i in range(12)]
    assert config.data.byte_transforms == ("reverse",)
    assert manifest["plan"] == {"byte_transforms": ["reverse"]}


def test_an_average_is_taken_before_the_last_weights(tmp_path: Path, weights, capsys) -> None:
    run = imported(
        tmp_path,
        {"model_state_dict": {}, "ema_model_state_dict": weights, "optim_state_dict": {"a": [1]}},
        *SMALL_WINDOWS,
    )
    assert "from ema_model_state_dict" in capsys.readouterr().out
    assert torch.equal(loading.load_model(run)[0].head.bias, weights["classifier.bias"])


def test_imported_weights_cannot_be_resumed(tmp_path: Path, weights) -> None:
    path = imported(tmp_path, weights, *SMALL_WINDOWS) / "checkpoints" / "step_00000000"
    with pytest.raises(UserError, match="imported weights, not a run that can be resumed"):
        loading.check_same_run(path, files.read_manifest(path), {"config": {"model": {}}, "plan": {}})


def without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {n: w for n, w in weights.items() if n != name}


def test_wrong_tensors_are_named(tmp_path: Path, weights) -> None:
    bias = "transformer.1.pre_norm_ffn.4.bias"
    text = problems(tmp_path, without(weights, bias) | {"neck.weight": torch.zeros(2)})
    assert f"tensors missing: {bias}" in text
    assert "superfluous tensors: neck.weight" in text
    assert "embeddings.weight: missing" in problems(tmp_path, without(weights, "embeddings.weight"))
    assert f"tensor {bias}: shape [63]; the other tensors require [64]" in problems(
        tmp_path, weights | {bias: torch.zeros(63)}
    )
    assert f"{bias}: is not floating-point, or holds non-finite" in problems(
        tmp_path, weights | {bias: torch.full((64,), torch.nan)}
    )
    flat = weights | {"token_reduction_net.weight": torch.zeros(64, 64)}
    assert "token_reduction_net.weight: has 2 dimensions, not 3" in problems(tmp_path, flat)
    assert "these are not weights of CoreNet's ByteFormer" in problems(tmp_path, {"fc.weight": torch.zeros(2, 2)})
    odd = weights | {"token_reduction_net.weight": torch.zeros(64, 64, 5)}
    assert "fit no architecture: kernel: got 5" in problems(tmp_path, odd)
    pad_row = weights | {"embeddings.weight": torch.ones(257, 64)}
    assert "row 256, which stands for no byte, is not zero" in problems(tmp_path, pad_row)
    assert "48 channels are not a multiple of 64" in problems(
        tmp_path, weights | {"embeddings.weight": torch.ones(257, 48)}
    )
    assert "5 heads do not divide" in problems(tmp_path, weights, "--heads", "5")
    assert "holds other values than tensors: epoch" in problems(tmp_path, {"epoch": 3})
    assert "holds a list" in problems(tmp_path, [torch.zeros(2)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--window", "0"), "--window: got 0"),
        (("--window", "-8"), "--window: got -8"),
        (("--window", "81"), "--window: got 81, more than the 80 positions"),
        (("--shift", "-1"), "--shift: got -1"),
        (("--shift", "9"), "--shift: got 9; with windows of 8 tokens, 0 to 7 are allowed, or a multiple of 8"),
        (("--byte-transform", "revers"), "revers"),
        (("--classes", "/nowhere"), "--classes /nowhere: No such file"),
    ],
)
def test_wrong_options_are_named(arguments: tuple[str, ...], message: str, tmp_path: Path, weights) -> None:
    assert message in problems(tmp_path, weights, *arguments)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (b"a\nb\n", "2 names, but the weights have 3 classes"),
        (b"a\n\nb\nc\n", "line 2: empty"),
        (b"a\nb\na\n", "given twice: a"),
        (b"caf\xe9\n", "not a text file"),
    ],
)
def test_wrong_class_names_are_reported(names: bytes, message: str, tmp_path: Path, weights) -> None:
    (tmp_path / "names").write_bytes(names)
    assert message in problems(tmp_path, weights, "--classes", str(tmp_path / "names"))


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "zip", "folder", "missing", "pipe"])
def test_files_that_torch_did_not_write_are_reported(damage: str, tmp_path: Path, weights) -> None:
    path = tmp_path / "weights.pt"
    torch.save(weights, path)
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage in ("missing", "pipe"):
        path.unlink()
        if damage == "pipe":
            os.mkfifo(path)
    else:
        whole = path.read_bytes()
        path.write_bytes(
            {"text": b"no weights\n", "empty": b"", "cut": whole[:1000], "zip": b"PK\3\4" + bytes(99)}[damage]
        )
    with pytest.raises(UserError, match=r"weights\.pt: (not a file that torch\.save wrote, or damaged|cannot be read)"):
        call("import-corenet", [str(path), str(tmp_path / "imported")])


def test_other_objects_are_refused_and_nothing_is_run(tmp_path: Path) -> None:
    assert "holds more than tensors" in problems(tmp_path, {"model": Trap(tmp_path / "sprung")})
    assert not (tmp_path / "sprung").exists()


def test_the_same_command_works_after_a_full_disk(
    tmp_path: Path, weights, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "config.yaml")

    torch.save(weights, tmp_path / "weights.pt")
    arguments = [str(tmp_path / "weights.pt"), str(tmp_path / "out"), *SMALL_WINDOWS]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            call("import-corenet", arguments)
    assert list((tmp_path / "out").iterdir()) == []
    call("import-corenet", arguments)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoints", "config.yaml"]


class Trap:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_folder_in_use_is_left_alone_and_the_command_ends_with_code_2(tmp_path: Path, weights) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    torch.save(weights, tmp_path / "weights.pt")
    command = ["tools/import_corenet.py", str(tmp_path / "weights.pt"), str(tmp_path / "out"), *SMALL_WINDOWS]
    process = Forked(run_python, command, {})
    _, errors = process.communicate(900)
    assert process.returncode == 2
    assert errors == f"error: {tmp_path / 'out'}: not empty; give a folder that is empty or does not exist\n"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(UserError, match=r"weights\.pt/x: cannot be made: Not a directory"):
        call("import-corenet", [str(tmp_path / "weights.pt"), str(tmp_path / "weights.pt" / "x"), *SMALL_WINDOWS])

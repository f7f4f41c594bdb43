"""Exported programs give the model's answers, for files of any length."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.export.passes import move_to_device_pass

import bfsys
from bfsys import export
from bfsys.checkpoint.loading import load_model
from bfsys.cli import call
from bfsys.commands import export as command
from bfsys.errors import UserError
from bfsys.model.byteformer import ByteFormer
from bfsys.model.dense import DenseByteFormer
from bfsys.model.pool import AttentionPool
from bfsys.model.sizes import Architecture
from tests.model.reference import ReferenceConfig, random_weights
from tests.model.test_byteformer import TINY, architecture_of, build, configs


def run_export(*arguments: object) -> None:
    call("export", [*map(str, arguments)])


def file_of(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8)


def small_model(mode: str, blocks: int = 2) -> ByteFormer:
    """A model with few blocks, because each takes seconds to export. The last is shifted; a merging follows each."""
    config = replace(TINY, shifts=(0, 3)[-blocks:], merge=(True, True)[-blocks:])
    return build(config, random_weights(config, 0, torch.float32), mode).eval()


@settings(max_examples=40)
@given(
    config=configs(),
    mode=st.sampled_from(["masked", "as_released"]),
    length=st.integers(1, 150),
    seed=st.integers(0, 9),
)
@example(config=TINY, mode="masked", length=1, seed=0)
@example(config=TINY, mode="as_released", length=150, seed=0)
def test_the_dense_form_is_the_model(config: ReferenceConfig, mode: str, length: int, seed: int) -> None:
    model = build(config, random_weights(config, seed, torch.float32), mode).eval()
    data = file_of(max(length, config.kernel if mode == "as_released" else 1))
    with torch.no_grad():
        got = DenseByteFormer(model)(torch.from_numpy(data))
    # Norms over four channels amplify rounding: 2.7e-5 was seen once in thousands of examples.
    torch.testing.assert_close(got, export.probabilities(model, data), rtol=0, atol=1e-4)


def test_the_program_is_the_model_at_every_length(exported: Path, finished_run: Path) -> None:
    model, _, _ = load_model(finished_run)
    answer = export.torch_runner(exported / "model.pt2")
    a = model.architecture
    window_bytes = a.window * a.stride
    for length in (
        1,
        2,
        3,
        a.kernel - 1,
        a.kernel,
        31,
        window_bytes,
        window_bytes + 1,
        97,
        a.max_bytes - 1,
        a.max_bytes,
        a.max_bytes + 1,  # positions repeat
        3 * a.max_bytes,
    ):
        data = file_of(length)
        got, want = answer(data), export.probabilities(model, data).numpy()
        assert got.dtype == np.float32
        assert np.abs(got - want).max() < 1e-5, length
        assert got.sum() == pytest.approx(1)
    answers = [answer(file_of(n))[0] for n in (30, 31, 60, 200)]
    assert max(answers) - min(answers) > 1e-3, "the answers do not depend on the bytes: the comparison says little"


@pytest.mark.parametrize(
    "device",
    ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
def test_a_program_moves_to_a_device(device: str, exported: Path) -> None:
    """The model card promises this. On meta, a tensor that the program still makes on the CPU is an error."""
    program = move_to_device_pass(torch.export.load(exported / "model.pt2"), device).module()
    for length in (1, 97, 200):
        data = torch.from_numpy(file_of(length))
        with torch.no_grad():
            got = program(data.to(device))
        assert (got.device.type, got.shape) == (device, (5,))
        if device != "meta":
            assert np.abs(got.cpu().numpy() - export.torch_runner(exported / "model.pt2")(data.numpy())).max() < 1e-5


def test_a_program_is_read_from_a_folder_whose_name_is_not_utf8(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    shutil.copytree(exported, folder)
    assert export.torch_runner(folder / "model.pt2")(file_of(9)).shape == (5,)


def test_a_program_as_released_is_the_model(tmp_path: Path) -> None:
    model = small_model("as_released")
    torch.export.save(export.as_program(model, model.architecture.kernel), tmp_path / "model.pt2")
    answer = export.torch_runner(tmp_path / "model.pt2")
    for length in (4, 5, 6, 17, 18, 19, 33, 34, 63, 64, 65, 66, 301, 600):
        data = file_of(length)
        assert np.abs(answer(data) - export.probabilities(model, data).numpy()).max() < 1e-5, length


def test_model_json_describes_the_export(exported: Path, finished_run: Path) -> None:
    facts = json.loads((exported / "model.json").read_text())
    model, config, _ = load_model(finished_run)
    assert sorted(p.name for p in exported.iterdir()) == ["README.md", "model.json", "model.pt2", "model.safetensors"]
    for name, entry in facts["files"].items():
        content = (exported / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert facts["classes"] == ["a0", "a1", "a2", "b0", "b1"]
    assert (facts["mode"], facts["weights"], facts["step"]) == ("masked", "ema", 120)
    assert facts["least_bytes"] == 1
    as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["architecture"].items()}
    assert Architecture(**as_tuples) == config.model.architecture()
    again = ByteFormer(Architecture(**as_tuples), len(facts["classes"]), facts["mode"])
    again.load_state_dict(load_file(exported / "model.safetensors"))
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1  # all files have the same permissions
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_an_export_has_no_secrets_of_its_data(finished_run: Path, tmp_path: Path) -> None:
    """Others get it. A URL may contain a password or a token."""
    model, config, manifest = load_model(finished_run)
    sources = tuple(
        replace(config.data.sources[0], path=path, eval_path=None)
        for path in (
            "https://me:secret@host/a?token=secret",
            "pipe:curl --header secret https://host/{file}",
            "/data/b",
        )
    )
    config = replace(config, data=replace(config.data, sources=sources))
    facts = export.export(model, config, manifest, tmp_path, [export.SAFETENSORS], "ema")
    assert "secret" not in "".join(path.read_text(errors="replace") for path in tmp_path.iterdir())
    assert facts["config"]["data"]["sources"][2]["path"] == "/data/b"
    assert bfsys.load(tmp_path, device="cpu").classes == tuple(facts["classes"])


def test_programs_alone_hold_no_weights(exported: Path, tmp_path: Path) -> None:
    facts = json.loads((exported / "model.json").read_text())
    del facts["files"]["model.safetensors"]  # like the output of --format torch
    (tmp_path / "model.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"holds no model\.safetensors; export the run again with --format safetensors"):
        bfsys.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"input_formats": None}, {"input_formats": [{}]}, {"step": "6"}, {"classes": [1]}, {"files": []}, {"config": 5}],
)
def test_a_changed_description_is_named(change: dict, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "copy")
    path = tmp_path / "copy" / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=r"model\.json: is damaged, or no description that bfsys export wrote"):
        bfsys.load(tmp_path / "copy")


def test_the_last_weights_can_be_had(finished_run: Path, tmp_path: Path, capsys) -> None:
    run_export(finished_run, tmp_path / "last", "--weights", "last", "--format", "safetensors")
    assert "model.safetensors: " in capsys.readouterr().out
    assert [p.name for p in sorted((tmp_path / "last").iterdir())] == ["README.md", "model.json", "model.safetensors"]
    want = load_model(finished_run, average=False)[0].state_dict()
    got = load_file(tmp_path / "last" / "model.safetensors")
    assert all(torch.equal(got[name], value) for name, value in want.items())
    assert json.loads((tmp_path / "last" / "model.json").read_text())["weights"] == "last"


@pytest.mark.parametrize(("blocks", "pool"), [(1, "attention"), pytest.param(2, "mean", marks=pytest.mark.slow)])
def test_onnx_is_the_model(blocks: int, pool: str, tmp_path: Path) -> None:
    """The last block is shifted and merged, so one block has all operations. A second one takes many seconds."""
    for name in command.NEEDED_FOR_ONNX:
        pytest.importorskip(name)
    model = small_model("masked", blocks)
    if pool == "attention":
        model.pool = AttentionPool(model.architecture.dim)
        torch.nn.init.normal_(model.pool.query)
    export.write_onnx(export.as_program(model, 1), tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    answer = export.onnx_runner(tmp_path / "model.onnx")
    for length in (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 599, 600):
        data = file_of(length)
        assert np.abs(answer(data) - export.probabilities(model, data).numpy()).max() < 1e-4, length


def test_a_wrong_program_is_refused() -> None:
    model = small_model("masked")
    with pytest.raises(UserError, match=r"model\.pt2: differs from the model by"):
        export.check("torch", lambda data: np.full(5, 0.2, np.float32), model, {"least_bytes": 1})


def test_a_folder_in_use_is_left_alone(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="not empty"):
        run_export(finished_run, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), PermissionError(13, "Permission denied", "/cache")])
def test_an_export_that_is_not_complete_is_removed(
    error: BaseException, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        assert (tmp_path / "out" / "model.safetensors").exists()
        shutil.copytree(tmp_path / "out", tmp_path / "killed")  # what a SIGKILL would leave
        with pytest.raises(UserError, match="not empty"):  # while another export writes there
            run_export(finished_run, tmp_path / "out", "--format", "safetensors")
        raise error

    monkeypatch.setattr(export, "as_program", fail)
    with pytest.raises((KeyboardInterrupt, UserError)) as raised:
        run_export(finished_run, tmp_path / "out")
    assert str(raised.value) in ("", "/cache: cannot be written: Permission denied; nothing was exported")
    assert list((tmp_path / "out").iterdir()) == []
    run_export(finished_run, tmp_path / "killed", "--format", "safetensors")
    written = {path.name for path in (tmp_path / "killed").iterdir()}
    assert written == {"README.md", "model.json", "model.safetensors"}
    with pytest.raises(UserError, match="not empty"):
        run_export(finished_run, tmp_path / "killed", "--format", "safetensors")


def test_missing_packages_for_onnx_are_named(finished_run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(command, "NEEDED_FOR_ONNX", ("onnx_of_nowhere",))
    with pytest.raises(UserError, match=r"onnx_of_nowhere missing; pip install onnx_of_nowhere"):
        run_export(finished_run, tmp_path / "out", "--format", "onnx")
    assert not (tmp_path / "out").exists()


def test_architecture_of_the_reference_is_complete() -> None:
    assert architecture_of(TINY).max_bytes == 600  # the lengths above assume it

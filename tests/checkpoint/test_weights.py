"""The weights of a checkpoint are read as a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as safetensors_of

from bfsys.checkpoint import files, loading
from bfsys.checkpoint.files import step_of
from bfsys.errors import UserError
from bfsys.files import describe


def test_a_manifest_with_other_shapes_than_its_files_is_refused(finished_run: Path, tmp_path: Path) -> None:
    path, manifest, _ = loading.newest_readable(finished_run)
    assert path is not None
    manifest["shapes"]["stem.embedding"] = [3, 5]
    manifest["sha256"] = files.fingerprint(manifest)
    (tmp_path / files.MANIFEST).write_text(json.dumps(manifest))
    for name in manifest["files"]:
        (tmp_path / name).symlink_to(path / name)
    with pytest.raises(UserError, match="its ema files do not hold the whole state"):
        loading.load_model(tmp_path)


def test_whole_tensors_have_the_shapes_of_the_manifest(finished_run: Path, tmp_path: Path) -> None:
    path, *_ = loading.newest_readable(finished_run)
    assert path is not None
    weights, _, manifest = loading.read_weights(path)
    weights["stem.embedding"] = weights["stem.embedding"][:3]
    file = tmp_path / "ema-0-of-1.safetensors"
    file.write_bytes(safetensors_of(weights))
    manifest["files"] = {file.name: describe(file)}
    manifest["sha256"] = files.fingerprint(manifest)
    (tmp_path / files.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="its ema files do not hold the whole state"):
        loading.load_model(tmp_path)


def test_the_averaged_weights_are_the_default(finished_run: Path) -> None:
    averaged, last = loading.load_model(finished_run)[0], loading.load_model(finished_run, average=False)[0]
    assert any(not torch.equal(a, b) for a, b in zip(averaged.parameters(), last.parameters(), strict=True))


def test_weights_of_another_version_are_named(finished_run: Path, tmp_path: Path, monkeypatch) -> None:
    """The model of the config has other parameters than the checkpoint."""
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    monkeypatch.setattr(loading, "ByteFormer", lambda *arguments: torch.nn.Linear(2, 3))
    with pytest.raises(UserError, match=r"its weights are not those of the model that its config describes"):
        loading.load_model(copy)


def test_a_model_that_has_not_trained_is_noted(finished_run: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    loading.load_model(copy)
    assert capsys.readouterr().err == ""
    paths = files.all_checkpoints(copy)
    assert step_of(paths[0]) == 0
    for path in paths[1:]:
        shutil.rmtree(path)
    loading.load_model(copy)
    noted = "no training step is saved yet, so the weights are the initial ones"
    assert capsys.readouterr().err == f"note: {paths[0]}: {noted}\n"


def test_a_loaded_model_uses_no_more_threads_than_the_quota(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setattr(loading, "usable_cores", lambda: 2)
        loading.load_model(finished_run)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

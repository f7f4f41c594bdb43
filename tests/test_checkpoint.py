"""Checkpoints of a finished run: proven, or passed over."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bfsys import checkpoint
from bfsys.errors import UserError


@pytest.mark.parametrize("damage", ["flip", "cut", "no file", "no manifest", "bad manifest", "other step", "a list"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(finished_run: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    newest, problems = checkpoint.find_newest(copy)
    assert (newest.name, problems) == ("step_00000120", [])
    file = newest / "ema-0-of-1.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "no file":
        file.unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "other step":  # one changed digit
        text = (newest / "manifest.json").read_text()
        (newest / "manifest.json").write_text(text.replace('"step": 120', '"step": 121'))
    else:
        (newest / "manifest.json").write_text("{" if damage == "bad manifest" else "[]")
    found, problems = checkpoint.find_newest(copy)
    assert found.name == "step_00000060"
    assert len(problems) == 1
    assert str(newest) in problems[0]
    assert checkpoint.load_model(copy)[2]["step"] == 60


def test_a_copy_beside_the_checkpoints_is_no_trouble(finished_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    shutil.copytree(copy / "checkpoints" / "step_00000060", copy / "checkpoints" / "step_00000060.bak")
    assert checkpoint.find_newest(copy)[0].name == "step_00000120"


def test_the_averaged_weights_are_the_default(finished_run: Path) -> None:
    averaged, last = checkpoint.load_model(finished_run)[0], checkpoint.load_model(finished_run, average=False)[0]
    assert any(not torch.equal(a, b) for a, b in zip(averaged.parameters(), last.parameters(), strict=True))


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_what_is_no_run_is_said(tmp_path: Path, what: str) -> None:
    if what == "empty":
        (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no such run directory" if what == "missing" else "no checkpoint yet"):
        checkpoint.load_model(tmp_path / what)

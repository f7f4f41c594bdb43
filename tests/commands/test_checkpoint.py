"""`bfsys checkpoint` on runs of which this version does not read every checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bfsys.checkpoint import files
from bfsys.checkpoint.store import Store
from bfsys.cli import call
from tests.checkpoint.test_checkpoint import save
from tests.checkpoint.test_store import put
from tests.conftest import closed_output


def write_in_other_format(path: Path) -> None:
    manifest = files.read_manifest(path) | {"format": 3}
    manifest["sha256"] = files.fingerprint(manifest)
    (path / files.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("is_in_store", [False, True])
def test_checkpoints_of_another_format_hide_no_others(
    is_in_store: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    paths = [save(tmp_path / "run", step) for step in (1, 2, 3)]
    run, folder = str(tmp_path / "run"), tmp_path / "run"
    if is_in_store:
        run, folder = f"file://{tmp_path}/copies", tmp_path / "copies"
        for path in paths:
            put(Store(run), path)
    write_in_other_format(folder / "checkpoints" / "step_00000002")
    capsys.readouterr()
    assert call("checkpoint", ["list", run]) == 0
    first, second, third = capsys.readouterr().out.splitlines()[1:]
    assert "step_00000002: has format 3, and this version of bfsys reads 2" in second
    assert second.startswith("         2  not read: ")
    assert (first.split()[0], third.split()[0]) == ("1", "3")
    assert call("checkpoint", ["verify", run]) == 2
    verified = capsys.readouterr().out
    assert verified.count(": intact") == 2
    assert "not verified: " in verified
    weights = folder / "checkpoints" / "step_00000003" / "weight-0-of-1.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert call("checkpoint", ["verify", run]) == 1


def test_damage_is_found_if_the_reader_of_the_output_has_ended(tmp_path: Path) -> None:
    _, newest = [save(tmp_path / "run", step) for step in (1, 2)]
    (newest / "weight-0-of-1.safetensors").write_bytes(b"")
    with closed_output():
        assert call("checkpoint", ["verify", str(tmp_path / "run")]) == 1

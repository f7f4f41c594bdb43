"""The bytes that replace those of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from bfsys.config import Config, Data, Source
from bfsys.explain.references import candidates
from tests.data.packed import pack


@pytest.mark.parametrize("where", ["path", "eval_path"])
def test_the_config_of_anothers_run_makes_explain_run_no_command(tmp_path: Path, where: str) -> None:
    ran = tmp_path / "ran"
    local = pack(tmp_path, "local", {"train": [[(0, b"abc")]], "val": [[(1, b"abd")]]})
    source = {"path": str(local), where: f"pipe:touch {ran}; cat {local}/{{file}}"}
    config = Config(data=Data(sources=(Source(**source),), cache_dir=str(tmp_path / "cache")), name="x")
    assert candidates(config, ("x", "y"), (), 0) == []
    assert not ran.exists()
    config = Config(data=Data(sources=(Source(str(local)),)), name="x")
    assert [file.label for file in candidates(config, ("x", "y"), (), 0)] == [1]


def test_without_readable_files_there_are_no_references(tmp_path: Path) -> None:
    local = pack(tmp_path, "local", {"train": [[(0, b"abc")]], "val": [[(1, b"abd")]]})
    for tar in local.glob("*.tar"):
        tar.unlink()
    config = Config(data=Data(sources=(Source(str(local)),)), name="x")
    assert candidates(config, ("x", "y"), (), 0) == []

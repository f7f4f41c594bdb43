"""The data of a run as a whole: splits that are there, and datasets that are replaced under it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bfsys.config import Config, load_config
from bfsys.data.storage.shards import DESCRIPTION
from bfsys.data.streaming.run_data import open_run_data
from bfsys.dist import Ranks
from bfsys.errors import UserError
from tests.conftest import tiny_config


@pytest.fixture
def dataset(datasets: Path, tmp_path: Path) -> Path:
    return shutil.copytree(datasets / "a", tmp_path / "a")


@pytest.fixture
def config(dataset: Path, datasets: Path, tmp_path: Path) -> Config:
    tree = tiny_config(datasets, tmp_path)
    tree["data"]["sources"][0]["path"] = str(dataset)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return load_config(tmp_path / "tiny.yaml")


def test_a_dataset_that_is_packed_again_in_place_ends_the_run(dataset: Path, config: Config) -> None:
    """Its index and its shards fit each other, so every checksum is valid."""
    data = open_run_data(config, Ranks())
    data.check_unchanged()
    description = json.loads((dataset / DESCRIPTION).read_text())
    (dataset / DESCRIPTION).write_text(json.dumps(description))  # the same content in another formatting
    data.check_unchanged()
    description["splits"]["train"]["bytes"] += 1
    (dataset / DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(UserError, match="was packed again while the run trains on it"):
        data.check_unchanged()
    (dataset / DESCRIPTION).unlink()
    data.check_unchanged()  # a file server that is unavailable


def test_a_misspelt_evaluation_split_is_refused(config: Config) -> None:
    for name in ("vall", "Validation"):
        wrong = replace(config, data=replace(config.data, eval_split=name))
        with pytest.raises(UserError, match=rf"no source has a split '{name}' \(did you mean 'val'\?\)"):
            open_run_data(wrong, Ranks())

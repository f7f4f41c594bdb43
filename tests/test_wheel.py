"""The wheel, used in another folder: its content, and a run from files to predictions by the command `bfsys`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from bfsys.cli import COMMANDS
from tests.conftest import REPOSITORY, tiny_config
from tests.data.make import write_tree

Command = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources. setuptools leaves build/ beside them, which would get into the next wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(REPOSITORY / "bfsys", folder / "source" / "bfsys", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, folder / "source")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source")
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """The folder in which the wheel is installed."""
    pip("install", "--no-deps", "--target", wheel.parent / "site", wheel)
    return wheel.parent / "site"


@pytest.fixture
def bfsys(site: Path, tmp_path: Path) -> Command:
    """`bfsys(argument…)` runs the installed command in an empty folder and returns its output. It must end with 0."""

    def run(*arguments: str | Path, **variables: str) -> str:
        variables |= {"PYTHONPATH": str(site), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        environment = os.environ | variables
        command = [sys.executable, site / "bin" / "bfsys", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_all_modules_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "bfsys").rglob("*.py")}
    assert names == {*modules, "bfsys/py.typed", "bfsys/serve/page/index.html"}


def test_the_installed_command_is_that_of_the_wheel(bfsys: Command, site: Path) -> None:
    shown = bfsys("--help")
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert bfsys("--version").startswith("bfsys ")
    where = "import bfsys.cli; print(bfsys.cli.__file__)"
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", where], cwd=site.parent, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(site / "bfsys" / "cli.py")


def test_a_slurm_job_takes_along_the_package_alone(site: Path, config_file: Path, tmp_path: Path) -> None:
    """The folder of installed packages contains many other packages."""
    (site / "other").mkdir()
    (site / "other" / "__init__.py").touch()
    code = (
        "import sys; from bfsys.config import load_config; from bfsys.launch.slurm_job import snapshot; "
        "print(snapshot(load_config(sys.argv[1])))"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code, config_file]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    copy = Path(done.stdout.strip()).parent
    assert {path.name for path in copy.iterdir()} == {"bfsys", "tiny.yaml", "git-state.txt"}
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "bfsys").rglob("*.py")}
    assert {str(path.relative_to(copy)) for path in copy.rglob("*.py")} == modules


@pytest.mark.slow
def test_from_files_to_predictions(bfsys: Command, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, files in (("train", 40), ("val", 7)):
        write_tree(tmp_path / "files" / split, ("a0", "a1", "a2"), files, 60, rng)
    assert "train: 120 samples" in bfsys("pack", "files", "shards", "--name", "mine", "--shard-bytes", "2000")
    assert "whole: all 141 samples" in bfsys("inspect", "shards/mine", "--verify")
    config = tiny_config(tmp_path / "shards", tmp_path)
    config["data"]["sources"] = [{"path": "shards/mine"}]
    config["runs_dir"] = "runs"
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    assert "parameters" in bfsys("plan", "own.yaml")
    assert "finished: 3 steps" in bfsys("train", "own.yaml", "train.steps=3")
    assert "finished: 5 steps" in bfsys("launch", "--ranks", "2", "own.yaml", "train.steps=5", "name=two")
    assert "21 files" in bfsys("evaluate", "runs/own")
    assert len(bfsys("predict", "runs/two", "files/val").splitlines()) == 21
    assert "model.safetensors" in bfsys("export", "runs/own", "exported", "--format", "safetensors")
    assert len(bfsys("checkpoint", "list", "runs/two").splitlines()) == 1 + 3  # steps 0, 4 and 5
    shown = bfsys("checkpoint", "show", "runs/own")
    assert "step      3" in shown
    nodes = ("--nodes", "2", "--gpus-per-node", "0")
    assert "srun" in bfsys("slurm", "--dry-run", *nodes, "own.yaml", "name=three", PATH="")  # without SLURM
    bfsys("make-key", "my.key")
    assert "21 files" in bfsys("encode", "files/val", "hidden", "--transform", "permute:my.key")

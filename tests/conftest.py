"""Small data and runs that many tests share."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, settings

from bfsys.cli import call
from bfsys.console import Console
from tests.data.make import write_tree
from tests.forked import run_python, start_ranks
from tests.s3_server import S3Server

# No deadline and no check of the time that inputs take, since other processes may use the cores. Runs of the fast tests
# have the same inputs, so that one does not fail by luck; `make test-slow` tries others.
UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("bfsys", max_examples=40, derandomize=True, **UNTIMED)
settings.register_profile("thorough", max_examples=100, derandomize=False, **UNTIMED)  # also if CI is set
settings.load_profile("bfsys")
REPOSITORY = Path(__file__).resolve().parents[1]

# Background commands of a shell without job control ignore SIGINT, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the same for SIGHUP after `nohup`
# Two threads on two busy cores are much slower than one, here and in child processes. PyTorch reads this variable at
# its import, which is later.
os.environ["OMP_NUM_THREADS"] = "1"
# With this variable, which many containers set, each new process would compile all modules.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Settings of the shell that change answers: of a job of SLURM, of the libraries of S3, and of a console.
for name in [name for name in os.environ if name.startswith(("SLURM_", "AWS_")) and name != "SLURM_CONF"]:
    del os.environ[name]
os.environ |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
for name in ("FORCE_COLOR", "COLUMNS"):
    os.environ.pop(name, None)
# Servers of tests are on this machine, and are not reached through a proxy.
for name in ("no_proxy", "NO_PROXY"):
    os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1", "localhost")))


# The slowest files. With --no-loadscope-reorder they start first, so that no worker is left with one at the end.
HEAVIEST = (
    "test_muon.py", "test_train.py", "test_guard.py", "test_make_digits.py", "test_export.py", "test_guarantees.py",
    "test_watchdog.py", "test_copies.py", "test_fit.py", "test_local.py", "test_service.py",
    "test_examples.py", "test_bench_step.py", "test_local_sweep.py", "test_kills.py", "test_remote_runs.py",
    "test_pack.py", "test_predict.py", "test_shortcuts.py", "test_gpu_check.py", "test_remote_loading.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: i for i, name in enumerate(HEAVIEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def made_once(name: str, make: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all workers share. The first worker that needs it makes it with `make(folder)`."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, is_whole = root / name, root / f"{name}-is-whole"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            is_whole.touch()
    return folder


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two packed datasets, `a` (3 classes) and `b` (2 classes), with splits train and val.

    The class is easily learned: each class draws its bytes around a different mean. Tests must not change the folder.
    """
    return made_once("datasets", make_datasets, tmp_path_factory)


def make_datasets(root: Path) -> None:
    rng = np.random.default_rng(0)
    for name, classes, longest in (("a", ("a0", "a1", "a2"), 60), ("b", ("b0", "b1"), 150)):
        for split, files in (("train", 40), ("val", 7)):
            write_tree(root / "trees" / name / split, classes, files, longest, rng)
        call("pack", [str(root / "trees" / name), str(root), "--name", name, "--shard-bytes", "2000", "--workers", "1"])


@pytest.fixture
def config_file(datasets: Path, tmp_path: Path) -> Path:
    """The config of a model that trains in a second on `datasets`, with runs in tmp_path/runs."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(datasets, tmp_path)))
    return path


def tiny_config(datasets: Path, folder: Path) -> dict:
    return {
        "data": {
            "sources": [{"path": str(datasets / "a")}, {"path": str(datasets / "b")}],
            "batch_samples": 8,
            "lanes": 4,
            "shuffle_block": 16,
            "eval_batch_bytes": 500,
        },
        "model": {
            "size": "custom", "dim": 16, "layers": 3, "heads": 2, "kernel": 8, "window": 8, "shift": 4,
            "max_tokens": 64,
        },
        "optim": {"lr": 3e-3, "warmup_steps": 2, "clip_norm": 1.0, "ema_decay": 0.9},
        "train": {
            "steps": 10, "precision": "fp32", "zero_stage": 1, "log_every": 1, "eval_every": 0, "save_every": 4,
            "collective_timeout_s": 900,
        },
        "runs_dir": str(folder / "runs"),
    }  # fmt: skip


@pytest.fixture(scope="session")
def finished_run(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a trained run with checkpoints of steps 60 and 120. Tests must not change it."""

    def make(folder: Path) -> None:
        config = folder / "tiny.yaml"
        config.write_text(yaml.safe_dump(tiny_config(datasets, folder)))
        options = "train.steps=120 train.log_every=40 train.save_every=60 optim.lr=1e-2 train.zero_stage=0"
        options += " train.micro_batch_tokens=1000"  # the four lanes of a step in one micro-batch
        (result,) = _run_ranks(1, ["bfsys/train.py", str(config), *options.split()])
        assert result.returncode == 0, result.stderr

    return made_once("finished", make, tmp_path_factory) / "runs" / "tiny"


@pytest.fixture(scope="session")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of `finished_run`: weights and the program of torch.export. Tests must not change it."""

    def make(folder: Path) -> None:
        call("export", [str(finished_run), str(folder / "model")])

    return made_once("exported", make, tmp_path_factory) / "model"


def parameters_of_tests_with(fixture: str, request: pytest.FixtureRequest) -> list[dict]:
    """The parameters of all selected tests that use a fixture, so that the fixture makes only what they need."""
    items = [item for item in request.session.items if fixture in getattr(item, "fixturenames", ())]
    return [item.callspec.params if hasattr(item, "callspec") else {} for item in items]


@pytest.fixture
def evaluate_run(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """`evaluate_run(arguments…)` runs `bfsys evaluate` and returns its output. Exceptions are raised."""
    return lambda *arguments: _command("evaluate", arguments, capsys)


@pytest.fixture
def predict_files(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """`predict_files(arguments…)` runs `bfsys predict` and returns its output. Exceptions are raised."""
    return lambda *arguments: _command("predict", arguments, capsys)


def _command(name: str, arguments: tuple, capsys: pytest.CaptureFixture) -> str:
    call(name, [*map(str, arguments)])
    return capsys.readouterr().out


@contextmanager
def closed_output() -> Iterator[None]:
    """Standard output is a pipe whose reader has ended, as in `… | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with redirect_stdout(Console(writer, "standard output", "utf-8", fails=True)):
        yield
    os.close(writer)


@pytest.fixture
def run_ranks() -> Callable[..., list[subprocess.CompletedProcess]]:
    """`run_ranks(n, [arguments of Python])` runs n ranks to their end and returns their results."""
    return _run_ranks


def _run_ranks(world_size: int, arguments: list[str], timeout_s: float = 900) -> list[subprocess.CompletedProcess]:
    processes = start_ranks(world_size, run_python, arguments)
    try:
        outputs = [p.communicate(timeout=timeout_s) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [
        subprocess.CompletedProcess(p.args, p.returncode, *output) for p, output in zip(processes, outputs, strict=True)
    ]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server(monkeypatch)
    yield server
    server.close()

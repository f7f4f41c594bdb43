"""The content of a pickled job, and its end as a task of SLURM, without a cluster. A function takes the place of
training."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import NoReturn
from unittest import mock

import pytest

from bfsys.config import Config
from bfsys.errors import UserError
from bfsys.launch import job as job_module
from bfsys.launch.job import MASTER_PORTS, TrainJob, gloo_interface, slurm_variables
from bfsys.ranks import Ranks
from tests.conftest import REPOSITORY

TASK = {  # rank 3 of 4, on the second of two nodes
    "SLURM_JOB_ID": "70123", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip


def make_job(folder: Path) -> TrainJob:
    return TrainJob(Path("/runs/a config.yaml"), ("train.steps=3", "name=x"), REPOSITORY, folder)


def test_command_is_that_of_one_rank(tmp_path):
    command = [sys.executable, str(REPOSITORY / "bfsys/train.py"), "/runs/a config.yaml", "train.steps=3", "name=x"]
    assert make_job(tmp_path).command() == command


def test_a_pickle_is_opened_without_heavy_imports(tmp_path):
    pickled = tmp_path / "job.pkl"
    pickled.write_bytes(pickle.dumps(make_job(tmp_path)))
    look = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).overrides, 'torch' in sys.modules)"
    command = [sys.executable, "-c", look, pickled]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "('train.steps=3', 'name=x') False"


def test_slurm_variables(monkeypatch):
    leaked = {
        "RANK": "9",
        "WORLD_SIZE": "99",
        "MASTER_ADDR": "elsewhere",
        "MASTER_PORT": "1",
        "SLURM_CPUS_PER_TASK": "5",
    }
    monkeypatch.setattr(job_module, "kernel_cache", lambda: Path("/local"))
    with mock.patch.object(job_module, "gloo_interface", lambda others: f"towards-{others}"):
        assert "TRITON_CACHE_DIR" not in slurm_variables({**TASK, "TRITON_CACHE_DIR": "/own"}, ["n1", "n2"])
        variables = slurm_variables({**leaked, **TASK}, ["n1", "n2"])
        assert "OMP_NUM_THREADS" not in slurm_variables({**leaked, **TASK, "OMP_NUM_THREADS": "2"}, ["n1", "n2"])
        assert "GLOO_SOCKET_IFNAME" not in slurm_variables({**TASK, "GLOO_SOCKET_IFNAME": "ib0"}, ["n1", "n2"])
    assert variables == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1", "MASTER_PORT": "20123", "OMP_NUM_THREADS": "5", "GLOO_SOCKET_IFNAME": "towards-['n1']",
        "TRITON_CACHE_DIR": "/local",
    }  # fmt: skip


def test_kernels_are_cached_in_a_folder_that_only_this_user_can_write(tmp_path, monkeypatch):
    monkeypatch.setattr(job_module.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = job_module.kernel_cache()
    assert folder == tmp_path / f"bfsys-triton-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert job_module.kernel_cache() is None
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    assert job_module.kernel_cache() is None
    monkeypatch.setattr(job_module.tempfile, "gettempdir", lambda: str(tmp_path / "nowhere"))
    assert job_module.kernel_cache() is None


def test_plain_srun_makes_ranks(monkeypatch):
    monkeypatch.setattr(job_module, "_hosts", lambda: ["n1", "n2"])
    monkeypatch.setattr(job_module, "gloo_interface", lambda others: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with mock.patch.dict(os.environ):
        job_module.set_slurm_variables()
        assert "RANK" not in os.environ  # not in a job
        os.environ.update(TASK)
        job_module.set_slurm_variables()
        assert "RANK" not in os.environ  # a batch script is not a step
        os.environ["SLURM_STEP_NODELIST"] = "n[1-2]"
        os.environ["SLURM_STEP_ID"] = "4294967290"
        job_module.set_slurm_variables()
        assert "RANK" not in os.environ  # the shell of salloc on a node is not a step
        os.environ |= {"SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "1"}
        job_module.set_slurm_variables()
        assert "RANK" not in os.environ  # the number of tasks of the job is not that of the step
        os.environ["SLURM_STEP_NUM_TASKS"] = "4"
        job_module.set_slurm_variables()
        assert (os.environ["RANK"], os.environ["MASTER_ADDR"]) == ("3", "n1")


def test_variables_of_ranks_that_srun_has_not_made(monkeypatch):
    """They are valid from torchrun, one on each node, and wrong if they are left over in the shell."""
    for name in ("WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    step = {**TASK, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n"}
    torchrun = {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "TORCHELASTIC_RUN_ID": "x"}
    one_each = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    others_several = {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}
    as_srun = {"RANK": "1", "WORLD_SIZE": "2"}
    for right in (torchrun, one_each, others_several, as_srun):
        with mock.patch.dict(os.environ, {**step, **right}):
            job_module.set_slurm_variables()
            assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == (right["RANK"], right["WORLD_SIZE"])
    for wrong in ({"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "2"}):
        said = rf"^RANK is 0 and WORLD_SIZE is {wrong.get('WORLD_SIZE', 1)}, but srun .* task 1 of 2; .*unset RANK"
        with mock.patch.dict(os.environ, {**step, **wrong}), pytest.raises(UserError, match=said):
            job_module.set_slurm_variables()


def test_ports_differ_between_neighbouring_jobs_and_are_not_ephemeral():
    tasks = ({**TASK, "SLURM_NODEID": "0", "SLURM_JOB_ID": str(n)} for n in range(5000, 5100))
    ports = {slurm_variables(task, ["n1"])["MASTER_PORT"] for task in tasks}
    assert len(ports) == 100
    steps = ({**TASK, "SLURM_NODEID": "0", "SLURM_JOB_ID": "5000", "SLURM_STEP_ID": str(n)} for n in range(1, 20))
    ports |= {slurm_variables(task, ["n1"])["MASTER_PORT"] for task in steps}
    assert len(ports) == 119  # several runs in one allocation
    again = {**TASK, "SLURM_NODEID": "0", "SLURM_JOB_ID": "5000", "SLURM_RESTART_COUNT": "1"}
    assert slurm_variables(again, ["n1"]) != slurm_variables({**again, "SLURM_RESTART_COUNT": "0"}, ["n1"])
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if first_ephemeral == 32_768:  # Linux's default, which an administrator may change
        assert MASTER_PORTS.stop <= first_ephemeral
        assert all(int(port) in MASTER_PORTS for port in ports)


def test_gloo_gets_an_interface_only_if_the_own_name_resolves_to_loopback(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert gloo_interface([]) is None
    assert gloo_interface(["127.0.0.1"]) == "lo"  # the route to the other "node"
    assert gloo_interface(["255.255.255.255"]) is None  # there is no route
    monkeypatch.setattr(job_module, "_own_name_is_reachable", lambda: True)
    assert gloo_interface(["127.0.0.1"]) is None


@pytest.fixture
def run_task(tmp_path, monkeypatch):
    """`run_task(train, **changes)` runs a changed job as a SLURM task that calls `train`; returns its exit code."""

    def hard_exit(code: int) -> NoReturn:
        raise Left(code)

    def run(train, **changes: Path) -> int:
        monkeypatch.setitem(sys.modules, "bfsys.train", types.SimpleNamespace(train_rank=train))
        monkeypatch.setattr(job_module.os, "_exit", hard_exit)  # the real one would end the tests
        monkeypatch.setattr(job_module, "_hosts", lambda: ["n1"])
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a config.yaml").write_text("data: {sources: [{path: shards}]}\noptim: {warmup_steps: 0}\n")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)}
        environment = {**TASK, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
        try:
            with mock.patch.dict(os.environ, environment), pytest.raises(Left) as end:
                replace(make_job(tmp_path), **{"config": tmp_path / "a config.yaml", **changes})()
            assert (
                signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
            )  # the task keeps its exit code when srun ends the others
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return end.value.args[0]

    return run


class Left(BaseException):
    """Raised where the real process would exit."""


@pytest.mark.parametrize("code", [0, 1, 2, 75, 130])
def test_a_task_leaves_with_the_code_of_training(run_task, tmp_path, code):
    def train(config: Config, ranks: Ranks) -> int:
        assert (config.name, config.train.steps, ranks) == ("x", 3, Ranks(0, 4, 1, 4))
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"], Path.cwd()) == ("0", "4", tmp_path)
        return code

    assert run_task(train) == code


def test_paths_that_a_node_does_not_see_are_reported(run_task, tmp_path, capsys):
    """A node may have lost a file system for a while, so the job is started again."""
    assert run_task(lambda *_: 0, config=tmp_path / "gone.yaml", code_dir=tmp_path) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [error.partition(": does not see ")[2].partition(",")[0] for error in errors] == [
        f"{tmp_path}/gone.yaml",
        f"{tmp_path}",  # the running module is not from there
    ]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_before_training_is_ready_is_kept_for_it(run_task, number):
    received = []

    def train(config: Config, ranks: Ranks) -> int:
        os.kill(os.getpid(), number)
        time.sleep(0.2)  # simulates imports and reading of data
        previous = signal.signal(number, lambda *_: received.append(number))
        until = time.monotonic() + 900
        while not received and time.monotonic() < until:
            time.sleep(0.05)
        signal.signal(number, previous)
        return 0

    assert run_task(train) == 0
    assert received == [number]

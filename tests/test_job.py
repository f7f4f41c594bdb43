"""What a pickled job knows, and how it ends as a task of SLURM, without a cluster; training is played by a function."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest import mock

import pytest

from bfsys import job as job_module
from bfsys.job import MASTER_PORTS, TrainJob, gloo_interface, slurm_variables

ROOT = Path(__file__).resolve().parents[1]
TASK = {  # of rank 3 of 4, on the second of two nodes
    "SLURM_JOB_ID": "70123", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip


def make_job(folder: Path) -> TrainJob:
    return TrainJob(Path("/runs/a config.yaml"), ("train.steps=3", "name=x"), ROOT, folder)


def test_command_is_that_of_one_rank(tmp_path):
    command = [sys.executable, str(ROOT / "bfsys/train.py"), "/runs/a config.yaml", "train.steps=3", "name=x"]
    assert make_job(tmp_path).command() == command


def test_a_pickle_is_opened_without_heavy_imports(tmp_path):
    pickled = tmp_path / "job.pkl"
    pickled.write_bytes(pickle.dumps(make_job(tmp_path)))
    look = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).arguments(), 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", look, pickled], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['/runs/a config.yaml', 'train.steps=3', 'name=x'] False"


def test_slurm_variables():
    leaked = {
        "RANK": "9",
        "WORLD_SIZE": "99",
        "MASTER_ADDR": "elsewhere",
        "MASTER_PORT": "1",
        "SLURM_CPUS_PER_TASK": "5",
    }
    with mock.patch.object(job_module, "gloo_interface", lambda others: f"towards-{others}"):
        variables = slurm_variables({**leaked, **TASK}, ["n1", "n2"])
        assert "OMP_NUM_THREADS" not in slurm_variables({**leaked, **TASK, "OMP_NUM_THREADS": "2"}, ["n1", "n2"])
        assert "GLOO_SOCKET_IFNAME" not in slurm_variables({**TASK, "GLOO_SOCKET_IFNAME": "ib0"}, ["n1", "n2"])
    assert variables == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1", "MASTER_PORT": "20123", "OMP_NUM_THREADS": "5", "GLOO_SOCKET_IFNAME": "towards-['n1']",
    }  # fmt: skip


def test_ports_differ_between_neighbouring_jobs_and_are_not_ephemeral():
    tasks = ({**TASK, "SLURM_NODEID": "0", "SLURM_JOB_ID": str(n)} for n in range(5000, 5100))
    ports = {slurm_variables(task, ["n1"])["MASTER_PORT"] for task in tasks}
    assert len(ports) == 100
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if first_ephemeral == 32_768:  # Linux's default; an administrator may have moved it
        assert MASTER_PORTS.stop <= first_ephemeral
        assert all(int(port) in MASTER_PORTS for port in ports)


def test_gloo_is_told_an_interface_only_where_the_own_name_misleads(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert gloo_interface([]) is None
    assert gloo_interface(["127.0.0.1"]) == "lo"  # the way to the other "node"
    assert gloo_interface(["255.255.255.255"]) is None  # there is no way to it
    monkeypatch.setattr(job_module, "_own_name_is_reachable", lambda: True)
    assert gloo_interface(["127.0.0.1"]) is None


@pytest.fixture
def run_task(tmp_path, monkeypatch):
    """`run_task(train, **variables)` runs a job as a SLURM task whose training is the function `train`.

    Returns its exit code, the calls of scontrol, and the seconds it waited for SLURM.
    """
    calls = tmp_path / "calls"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n[ -z "$REFUSE" ] || {{ echo "$REFUSE" >&2; exit 1; }}\n')
    scontrol.chmod(0o755)

    def run(train, **variables: str) -> tuple[int, list[str], list[float]]:
        waited: list[float] = []
        monkeypatch.setitem(sys.modules, "bfsys.train", types.SimpleNamespace(main=train))
        monkeypatch.setattr("bfsys.dist.leave", sys.exit)  # it would end the tests
        monkeypatch.setattr(job_module, "_hosts", lambda: ["n1"])
        # Only the job's own waiting: the module `time` is everybody's.
        monkeypatch.setattr(job_module, "time", types.SimpleNamespace(sleep=waited.append))
        monkeypatch.chdir(tmp_path)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
        environment = {
            **TASK,
            "SLURM_PROCID": "0",
            "SLURM_NODEID": "0",
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            **variables,
        }
        try:
            with mock.patch.dict(os.environ, environment), pytest.raises(SystemExit) as end:
                make_job(tmp_path)()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return end.value.code, calls.read_text().splitlines() if calls.exists() else [], waited

    return run


def test_rank_0_requeues_when_time_runs_out_and_the_others_wait(run_task, tmp_path):
    def train(arguments: list[str]) -> int:
        assert arguments == make_job(tmp_path).arguments()
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"], Path.cwd()) == (rank, "4", tmp_path)
        return 75

    rank = "2"
    assert run_task(train, SLURM_PROCID="2") == (75, [], [job_module.END_WAIT_S])
    rank = "0"
    assert run_task(train) == (75, ["requeue 70123"], [])


def test_a_refused_requeue_is_said(run_task, capsys):
    assert run_task(lambda _: 75, REFUSE="Requested operation is presently disabled")[0] == 75
    error = capsys.readouterr().err
    assert "job 70123 could not be requeued: Requested operation is presently disabled; " in error
    assert "submit again" in error
    assert run_task(lambda _: 75, PATH="/nowhere")[0] == 75
    assert "could not be requeued: [Errno 2] No such file or directory: 'scontrol'" in capsys.readouterr().err


def test_a_cancelled_job_is_not_requeued_and_leaves_its_end_to_slurm(run_task):
    assert run_task(lambda _: 130) == (130, [], [job_module.END_WAIT_S])


@pytest.mark.parametrize("code", [0, 1, 2])
def test_any_other_end_is_immediate(run_task, code):
    assert run_task(lambda _: code) == (code, [], [])


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_before_training_is_ready_is_kept_for_it(run_task, number):
    received = []

    def train(_: list[str]) -> int:
        os.kill(os.getpid(), number)
        time.sleep(0.2)  # imports, reading of data, …
        previous = signal.signal(number, lambda *_: received.append(number))
        until = time.monotonic() + 5
        while not received and time.monotonic() < until:
            time.sleep(0.05)
        signal.signal(number, previous)
        return 0

    assert run_task(train)[0] == 0
    assert received == [number]

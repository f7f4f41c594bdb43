"""The life of jobs on a real cluster: after any event, the run ends like an uninterrupted one.

    python -m pytest -m slurm tests/slurm --basetemp=FOLDER

FOLDER is on a file system that the nodes share; /tmp is not, on most. Nodes lose power by the command in
BFSYS_KILL_NODE and come back by the one in BFSYS_RESTORE_NODE, each called with a node's name; without them those tests
are skipped. A job is pre-empted by one in the partition of BFSYS_PARTITIONS=LOW,HIGH (default: low,high).
BFSYS_SLURM_OPTIONS are for the launcher, such as an account.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from bfsys.errors import EXIT_DIVERGED, EXIT_STOPPED
from bfsys.launch import jobs
from bfsys.launch.slurm_commands import ask
from bfsys.supervision.goodput import read_seconds
from bfsys.supervision.run_end import how_it_ended
from tests.chaos.test_kills import assert_equal_runs
from tests.conftest import REPOSITORY, _run_ranks
from tests.test_train import assert_success, losses

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
STEPS = 150
OVERRIDES = [f"train.steps={STEPS}", "train.save_every=25", "train.log_every=1", "train.keep_best=0"]
LAUNCHER = [sys.executable, str(REPOSITORY / "launchers" / "slurm.py")]
OPTIONS = "--gpus-per-node 0 " + os.environ.get("BFSYS_SLURM_OPTIONS", "--cpus-per-task 1")
LOW, HIGH = os.environ.get("BFSYS_PARTITIONS", "low,high").split(",")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> None:
    try:
        nodes = subprocess.run(["sinfo", "--noheader", "--Node"], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("there is no SLURM here: sinfo is not found")
    if nodes.returncode:
        pytest.skip(f"SLURM does not answer: {nodes.stderr.strip()}")
    if len({line.split()[0] for line in nodes.stdout.splitlines()}) < 2:
        pytest.skip("the SLURM cluster has one node only; two are needed")


@dataclass(frozen=True)
class Job:
    run: Path
    id: str
    log: Path

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, found: Callable[[], bool], seconds: float = 180) -> None:
        until = time.monotonic() + seconds
        while not found():
            assert time.monotonic() < until, self.said() or "the job never started"
            time.sleep(0.2)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: re.search(rf"^step +{step}/", self.said(), re.MULTILINE) is not None)

    def wait_for_save(self) -> None:
        self.wait_for(lambda: re.search(r"^saved ", self.said(), re.MULTILINE) is not None)

    def wait_for_end(self, seconds: float = 300) -> None:
        self.wait_for(lambda: self.state.is_over, seconds)

    @property
    def state(self) -> jobs.State:
        return jobs.state_of(jobs.Submitted(self.id, str(self.log), "", ""))

    @property
    def starts(self) -> int:
        return self.said().count("Starting with JobEnvironment")


@pytest.fixture
def submit(config_file: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """`submit(options, overrides…)` submits a run on two nodes. Jobs are cancelled at the end."""
    submitted = []

    def submit(options: str, *overrides: str) -> Job:
        options = shlex.split(f"{OPTIONS} --nodes 2 --time 10 {options}")
        command = [*LAUNCHER, *options, str(config_file), *OVERRIDES, *overrides]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
        assert answer.returncode == 0, answer.stderr
        facts = dict(line.split(maxsplit=1) for line in answer.stdout.splitlines())
        submitted.append(facts["job"].split(":")[0])
        names = [override.partition("=")[2] for override in overrides if override.startswith("name=")]
        return Job(tmp_path / "runs" / (names or ["tiny"])[-1], submitted[-1], Path(facts["log"]))

    yield submit
    for job in submitted:
        subprocess.run(["scancel", "--quiet", job], check=False)


@pytest.fixture(scope="module")
def undisturbed(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two processes of this machine, without interruption."""
    return run_here(2, datasets, tmp_path_factory.mktemp("undisturbed"))


def run_here(ranks: int, datasets: Path, folder: Path) -> Path:
    import yaml

    from tests.conftest import tiny_config

    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_config(datasets, folder)))
    assert_success(_run_ranks(ranks, ["bfsys/train.py", str(config), *OVERRIDES]))
    return folder / "runs" / "tiny"


def assert_finished(job: Job, undisturbed: Path) -> None:
    job.wait_for_end()
    assert "finished: " in job.said(), job.said()
    assert_equal_runs(undisturbed, job.run)
    assert how_it_ended(job.run)["exit_code"] == 0


def processes_of(job: str, rank: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            env, words = process.environ(), process.cmdline()
            # The job's script and srun also contain the command, and the environment of a rank 0.
            is_task = "submitit.core._submit" in words and Path(words[0]).name.startswith("python")
            is_task = is_task and "bfsys.launch.requeue" not in words
            if is_task and env.get("SLURM_JOB_ID") == job and env.get("SLURM_PROCID") == str(rank):
                found.append(process)
    return found


def launcher(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*LAUNCHER, *arguments], capture_output=True, text=True, timeout=120, cwd=REPOSITORY)


def test_nodes_train_as_one_process_does_while_status_and_logs_tell(submit, undisturbed, datasets, tmp_path_factory):
    job = submit("--name other")
    while_waiting = launcher("status", str(job.run))
    assert while_waiting.returncode == 0
    assert f"job      {job.id}: " in while_waiting.stdout
    job.wait_for_step(5)
    running = launcher("status", str(job.run)).stdout
    assert f"job      {job.id}: RUNNING for " in running
    assert re.search(rf"^step +\d+ of {STEPS}, ", running, re.MULTILINE)
    second = launcher("--nodes=2", "--gpus-per-node=0", str(job.run / "config.yaml"), *OVERRIDES)
    assert second.returncode == 2
    assert f"job {job.id} is already pending or running" in second.stderr
    following = subprocess.Popen([*LAUNCHER, "logs", "--follow", str(job.run)], stdout=subprocess.PIPE, text=True)
    alone = run_here(1, datasets, tmp_path_factory.mktemp("alone"))  # --follow polls SLURM every 15 s
    followed, _ = following.communicate(timeout=300)
    assert followed.rstrip().endswith(f"are in {job.run}")
    assert_finished(job, undisturbed)
    assert job.starts == 1
    assert launcher("status", str(job.run)).returncode == 0
    assert launcher("logs", "--rank", "1", str(job.run)).returncode == 0
    assert losses(job.run) == pytest.approx(losses(alone), rel=2e-4)


def test_a_job_that_is_warned_before_its_end_continues(submit, undisturbed):
    job = submit("")
    job.wait_for_step(30)
    subprocess.run(["scancel", "--signal=USR1", job.id], check=True)  # time limits send USR2
    assert_finished(job, undisturbed)
    stopped = int(job.said().partition("stopped on request after step ")[2].partition(";")[0])
    assert 30 <= stopped < STEPS
    assert f"after step {stopped}\n" in job.said().partition("continuing ")[2]
    assert job.starts == 2


def test_jobs_that_run_out_of_time_continue_even_if_their_tasks_do_not_exit_in_time(submit):
    """Two jobs run at the same time, since SLURM takes more than a minute to end each."""
    endless = ["train.steps=1000000", "train.log_every=10"]
    stuck = submit("--time 2", *endless, "name=stuck", "train.hang_timeout_s=300")
    stuck.wait_for_step(30)
    ranks = processes_of(stuck.id, rank=1)
    send(signal.SIGSTOP, ranks)  # simulates a step that takes minutes
    start = len(stuck.said())  # SLURM may warn up to a minute early, so a slow start may have been requeued before
    job = submit("--time 1", *endless, "name=warned")
    until = time.monotonic() + 300
    while "continuing " not in stuck.said()[start:]:
        assert time.monotonic() < until, stuck.said()
        for _ in range(100):  # SLURM sends SIGCONT with its signals, after which a rank must not finish its step
            send(signal.SIGSTOP, ranks)
            time.sleep(0.001)
    ended, _, _ = stuck.said()[start:].partition("continuing ")
    assert "training ended with code 143; restarting in 0 s" in ended
    assert "stopped on request" not in ended
    subprocess.run(["scancel", "--quiet", stuck.id], check=True)
    job.wait_for(lambda: "continuing " in job.said(), 300)
    assert "stopped on request after step " in job.said()


def send(number: int, processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)


def test_a_job_that_is_requeued_by_an_operator_and_preempted_continues(submit, undisturbed):
    job = submit(f"--partition {LOW}")
    job.wait_for_save()
    subprocess.run(["scontrol", "requeue", job.id], check=True)
    job.wait_for(lambda: "continuing " in job.said())
    job.wait_for_step(60)
    node = first_node(job.id)
    urgent = ["sbatch", "--parsable", f"--partition={HIGH}", f"--nodelist={node}", "--exclusive", "--time=1",
              "--output=/dev/null", "--wrap=sleep 5"]  # fmt: skip
    subprocess.run(urgent, check=True, capture_output=True)
    assert_finished(job, undisturbed)
    assert job.starts == 3


def first_node(job: str) -> str:
    return nodes_of(job)[0]


def nodes_of(job: str) -> list[str]:
    """The nodes of a running job."""
    hosts = subprocess.check_output(["squeue", "--noheader", "--jobs", job, "--format=%N"], text=True).strip()
    return subprocess.check_output(["scontrol", "show", "hostnames", hosts], text=True).split()


def test_a_job_whose_rank_is_killed_continues(submit, undisturbed):
    job = submit("")
    job.wait_for_save()
    for process in processes_of(job.id, rank=1):
        process.kill()
    assert_finished(job, undisturbed)
    assert "restarting in 0 s from step " in job.said()
    assert job.starts == 2


@pytest.mark.parametrize("which", [0, 1], ids=["first", "other"])
def test_a_job_that_loses_a_node_continues(submit, undisturbed, which):
    kill, restore = (os.environ.get(f"BFSYS_{name}_NODE") for name in ("KILL", "RESTORE"))
    if not kill or not restore:
        pytest.skip("BFSYS_KILL_NODE and BFSYS_RESTORE_NODE are not set")
    job = submit("")
    job.wait_for_step(30)
    node = nodes_of(job.id)[which]
    subprocess.run([*shlex.split(kill), node], check=True)
    try:
        assert_finished(job, undisturbed)
    finally:
        subprocess.run([*shlex.split(restore), node], check=True)
    assert job.starts >= 2


def test_an_elastic_job_continues_with_fewer_nodes_and_grows_when_they_are_back(submit, undisturbed):
    kill, restore = (os.environ.get(f"BFSYS_{name}_NODE") for name in ("KILL", "RESTORE"))
    if not kill or not restore:
        pytest.skip("BFSYS_KILL_NODE and BFSYS_RESTORE_NODE are not set")
    job = submit("--nodes 2-4 --grow-every 0.1")
    job.wait_for_save()
    if "the job has 4, training takes 4" not in job.said():
        pytest.skip("SLURM has not given the job four nodes")
    node = nodes_of(job.id)[-1]
    subprocess.run([*shlex.split(kill), node], check=True)
    try:
        job.wait_for(lambda: re.search(r"the job has [23], training takes 2 ", job.said()) is not None)
    finally:
        subprocess.run([*shlex.split(restore), node], check=True)
    job.wait_for(lambda: "nodes: 2 more are free; the run saves and starts again" in job.said())
    job.wait_for(lambda: job.said().count("the job has 4, training takes 4 ") == 2)
    job.wait_for_end()
    assert "finished: " in job.said(), job.said()
    assert job.said().count("continuing ") == 2
    assert losses(job.run) == pytest.approx(losses(undisturbed), rel=2e-4)
    assert read_seconds(job.run)["restart"] > 0


def test_an_elastic_job_does_not_grow_while_too_few_other_nodes_are_free(submit, undisturbed):
    nodes = subprocess.check_output(["sinfo", "--noheader", "--Node", "--format=%N"], text=True).split()
    others = sorted(set(nodes))[3:]  # with three nodes, the job trains on two, and only one other node is free
    job = submit(f"--nodes 2-4 --grow-every 0.05 --exclude '{','.join(others)}'")
    assert_finished(job, undisturbed)
    assert "training takes 2 " in job.said()
    assert job.starts == 1


def test_a_stopped_job_saves_and_stays_away_until_it_is_submitted_again_on_other_nodes(submit, undisturbed):
    job = submit("")
    job.wait_for_step(30)
    assert launcher("stop", str(job.run)).returncode == 0
    job.wait_for_end()
    assert "stopped on request after step " in job.said()
    assert how_it_ended(job.run)["exit_code"] == EXIT_STOPPED
    status = launcher("status", str(job.run))
    assert status.returncode == 0
    assert "stopped on request (code 130)" in status.stdout
    again = submit("--nodes 1")
    again.wait_for_end()
    assert "finished: " in again.said()
    assert job.state.name == "CANCELLED"  # it was not requeued
    assert job.starts == 1
    assert losses(again.run) == pytest.approx(losses(undisturbed), rel=2e-4)


def test_the_next_job_of_a_chain_resumes_where_the_previous_one_was_cancelled(submit, undisturbed):
    job = submit("")
    following = submit("--dependency singleton")
    job.wait_for_step(30)
    subprocess.run(["scancel", job.id], check=True)
    assert_finished(following, undisturbed)
    assert "stopped on request after step " in job.said()
    assert job.state.name == "CANCELLED"
    assert (job.starts, following.starts) == (1, 1)


def test_a_job_with_a_permanent_error_is_not_requeued(submit):
    job = submit("", "train.keep_checkpoints=1", "optim.lr=1e30", "optim.warmup_steps=0", "train.save_every=1")
    job.wait_for_end()
    assert "bad steps again after" in job.said()
    assert job.starts == 1
    assert how_it_ended(job.run)["exit_code"] == EXIT_DIVERGED
    status = launcher("status", str(job.run))
    assert status.returncode == 1
    assert "(code 65)" in status.stdout


def test_a_sweep_is_an_array_of_runs(config_file, tmp_path, undisturbed):
    options = shlex.split(f"{OPTIONS} --nodes 2 --sweep train.seed=0,1")
    answer = launcher(*options, str(config_file), *OVERRIDES)
    assert answer.returncode == 0, answer.stderr
    found = re.findall(r"^job (\d+_\d): .*\nlog +(\S+)", answer.stdout, re.MULTILINE)
    assert [job.partition("_")[2] for job, _ in found] == ["0", "1"]
    runs = [tmp_path / "runs" / f"tiny-seed={seed}" for seed in (0, 1)]
    members = [Job(run, job, Path(log)) for run, (job, log) in zip(runs, found, strict=True)]
    try:
        members[0].wait_for_step(30)
        number = ask("squeue", "--noheader", "--jobs", members[0].id, "--format=%A").output.strip()
        for process in processes_of(number, rank=0):  # only one of them resumes
            process.kill()
        assert_finished(members[0], undisturbed)
        members[1].wait_for_end()
        assert members[1].starts == 1
        assert "finished: " in members[1].said()
        assert losses(runs[1]) != losses(runs[0])
    finally:
        subprocess.run(["scancel", "--quiet", found[0][0].partition("_")[0]], check=False)


def test_a_refusal_by_slurm_is_reported_with_all_other_problems(config_file, tmp_path):
    answer = launcher("--nodes=3", "--gpus-per-node=0", "--partition=nope", "--time=999-0", str(config_file))
    assert answer.returncode == 2
    assert "data.lanes: 4 lanes cannot be shared evenly by 3 nodes" in answer.stderr
    assert "invalid partition specified: nope" in answer.stderr
    answer = launcher("--nodes=1024", "--gpus-per-node=0", "--time=999-0", str(config_file), "data.lanes=1024",
                      "data.batch_samples=2048")  # fmt: skip
    assert answer.returncode == 2
    assert "sbatch --test-only: SLURM would refuse the job" in answer.stderr
    assert not (tmp_path / "runs").exists()


def test_plain_srun_starts_a_rank_for_each_task(config_file, tmp_path, undisturbed):
    options = ["--nodes=2", "--ntasks=2", "--cpus-per-task=1", "--time=5"]
    answer = subprocess.run(
        ["srun", *options, sys.executable, "-m", "bfsys", "train", str(config_file), *OVERRIDES],
        capture_output=True, text=True, timeout=300, cwd=REPOSITORY,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert_equal_runs(undisturbed, tmp_path / "runs" / "tiny")

"""The SLURM launcher: what it submits and refuses; and, where there is a cluster, that jobs stop and go on.

The tests on a cluster (pytest -m slurm) need a folder that its nodes share: --basetemp=FOLDER, unless /tmp is one.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from bfsys.config import load_config
from bfsys.errors import EXIT_DIVERGED, UserError
from bfsys.faults import how_it_ended
from launchers import slurm
from tests.test_train import lines

ON_CPUS = "--gpus-per-node=0"
ROOT = Path(__file__).resolve().parents[2]
REFUSING = "#!/bin/sh\necho 'sbatch: error: invalid partition specified: nope' >&2\nexit 1\n"
ACCEPTING = "#!/bin/sh\necho Submitted batch job 42\n"


def problems_of(*arguments: object) -> list[str]:
    with pytest.raises(UserError) as error:
        slurm.main([str(a) for a in arguments])
    return list(error.value.problems)


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Callable[[str], None]:
    """`sbatch(script)` puts a command of that name, alone, in front of PATH."""

    def make(script: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "sbatch").write_text(script)
        (folder / "sbatch").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return make


def script_of(config_file: Path, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert slurm.main([*arguments, "--dry-run", str(config_file)]) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    return script


def test_dry_run_prints_the_script_and_leaves_nothing(config_file, tmp_path, capsys):
    options = "--nodes 2 --gpus-per-node 2 --cpus-per-task 6 --mem 200G --time 1-02:00:01 --partition p --account a"
    script = script_of(
        config_file, capsys, *options.split(), "--qos=q", "--constraint=h100", "--comment=two words", "--name=j",
        "--setup", "module load x", "--env", "A=b 'c'", "--env", "D=",
    )  # fmt: skip
    lines_of_script = script.splitlines()
    for line in (
        "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=6", "--mem=200G", "--time=1561",
        "--partition=p", "--account=a", "--qos=q", "--constraint=h100", "--comment='two words'", "--job-name=j",
        "--wckey=''", "--signal=USR2@120", "--requeue", "--open-mode=append", f"--chdir={Path.cwd()}",
        f"--output={tmp_path}/runs/tiny/slurm/%j_0_log.out",
    ):  # fmt: skip
        assert f"#SBATCH {line}" in lines_of_script
    setup = lines_of_script[lines_of_script.index("# setup") + 1 : lines_of_script.index("# command")]
    exports = ["export A='b '\"'\"'c'\"'\"''", "export D=''"]
    path = f"export PYTHONPATH={ROOT}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1"
    assert setup == ["module load x", *exports, path, ""]
    srun = next(line for line in lines_of_script if line.startswith("srun"))
    assert ' --kill-on-bad-exit=1 --open-mode=append --cpus-per-task=6 bash -c \'trap "" USR2; exec ' in srun
    assert "--error" not in srun
    assert lines_of_script[-1] == f"exec {sys.executable} -m bfsys.restarts $? {tmp_path}/runs/tiny"
    assert not (tmp_path / "runs").exists()


def test_on_cpus_there_is_one_task_per_node_unless_told(config_file, capsys):
    script = script_of(config_file, capsys, "--nodes=4", ON_CPUS)
    assert "#SBATCH --ntasks-per-node=1\n" in script
    assert "--gpus-per-node" not in script
    assert "--cpus-per-task" not in script
    assert "#SBATCH --ntasks-per-node=2\n" in script_of(config_file, capsys, "--nodes=2", "--tasks-per-node=2", ON_CPUS)


def test_by_default_there_are_eight_gpus_and_tasks_on_a_node(config_file, capsys):
    config_file.write_text(
        config_file.read_text().replace("lanes: 4", "lanes: 16").replace("samples: 8", "samples: 32")
    )
    script = script_of(config_file, capsys, "--nodes=2")
    assert "#SBATCH --ntasks-per-node=8\n" in script
    assert "#SBATCH --gpus-per-node=8\n" in script


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30:00", 90), ("0:00:01", 1), ("2-00:00:00", 2880), ("0", None), ("1:70:00", None), ("1h", None)],
)
def test_time_limits(text, minutes):
    assert slurm.parse_minutes(text) == minutes


def test_node_counts_that_fit_are_named(config_file):
    assert problems_of("--nodes", 3, ON_CPUS, "--dry-run", config_file) == [
        "data.lanes: 4 lanes cannot be shared evenly by 3 nodes with 1 ranks each; numbers of nodes that fit: 1, 2, 4"
    ]
    assert problems_of("--nodes", 1, "--gpus-per-node", 8, "--dry-run", config_file) == [
        "data.lanes: 4 lanes cannot be shared evenly by 1 nodes with 8 ranks each; "
        "no number of nodes fits; ranks on a node that do: 1, 2, 4"
    ]


def test_all_problems_are_reported_at_once(config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    counts = ("--nodes=0", "--gpus-per-node=2", "--tasks-per-node=3", "--cpus-per-task=0")
    others = ("--time=1h", "--mem=lots", "--env=X", "data.sources.0.path=/no/where")
    problems = problems_of(*counts, config_file, *others)
    wrong = ["--nodes", "--cpus-per-task", "--tasks-per-node", "--time", "--mem", "--env", "sbatch", "/no/where"]
    assert [p.partition(": ")[0] for p in problems] == wrong
    assert "login node" in problems[6]
    problems = problems_of("--nodes", 1, ON_CPUS, config_file, "train.stepz=1")
    assert [p.partition(": ")[0] for p in problems] == ["sbatch", f"config {config_file}"]


def test_a_refused_job_is_one_sentence_and_leaves_no_files(config_file, tmp_path, sbatch, capfd):
    sbatch(REFUSING)
    problems = problems_of("--nodes", 2, ON_CPUS, "--partition", "nope", config_file)
    assert problems == ["sbatch refused the job: invalid partition specified: nope"]
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "runs" / "tiny").exists()


def test_submission_tells_what_to_do_next_and_carries_the_job(config_file, tmp_path, sbatch, capsys, monkeypatch):
    sbatch(ACCEPTING)
    monkeypatch.chdir(tmp_path)
    assert slurm.main(["--nodes", "2", ON_CPUS, "tiny.yaml", "train.steps=12"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    folder = tmp_path / "runs" / "tiny" / "slurm"
    assert lines["log"] == f"{folder}/42_0_log.out"
    assert lines["follow"] == f"tail -F {folder}/42_0_log.out"
    assert lines["stop"] == "scancel 42"
    job = pickle.loads((folder / "42_submitted.pkl").read_bytes()).function
    assert job == slurm.TrainJob(tmp_path / "tiny.yaml", ("train.steps=12",), ROOT, tmp_path)
    load_config(job.config, job.overrides)


def test_a_submission_from_within_a_job_is_not_bound_by_it(config_file, tmp_path, sbatch, monkeypatch):
    sbatch(f"#!/bin/sh\nenv > {tmp_path}/environment\n" + ACCEPTING)
    for name, value in (("SLURM_JOB_ID", "7"), ("SLURM_NTASKS", "1"), ("SLURM_CONF", "/etc/slurm.conf")):
        monkeypatch.setenv(name, value)
    slurm.main(["--nodes", "2", ON_CPUS, str(config_file)])
    seen = (tmp_path / "environment").read_text().splitlines()
    assert [line for line in seen if line.startswith("SLURM_")] == ["SLURM_CONF=/etc/slurm.conf"]


# --- on a cluster ---


@pytest.fixture(scope="module")
def cluster() -> None:
    try:
        nodes = subprocess.run(["sinfo", "--noheader", "--Node"], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("there is no SLURM here: sinfo is not found")
    if nodes.returncode:
        pytest.skip(f"SLURM does not answer: {nodes.stderr.strip()}")
    if len({line.split()[0] for line in nodes.stdout.splitlines()}) < 2:
        pytest.skip("the SLURM cluster has one node only; two are needed")


@pytest.fixture
def submit(cluster, config_file, capsys):
    """`submit(overrides…)` submits a run on two nodes and returns job id and rank 0's log; cancelled at the end."""
    jobs = []

    def submit(*overrides: str, minutes: str = "10") -> tuple[str, Path]:
        command = [
            "--nodes=2",
            ON_CPUS,
            "--cpus-per-task=1",
            "--time",
            minutes,
            str(config_file),
            "train.save_every=100000",
        ]
        assert slurm.main([*command, *overrides]) == 0
        lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        jobs.append(lines["stop"].split()[1])
        return jobs[-1], Path(lines["log"])

    yield submit
    for job in jobs:
        subprocess.run(["scancel", "--quiet", job])


def wait_for(found: Callable[[], bool], seconds: float, log: Path) -> None:
    until = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < until, log.read_text() if log.exists() else "the job never started"
        time.sleep(0.3)


def has(log: Path, text: str) -> Callable[[], bool]:
    return lambda: log.exists() and text in log.read_text()


def queue_state(job: str) -> str:
    """Its state in the queue; empty when it has left."""
    return subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True).stdout.strip()


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_a_job_that_is_warned_saves_and_continues_to_its_end(submit):
    job, log = submit("train.steps=300", "train.log_every=50")
    wait_for(has(log, "step  50/300"), 180, log)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    wait_for(has(log, "finished: 300 steps"), 400, log)
    text = log.read_text()
    stopped = int(text.partition("stopped on request after step ")[2].partition(";")[0])
    assert 50 <= stopped < 300
    assert f"after step {stopped}\n" in text.partition("continuing ")[2]
    wait_for(lambda: not queue_state(job), 60, log)


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_a_job_that_runs_out_of_time_continues(submit):
    _, log = submit("train.steps=100000", "train.log_every=20", minutes="3")
    wait_for(has(log, "continuing "), 400, log)
    assert "stopped on request after step " in log.read_text()


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_a_cancelled_job_saves_and_stays_away(submit):
    job, log = submit("train.steps=100000", "train.log_every=20")
    wait_for(has(log, "step     20/"), 180, log)
    subprocess.run(["scancel", job], check=True)
    wait_for(lambda: not queue_state(job), 120, log)
    assert "stopped on request after step " in log.read_text()
    time.sleep(15)
    assert not queue_state(job)
    assert log.read_text().count("Starting with JobEnvironment") == 1


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_a_job_whose_rank_is_killed_continues_to_its_end(submit, tmp_path):
    job, log = submit("train.steps=300", "train.log_every=10", "train.save_every=20")
    wait_for(has(log, "step  50/300"), 180, log)
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environment, is_rank = process.environ(), "submitit.core._submit" in process.cmdline()
            if is_rank and environment.get("SLURM_JOB_ID") == job and environment.get("SLURM_PROCID") == "1":
                process.kill()
    wait_for(has(log, "finished: 300 steps"), 400, log)
    assert "starting again in 0 s, from step " in log.read_text()
    assert [line["step"] for line in lines(tmp_path / "runs" / "tiny")] == list(range(10, 301, 10))
    wait_for(lambda: not queue_state(job), 60, log)


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_a_job_with_an_error_that_a_person_must_mend_is_not_started_again(submit, tmp_path):
    job, log = submit("train.steps=300", "train.keep_checkpoints=1", "optim.lr=1e30", "optim.warmup_steps=0",
                      "train.save_every=1")  # fmt: skip
    wait_for(lambda: log.exists() and not queue_state(job), 300, log)
    assert "bad steps again after" in log.read_text()
    assert log.read_text().count("Starting with JobEnvironment") == 1
    assert how_it_ended(tmp_path / "runs" / "tiny")["exit_code"] == EXIT_DIVERGED

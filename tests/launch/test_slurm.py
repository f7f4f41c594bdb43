"""The SLURM launcher submits and refuses jobs. Tests on a cluster check that jobs stop and continue.

The tests on a cluster (pytest -m slurm) need a folder that its nodes share: --basetemp=FOLDER, unless /tmp is one.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bfsys.cli import call
from bfsys.config import load_config
from bfsys.errors import UserError
from bfsys.launch import jobs, slurm, slurm_job
from tests.conftest import REPOSITORY

ON_CPUS = "--gpus-per-node=0"
REFUSING = "#!/bin/sh\necho 'sbatch: error: invalid partition specified: nope' >&2\nexit 1\n"
ACCEPTING = "#!/bin/sh\necho Submitted batch job 42\n"


def problems_of(*arguments: object) -> list[str]:
    with pytest.raises(UserError) as error:
        call("slurm", [str(a) for a in arguments])
    return list(error.value.problems)


@pytest.fixture(autouse=True)
def no_slurm(tmp_path, monkeypatch) -> None:
    """Hide the SLURM of this machine from the launcher."""
    which = shutil.which
    monkeypatch.setattr(slurm.shutil, "which", lambda name: which(name, path=str(tmp_path / "bin")))


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Callable[[str], None]:
    """`sbatch(script)` puts a command `sbatch` at the front of PATH."""

    def make(script: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, text in (("sbatch", script), *((n, "#!/bin/sh\n") for n in ("srun", "sinfo", "scontrol", "sacct"))):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return make


def script_of(config_file: Path, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert call("slurm", [*arguments, "--dry-run", str(config_file)]) == 0
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
    path = f"export PYTHONPATH={REPOSITORY}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1"
    assert setup == [*exports, "module load x", *exports, path, ""]
    assert "\nexport DS_ACCELERATOR=cpu\n" in script_of(config_file, capsys, "--nodes=1", "--gpus-per-node=0")
    command = lines_of_script[-2] if not lines_of_script[-1] else lines_of_script[-1]
    assert command.startswith(
        f"exec {sys.executable} -m bfsys.launch.requeue --folder {tmp_path}/runs/tiny/slurm {tmp_path}/runs/tiny "
        "-- srun --export=ALL --unbuffered "
    )
    assert ' --kill-on-bad-exit=1 --open-mode=append --cpus-per-task=6 bash -c \'trap "" USR1 USR2; exec ' in command
    assert "--error" not in command
    assert not (tmp_path / "runs").exists()


def test_on_cpus_the_default_is_one_task_per_node(config_file, capsys):
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


def test_node_counts_that_fit_are_named(config_file):
    assert problems_of("--nodes", 3, ON_CPUS, "--dry-run", config_file) == [
        "data.lanes: 4 lanes cannot be shared evenly by 3 nodes with 1 rank each; numbers of nodes that fit: 1, 2, 4"
    ]
    assert problems_of("--nodes", 1, "--gpus-per-node", 8, "--dry-run", config_file) == [
        "data.lanes: 4 lanes cannot be shared evenly by 1 node with 8 ranks each; "
        "no number of nodes fits; numbers of ranks per node that fit: 1, 2, 4"
    ]


def test_all_problems_are_reported_at_once(config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    counts = ("--nodes=0", "--gpus-per-node=2", "--tasks-per-node=3", "--cpus-per-task=0")
    for nodes in ("1-99999999999999999999", "1-2000000000", "0", "4-2"):
        assert any("--nodes: got" in problem for problem in problems_of("--nodes", nodes, ON_CPUS, config_file))
    assert any("--env: got" in problem for problem in problems_of("--nodes=1", ON_CPUS, "--env", "Aé=1", config_file))
    setup = ("--setup", "module load cuda", "--setup", "echo 'oops")
    assert any("--setup: bash cannot" in problem for problem in problems_of("--nodes=1", ON_CPUS, *setup, config_file))
    setup = ("--setup", "shopt -s extglob", "--setup", "cp /data/!(*.tmp) .")
    assert not [problem for problem in problems_of("--nodes=1", ON_CPUS, *setup, config_file) if "--setup" in problem]
    others = ("--time=1h", "--mem=lots", "--env=X", "data.sources.0.path=/no/where")
    problems = problems_of(*counts, config_file, *others)
    wrong = ["--nodes", "--cpus-per-task", "--tasks-per-node", "--time", "--mem", "--env", "sbatch", "/no/where"]
    assert [p.partition(": ")[0] for p in problems] == wrong
    assert "login node" in problems[6]
    problems = problems_of("--nodes", 1, ON_CPUS, config_file, "train.stepz=1")
    assert [p.partition(": ")[0] for p in problems] == ["sbatch", f"config {config_file}"]


def test_a_job_that_would_be_refused_is_one_sentence_and_leaves_no_files(config_file, tmp_path, sbatch, capfd):
    sbatch(REFUSING)
    problems = problems_of("--nodes", 2, ON_CPUS, "--partition", "nope", config_file)
    assert problems == ["sbatch --test-only: SLURM would refuse the job: invalid partition specified: nope"]
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "runs" / "tiny").exists()


def test_a_job_that_is_refused_after_all_leaves_nothing_of_it(config_file, tmp_path, sbatch, capfd):
    sbatch(f'#!/bin/sh\n[ "$1" = --test-only ] && exit\n{REFUSING}')
    problems = problems_of("--nodes", 2, ON_CPUS, "--partition", "nope", config_file)
    assert problems == ["sbatch refused the job: invalid partition specified: nope"]
    assert "Traceback" not in "".join(capfd.readouterr())
    code, record = sorted((tmp_path / "runs" / "tiny" / "slurm").iterdir())
    assert code.name.startswith("code-")
    assert (record.name, record.read_text()) == (jobs.JOBS, "")


def test_the_submission_prints_the_next_commands_and_contains_the_job(
    config_file, tmp_path, sbatch, capsys, monkeypatch
):
    sbatch(ACCEPTING)
    monkeypatch.chdir(tmp_path)
    assert call("slurm", ["--nodes", "2", ON_CPUS, "tiny.yaml", "train.steps=12"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    folder = tmp_path / "runs" / "tiny" / "slurm"
    assert lines["log"] == f"{folder}/42_0_log.out"
    for name, command in (("follow", "logs --follow"), ("status", "status"), ("stop", "stop")):
        assert lines[name] == f"bfsys slurm {command} {tmp_path}/runs/tiny"
    (code,) = folder.glob("code-*")
    job = pickle.loads((folder / "42_submitted.pkl").read_bytes()).function
    assert job == slurm_job.TrainJob(code / "tiny.yaml", (), code, tmp_path)
    assert load_config(job.config, ()) == load_config(config_file, ["train.steps=12"])
    assert (code / "bfsys" / "train.py").read_bytes() == (REPOSITORY / "bfsys" / "train.py").read_bytes()
    (submitted,) = jobs.submissions(tmp_path / "runs" / "tiny")
    assert (submitted.job, submitted.log) == ("42", lines["log"])
    assert submitted.command == f"bfsys slurm --nodes 2 {ON_CPUS} tiny.yaml train.steps=12"


def test_a_controller_that_did_not_answer_sbatch_may_have_taken_the_job(config_file, sbatch):
    reason = "Batch job submission failed: Socket timed out on send/recv operation"
    sbatch(f"#!/bin/sh\n[ \"$1\" = --test-only ] && exit\necho 'sbatch: error: {reason}' >&2\nexit 1\n")
    (problem,) = problems_of("--nodes", 2, ON_CPUS, config_file)
    assert problem.startswith(f"sbatch: SLURM does not answer: {reason}; is the controller up? See sinfo. ")
    assert "`squeue --me`" in problem


def scontrol_says(tmp_path: Path, script: str) -> None:
    (tmp_path / "bin" / "scontrol").write_text(f"#!/bin/sh\n{script}\n")


def test_a_run_that_has_a_job_is_not_submitted_again(config_file, tmp_path, sbatch):
    sbatch(ACCEPTING)
    assert call("slurm", ["--nodes", "2", ON_CPUS, str(config_file)]) == 0
    log = jobs.submissions(tmp_path / "runs" / "tiny")[0].log
    scontrol_says(tmp_path, f"echo JobState=PENDING StdOut={log}")
    (problem,) = problems_of("--nodes", 2, ON_CPUS, config_file)
    assert "job 42 is already pending or running; " in problem
    scontrol_says(tmp_path, "echo Unable to contact slurm controller >&2; exit 1")
    (problem,) = problems_of("--nodes", 2, ON_CPUS, config_file)
    assert "SLURM does not answer whether job 42 is over; is the controller up?" in problem
    scontrol_says(tmp_path, "echo JobState=RUNNING StdOut=/elsewhere/42_0_log.out")
    assert call("slurm", ["--nodes", "2", ON_CPUS, str(config_file)]) == 0


def test_one_submission_of_a_run_at_a_time(config_file, tmp_path, sbatch):
    sbatch(f'#!/bin/sh\n[ "$1" = --test-only ] || touch {tmp_path}/submitted\n{ACCEPTING}')
    with jobs.submitting(tmp_path / "runs" / "tiny"):
        (problem,) = problems_of("--nodes", 2, ON_CPUS, config_file)
    assert f"run directory {tmp_path}/runs/tiny: another submission of this run is in progress" in problem
    assert not (tmp_path / "submitted").exists()
    # A job that ends between the check and the submission is handled too.
    count = f"{tmp_path}/count"
    log = tmp_path / "runs" / "tiny" / "slurm" / "7_0_log.out"
    jobs.note_submission(tmp_path / "runs" / "tiny", jobs.Submitted("7", str(log), "", ""))
    scontrol_says(tmp_path, f"[ -e {count} ] && echo JobState=PENDING StdOut={log}; touch {count}")
    (problem,) = problems_of("--nodes", 2, ON_CPUS, config_file)
    assert "job 7 is already pending or running; " in problem
    assert not (tmp_path / "submitted").exists()


def test_a_job_that_cannot_be_recorded_is_not_submitted_or_is_named(config_file, tmp_path, sbatch, monkeypatch):
    sbatch(f'#!/bin/sh\n[ "$1" = --test-only ] || touch {tmp_path}/submitted\n{ACCEPTING}')
    record = tmp_path / "runs" / "tiny" / "slurm" / jobs.JOBS
    record.parent.mkdir(parents=True)
    record.symlink_to("/no/where")
    (problem,) = problems_of("--nodes", 2, ON_CPUS, config_file)
    assert problem.startswith(f"{record}: cannot be written, and each job is recorded there: ")
    assert not (tmp_path / "submitted").exists()
    record.unlink()

    def on_a_full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jobs, "note_submission", on_a_full_disk)
    (problem,) = problems_of("--nodes", 2, ON_CPUS, config_file)
    assert "No space left on device; job 42 is submitted, but status and stop do not know it" in problem
    assert "`scancel 42`" in problem


def test_sbatch_gets_no_variables_that_override_the_launchers_options(
    config_file, tmp_path, sbatch, capsys, monkeypatch
):
    sbatch(f"#!/bin/sh\nenv >> {tmp_path}/environment\n" + ACCEPTING)
    own = ("SBATCH_TIMELIMIT", "SBATCH_NO_REQUEUE", "SBATCH_REQUEUE", "SBATCH_JOB_NAME", "SBATCH_SIGNAL",
           "SBATCH_ARRAY_INX", "SBATCH_WAIT", "SBATCH_QOS", "SBATCH_OUTPUT", "SBATCH_OPEN_MODE",
           "SBATCH_MEM_PER_CPU", "SLURM_TIMELIMIT")  # fmt: skip
    others = ("SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_WCKEY", "SBATCH_RESERVATION")
    for name in own + others:
        monkeypatch.setenv(name, "1")
    assert call("slurm", ["--nodes", "2", ON_CPUS, "--qos=q", "--mem=2G", str(config_file)]) == 0
    environment = (tmp_path / "environment").read_text().splitlines()
    seen = [line for line in environment if line.startswith(("SBATCH_", "SLURM_TIMELIMIT="))]
    assert sorted(seen) == sorted(2 * [f"{name}=1" for name in others])
    assert f"note: {', '.join(sorted(own))}: not used; the options of the launcher decide" in capsys.readouterr().err


def test_invalid_names_are_rejected(config_file):
    for override, said in (
        ("name=50%", "run directory .*/runs/50%: has a % in its path, which SLURM replaces"),
        ("name=a\\b", r"run directory .*: has a \\ in its path"),
        (f"name={'x' * 260}", "^name: x{40}… has 260 bytes; at most 250 are allowed"),
        ("runs_dir=a\nb", r"run directory '.*/a\\nb/tiny': one line of printable characters"),
    ):
        (problem,) = problems_of("--nodes", 1, ON_CPUS, "--dry-run", config_file, override)
        assert re.search(said, problem), problem
    (problem,) = problems_of("--nodes", 1, ON_CPUS, "--dry-run", "--name", "a\nb", config_file)
    assert problem == "--name: got 'a\\nb'; one line of printable characters is allowed"


def test_a_repeated_sweep_submits_the_runs_without_a_job(config_file, tmp_path, sbatch, capsys):
    sbatch(ACCEPTING)
    sweep = ["--nodes", "2", ON_CPUS, "--sweep", "train.seed=0,1,2", str(config_file)]
    assert call("slurm", sweep) == 0
    folder = tmp_path / "runs" / "tiny" / "slurm"
    scontrol_says(tmp_path, f'case $4 in 42_1) echo "JobState=RUNNING StdOut={folder}/42_1_0_log.out";; esac')
    sbatch_again = tmp_path / "bin" / "sbatch"
    sbatch_again.write_text("#!/bin/sh\necho Submitted batch job 43\n")
    capsys.readouterr()
    assert call("slurm", sweep) == 0
    out, err = capsys.readouterr()
    runs = [tmp_path / "runs" / f"tiny-seed={seed}" for seed in range(3)]
    assert [[job.job for job in jobs.submissions(run)] for run in runs] == [
        ["42_0", "43_0"],
        ["42_1"],
        ["42_2", "43_1"],
    ]
    assert f"note: run {runs[1]}: job 42_1 is already pending or running, and is not submitted again" in err
    assert "job 43_1:" in out
    scontrol_says(tmp_path, f'echo "JobState=RUNNING StdOut={folder}/42_1_0_log.out"')
    assert [problem.partition(";")[0] for problem in problems_of(*sweep)] == [
        f"run {run}: job {job} is already pending or running"
        for run, job in zip(runs, ("42_0", "42_1", "42_2"), strict=True)
    ]


def test_equal_code_is_copied_once(config_file, tmp_path):
    config = load_config(config_file)
    before = slurm_job.snapshot(config)
    assert slurm_job.snapshot(config) == before
    other = slurm_job.snapshot(load_config(config_file, ["train.steps=12"]))
    assert other.parent != before.parent
    assert len(list((tmp_path / "runs" / "tiny" / "slurm").iterdir())) == 2


def test_a_sweep_has_a_run_for_each_combination(config_file, tmp_path, sbatch, capsys):
    sbatch(ACCEPTING)
    sweep = ["--sweep", "optim.lr=1e-3,2e-3", "--sweep", "train.seed=0,1"]
    assert call("slurm", ["--nodes", "2", ON_CPUS, *sweep, str(config_file)]) == 0
    names = [f"tiny-lr={rate}-seed={seed}" for rate in ("1e-3", "2e-3") for seed in (0, 1)]
    for number, name in enumerate(names):
        run = tmp_path / "runs" / name
        (submitted,) = jobs.submissions(run)
        assert submitted.job == f"42_{number}"
        pickled = tmp_path / "runs" / "tiny" / "slurm" / f"42_{number}_submitted.pkl"
        (job,) = pickle.loads(pickled.read_bytes()).args
        config = load_config(job.config, job.overrides)
        assert (config.name, str(config.train.seed)) == (name, name[-1])
        assert run in job.config.parents
    script = script_of(config_file, capsys, "--nodes=2", ON_CPUS, *sweep)
    assert (
        f"--folder {tmp_path}/runs/tiny/slurm {' '.join(f'{tmp_path}/runs/{name}' for name in names)} -- srun" in script
    )
    assert "#SBATCH --array=0-3%4\n" in script
    problems = problems_of("--nodes", 2, ON_CPUS, "--sweep", "optim.lr=1,x", "--sweep", "train.seedz=1", config_file)
    assert any("optim.lr" in problem for problem in problems)
    assert any("seedz" in problem for problem in problems)
    assert problems_of("--nodes", 2, ON_CPUS, "--sweep", "lr", config_file)[0].startswith("--sweep: got 'lr'")


def test_containers(config_file, tmp_path, capsys):
    image = tmp_path / "bfsys.sif"
    problem = f"--container: {image} is not a file here; give the path of an image that all nodes see"
    assert problem in problems_of("--nodes=2", ON_CPUS, f"--container={image}", config_file)
    image.touch()
    script = script_of(config_file, capsys, "--nodes=2", "--gpus-per-node=2", f"--container={image}")
    assert "apptainer exec --nv --bind " in script
    assert f" {image} python3 -u -m submitit.core._submit" in script
    script = script_of(config_file, capsys, "--nodes=2", ON_CPUS, "--container=nvcr.io#nvidia/pytorch:25.10-py3")
    assert "--container-image=nvcr.io#nvidia/pytorch:25.10-py3" in script
    mounts = re.search(r"--container-mounts=(\S+)", script)[1].split(",")
    assert {f"{tmp_path}/runs/tiny/slurm", f"{tmp_path}/runs/tiny", str(Path.cwd())} < set(mounts)
    assert " python3 -u -m submitit.core._submit" in script


def test_a_container_sees_all_folders_of_a_run(config_file, tmp_path, capsys):
    """Two datasets may have the same name in two folders."""
    source, *_ = load_config(config_file).data.sources
    for path in ("a/shards", "b/shards"):
        shutil.copytree(source.path, tmp_path / path)
    config = load_config(
        config_file,
        [f"data.sources=[{{path: {tmp_path}/a/shards, eval_path: {tmp_path}/b/shards}}]",
         f"train.init_from={tmp_path}/old", f"train.checkpoint_copy=file://{tmp_path}/copies"],
    )  # fmt: skip
    places = [str(path) for _, path in slurm_job.seen_by_nodes([config])]
    assert {f"{tmp_path}/{path}" for path in ("a/shards", "b/shards", "old", "copies")} < set(places)
    problems = problems_of("--nodes=2", ON_CPUS, "--container=pytorch", config_file, f"runs_dir={tmp_path}/a:b")
    assert any(f"run directory tiny {tmp_path}/a:b/tiny cannot be mounted" in problem for problem in problems)


def test_a_job_is_recorded_although_a_user_interrupts_its_submission(config_file, tmp_path, sbatch, capsys):
    """sbatch has submitted the job before Ctrl-C arrives, and answers later."""
    sbatch(
        f"#!/bin/sh\n[ $1 = --test-only ] && exit\nkill -INT {os.getpid()}\nsleep 0.3\necho Submitted batch job 42\n"
    )
    with pytest.raises(KeyboardInterrupt):
        call("slurm", ["--nodes=2", ON_CPUS, str(config_file)])
    assert [job.job for job in jobs.submissions(tmp_path / "runs" / "tiny")] == ["42"]
    assert capsys.readouterr().out.startswith("job 42: ")


def test_the_id_of_a_job_is_found_among_lines_of_the_site(config_file, tmp_path, sbatch):
    sbatch("#!/bin/sh\necho 'Your job 2 nodes limit: OK'\necho Submitted batch job 35\necho 'See job 7 for help'\n")
    assert call("slurm", ["--nodes=2", ON_CPUS, str(config_file)]) == 0
    assert [job.job for job in jobs.submissions(tmp_path / "runs" / "tiny")] == ["35"]


def test_sbatch_clusters_is_refused(config_file, sbatch, monkeypatch):
    sbatch(ACCEPTING)
    monkeypatch.setenv("SBATCH_CLUSTERS", "beta")
    (problem,) = problems_of("--nodes=2", ON_CPUS, config_file)
    assert problem.startswith("SBATCH_CLUSTERS: got 'beta'; other commands of SLURM do not read it")


def test_a_submission_from_within_a_job_is_not_bound_by_it(config_file, tmp_path, sbatch, monkeypatch):
    sbatch(f"#!/bin/sh\nenv > {tmp_path}/environment\n" + ACCEPTING)
    for name in ("JOB_ID", "NTASKS", "CONF", "CLUSTERS"):  # status and stop use the last two as well
        monkeypatch.setenv(f"SLURM_{name}", "7")
    call("slurm", ["--nodes", "2", ON_CPUS, str(config_file)])
    seen = (tmp_path / "environment").read_text().splitlines()
    assert {line for line in seen if line.startswith("SLURM_")} == {"SLURM_CONF=7", "SLURM_CLUSTERS=7"}


def test_too_few_cores_for_loader_processes_are_a_note(config_file, capsys):
    for cores, said in (([], "not given"), (["--cpus-per-task=2"], "got 2"), (["--cpus-per-task=3"], "")):
        assert (
            call("slurm", ["--nodes=1", "--gpus-per-node=1", *cores, "--dry-run", str(config_file), "data.workers=2"])
            == 0
        )
        notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: --cpus-per-task")]
        assert len(notes) == bool(said)
        assert all(said in note and note.endswith("needs 3 cores") for note in notes)


def test_a_time_limit_that_leaves_little_time_for_steps_is_a_note(config_file, capsys):
    for time, is_short in (("4", True), ("5", False)):
        assert call("slurm", ["--nodes=1", ON_CPUS, f"--time={time}", "--dry-run", str(config_file)]) == 0
        assert ("SLURM may ask the run after 100 s to save and exit" in capsys.readouterr().err) == is_short


def test_an_elastic_job_asks_for_the_numbers_of_nodes_that_fit(config_file, tmp_path, capsys):
    options = ["--nodes=1-7", "--tasks-per-node=2", "--cpus-per-task=3", ON_CPUS, "--grow"]
    assert call("slurm", [*options, "--dry-run", str(config_file)]) == 0
    script, notes = capsys.readouterr()
    assert "#SBATCH --nodes=1-2\n" in script
    assert "#SBATCH --mincpus=6\n" in script
    assert "#SBATCH --ntasks-per-node" not in script
    assert f"slurm --fit=1,2 --grow-every-s=600 {tmp_path}/runs/tiny -- srun " in script
    assert " --cpus-per-task=3 --ntasks-per-node=2 " in script
    assert "note: --nodes: got 1-7; the lanes can be shared by 1, 2 nodes" in notes
    fixed = script_of(config_file, capsys, "--nodes=3-5", ON_CPUS)  # four lanes allow only one number
    assert "#SBATCH --nodes=4\n" in fixed
    assert "--fit" not in fixed


def test_invalid_ranges_are_refused(config_file):
    assert problems_of("--nodes=5-7", ON_CPUS, "--dry-run", config_file) == [
        "data.lanes: 4 lanes cannot be shared evenly by 5 to 7 nodes with 1 rank each; "
        "numbers of nodes that fit: 1, 2, 4"
    ]
    (problem,) = problems_of("--nodes=2", ON_CPUS, "--grow", "--dry-run", config_file)
    assert problem.startswith("--grow: got --nodes 2; ")
    (problem,) = problems_of("--nodes=1-2", ON_CPUS, "--grow-every=0", "--dry-run", config_file)
    assert problem.startswith("--grow-every: got 0 minutes; ")


def test_a_site_that_forbids_ranges_or_requeueing_says_so(config_file, sbatch):
    reason = "Batch job submission failed: requeue and node ranges are disabled by policy"
    sbatch(f"#!/bin/sh\necho 'sbatch: error: {reason}' >&2\nexit 1\n")
    assert problems_of("--nodes", "1-2", ON_CPUS, config_file) == [
        f"sbatch --test-only: SLURM would refuse the job: {reason}"
    ]


def test_the_submission_of_an_elastic_job_is_described(config_file, sbatch, capsys):
    sbatch(ACCEPTING)
    assert call("slurm", ["--nodes", "1-4", ON_CPUS, str(config_file)]) == 0
    assert capsys.readouterr().out.startswith("job 42: 1 to 4 nodes with 1 rank each, on CPUs, ")

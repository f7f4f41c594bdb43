"""Train on a SLURM cluster: checks the run, then submits it as one job with one task per GPU, or CPU tasks.

    python launchers/slurm.py --nodes 8 --time 24:00:00 CONFIG
    python launchers/slurm.py --nodes 2 --gpus-per-node 4 --cpus-per-task 8 --mem 200G --time 24:00:00 CONFIG
    python launchers/slurm.py --nodes 2 --gpus-per-node 0 --tasks-per-node 4 --time 60 CONFIG train.steps=100

A job that is about to run out of time, or is pre-empted with a warning, saves a checkpoint and puts itself back in
the queue, and so does one whose rank crashed, unless that would change nothing (bfsys/restarts.py); `scancel` saves and
ends it for good; the same command continues a run that has ended.

What can be known to be wrong is said before anything waits in a queue. SLURM is spoken to through submitit, which
carries the job over as a pickle; what happens inside of it is bfsys/job.py's. Refused: a script of our own for
people to edit, where each copy ages by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # this folder has a module named slurm, and the repository root has bfsys
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from bfsys import restarts
from bfsys.config import Config, load_config
from bfsys.dryrun import dry_run
from bfsys.errors import UserError, run_command
from bfsys.job import TrainJob

# Between the request to stop and the end of the time limit: a step and a checkpoint, plus start-up if it has to be.
# SLURM may send it up to 30 s early, never late.
STOP_NOTICE_S = 120

# Python ignores USR2 until submitit takes it: by default it would die of it. (`env --ignore-signal` would read
# better, and is missing from the coreutils of RHEL 8.)
PYTHON = """bash -c 'trap "" USR2; exec "$0" "$@"' """ + shlex.quote(sys.executable)

EPILOG = """The job runs the code of this repository and reads CONFIG where they are, when it starts and at every
restart: edits made while it waits take effect. Relative paths in CONFIG are relative to the current folder. Code,
config, data and runs_dir must be on a file system that the nodes share."""


class Executor(submitit.SlurmExecutor):
    """submitit's, which can also show its script, and be made where SLURM is missing."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        return self._make_submission_file_text(self._submitit_command_str, "")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launchers/slurm.py", description=__doc__.partition("\n\n")[0], epilog=EPILOG)
    add = parser.add_argument
    add("config", metavar="CONFIG", help="YAML file, see configs/")
    add("overrides", nargs="*", metavar="section.key=value", help="for example optim.lr=3e-4")
    add("--nodes", type=int, required=True, metavar="N")
    add("--gpus-per-node", type=int, default=8, metavar="G", help="default 8; 0: train on CPUs")
    add("--tasks-per-node", type=int, metavar="T", help="ranks on a node; default: one per GPU, or 1 on CPUs")
    add("--cpus-per-task", type=int, metavar="C", help="default: the cluster's")
    add("--mem", metavar="SIZE", help="of a node, for example 200G; default: the cluster's")
    add("--time", metavar="LIMIT", default="60", help="HH:MM:SS, D-HH:MM:SS or minutes; default 60")
    for name in ("partition", "account", "qos", "constraint", "comment"):
        add(f"--{name}", help="as of sbatch")
    add("--name", help="of the job; default: the run's name")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="environment variable of the job; repeatable")
    add("--setup", action="append", default=[], metavar="CMD", help="shell command before training; repeatable")
    add("--dry-run", action="store_true", help="check everything, print the sbatch script, submit nothing")
    return parser


def ranks_per_node(args: argparse.Namespace) -> int:
    return args.tasks_per_node or args.gpus_per_node or 1


def option_problems(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the command line itself."""
    for name in ("nodes", "tasks_per_node", "cpus_per_task"):
        value = getattr(args, name)
        if value is not None and value < 1:
            yield f"--{name.replace('_', '-')}: got {value}; at least 1 is needed"
    if args.gpus_per_node < 0:
        yield f"--gpus-per-node: got {args.gpus_per_node}; 0 (CPUs) or more is allowed"
    if args.gpus_per_node > 0 and args.tasks_per_node not in (None, args.gpus_per_node):
        yield (
            f"--tasks-per-node: got {args.tasks_per_node} with {args.gpus_per_node} GPUs on a node; "
            f"each GPU has one task: leave it out"
        )
    if parse_minutes(args.time) is None:
        yield f"--time: got {args.time!r}; minutes, HH:MM:SS or D-HH:MM:SS are allowed, more than zero"
    if args.mem and not re.fullmatch(r"[1-9]\d*[KMGT]?", args.mem):
        yield f"--mem: got {args.mem!r}; a number with K, M, G or T is allowed, for example 200G"
    for assignment in args.env:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", assignment, re.DOTALL):
            yield f"--env: got {assignment!r}; NAME=VALUE is expected"


def parse_minutes(text: str) -> int | None:
    """A time limit in whole minutes, rounded up; None if it is none."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d))|(\d+)", text)
    if not match:
        return None
    days, hours, minutes, seconds, only_minutes = (int(part or 0) for part in match.groups())
    return (-(-seconds // 60) + minutes + 60 * (hours + 24 * days) + only_minutes) or None


def lanes_problem(lanes: int, nodes: int, per_node: int) -> str | None:
    """Why the lanes cannot be shared by that many nodes, and how many could share them."""
    if lanes % (nodes * per_node) == 0:
        return None
    fitting = [n for n in range(1, lanes + 1) if lanes % (n * per_node) == 0]
    if fitting:
        advice = f"numbers of nodes that fit: {', '.join(map(str, fitting))}"
    else:
        fitting = [n for n in range(1, lanes + 1) if lanes % n == 0]
        advice = f"no number of nodes fits; ranks on a node that do: {', '.join(map(str, fitting))}"
    return f"data.lanes: {lanes} lanes cannot be shared evenly by {nodes} nodes with {per_node} ranks each; {advice}"


def check(args: argparse.Namespace) -> Config:
    """The config, when nothing is found wrong with it, with its data and with the command line."""
    problems = list(option_problems(args))
    if not args.dry_run and not shutil.which("sbatch"):
        problems.append(
            "sbatch: not found; run this on a login node of the cluster, or launchers/local.py to train on this machine"
        )
    config = None
    try:
        config = load_config(args.config, args.overrides)
        with contextlib.redirect_stdout(io.StringIO()):
            dry_run(config, 1, with_data=True)
    except UserError as error:
        problems.extend(error.problems)
    if config and args.nodes > 0 and ranks_per_node(args) > 0:
        problem = lanes_problem(config.data.lanes, args.nodes, ranks_per_node(args))
        problems.extend([problem] if problem else [])
    if problems:
        raise UserError(*problems)
    return config


def make_executor(args: argparse.Namespace, config: Config, job: TrainJob) -> Executor:
    """submitit's executor with everything that sbatch and srun are to be told."""
    # submitit counts time-outs that it requeues itself; it never does, and its count must not end a run.
    run_dir = config.run_dir.absolute()
    executor = Executor(folder=run_dir / "slurm", python=PYTHON, max_num_timeout=10**6)
    exports = [f"export {name}={shlex.quote(value)}" for name, _, value in (e.partition("=") for e in args.env)]
    code_dir = shlex.quote(str(job.code_dir))
    srun_args = ["--kill-on-bad-exit=1", "--open-mode=append"]
    if args.cpus_per_task:  # srun no longer takes it over from sbatch
        srun_args.append(f"--cpus-per-task={args.cpus_per_task}")
    executor.update_parameters(
        job_name=args.name or config.name,
        nodes=args.nodes,
        ntasks_per_node=ranks_per_node(args),
        gpus_per_node=args.gpus_per_node or None,
        cpus_per_task=args.cpus_per_task,
        mem=args.mem,
        time=parse_minutes(args.time),
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        constraint=args.constraint,
        comment=args.comment,
        wckey="",  # not submitit's own, which sites that check keys refuse
        stderr_to_stdout=True,  # one log per rank, in the order of events
        srun_args=srun_args,
        setup=[
            *args.setup,
            *exports,
            # The job's code before all other, and no module from the current folder.
            f"export PYTHONPATH={code_dir}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
        ],
        # What becomes of a job whose tasks have ended by themselves.
        teardown=[f"exec {shlex.quote(sys.executable)} -m bfsys.restarts $? {shlex.quote(str(run_dir))}"],
        additional_parameters={
            "chdir": str(job.work_dir),
            "signal": f"USR2@{STOP_NOTICE_S}",
            "requeue": True,  # some sites' default is not to
        },
    )
    return executor


def submit(executor: Executor, job: TrainJob) -> submitit.Job:
    """Hand the job to SLURM; raises UserError, and leaves no files behind, if it is refused."""
    if "SLURM_JOB_ID" in os.environ:  # within another job: its number of tasks is not ours
        for name in [n for n in os.environ if n.startswith("SLURM_") and n != "SLURM_CONF"]:
            del os.environ[name]
    folder = Path(executor.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"log folder {folder}: cannot be written: {error.strerror}") from None
    before = set(folder.iterdir())
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it also raises
            return executor.submit(job)
    except FailedJobError as error:
        for path in set(folder.iterdir()) - before:
            path.unlink()
        for empty in (folder, folder.parent):
            with contextlib.suppress(OSError):
                empty.rmdir()
        reason = re.sub(r"^sbatch: (error: )?", "", str(error).strip(), flags=re.MULTILINE).replace("\n", "; ")
        raise UserError(f"sbatch refused the job: {reason}") from None
    except FailedSubmissionError as error:
        raise UserError(f"sbatch's answer is not understood, see squeue for what it did: {error}") from None


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_intermixed_args(arguments)
    config = check(args)
    job = TrainJob(
        config=Path(args.config).absolute(),
        overrides=tuple(args.overrides),
        code_dir=Path(__file__).resolve().parents[1],
        work_dir=Path.cwd(),
    )
    executor = make_executor(args, config, job)
    if args.dry_run:
        print(executor.script())
        return 0
    restarts.forget(config.run_dir)
    submitted = submit(executor, job)
    per_node, log = ranks_per_node(args), submitted.paths.stdout
    device = "one per GPU" if args.gpus_per_node else "on CPUs"
    print(
        f"job {submitted.job_id}: {args.nodes} nodes with {per_node} ranks each, {device}, "
        f"{parse_minutes(args.time)} minutes at a time\n"
        f"log     {log}\n"
        f"follow  tail -F {shlex.quote(str(log))}\n"
        f"stop    scancel {submitted.job_id}\n"
        f"resume  the same command again, after it has ended"
    )
    return 0


if __name__ == "__main__":
    run_command(main)

"""Train on a SLURM cluster: check the run, then submit it as one job with one task per GPU, or CPU tasks.

A job that runs out of time, loses a node, is pre-empted, or has a crashed rank resumes by itself in the same run
directory until its steps are done, unless another start would change nothing (requeue.py). `scancel` saves a checkpoint
and ends the job without a requeue. The same command resumes a run that has ended, also with other --nodes.

Problems are reported before the job is queued (preflight.py). The job is submitted through submitit, which stores it as
a pickle; job.py runs inside the job. Rejected alternative: a template of a script that users edit, because copies would
become outdated.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths
from submitit.slurm.slurm import _make_sbatch_string

from bfsys import console, typed_yaml
from bfsys.config import Config, load_config
from bfsys.data.storage.remote import is_remote
from bfsys.data.streaming.plan import fitting_world_sizes
from bfsys.errors import UserError, collecting, counted
from bfsys.git_state import FILE as GIT_STATE
from bfsys.git_state import git_state
from bfsys.launch import jobs, preflight, requeue
from bfsys.launch.elastic import describe, fitting, parse_range
from bfsys.launch.job import TrainJob
from bfsys.launch.slurm_commands import IS_IT_UP, is_unreached
from bfsys.launch.slurm_options import (
    forget_overrides,
    minutes_of,
    nodes_of,
    option_problems,
    parse_minutes,
    ranks_per_node,
)
from bfsys.supervision.run_end import forget_end

ROOT = Path(__file__).resolve().parents[2]

# From the stop signal to the time limit: enough for a step and a checkpoint, and for the start-up if it is not over.
# SLURM may send the signal up to 60 s early, never late. A short job has a shorter notice, to have time for steps.
STOP_NOTICE_S = 120

# Python ignores USR1 and USR2 until the task has installed its handlers. By default they would kill it. (The coreutils
# of RHEL 8 lack `env --ignore-signal`, which would be simpler.)
PYTHON = """bash -c 'trap "" USR1 USR2; exec "$0" "$@"' """


class Executor(submitit.SlurmExecutor):
    """submitit's executor. Its script runs srun under requeue.py, and can be made and shown without SLURM."""

    srun: Sequence[str] = ()
    """Options of srun."""
    run_dirs: Sequence[Path] = ()
    elastic: Sequence[str] = ()
    """Options of requeue.py."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    @property
    def _submitit_command_str(self) -> str:
        log = str(JobPaths(folder=self.folder).stdout)
        if len(self.run_dirs) > 1:
            log = log.replace("%j", "%A_%a")
        supervise = [sys.executable, "-m", "bfsys.launch.requeue", *self.elastic, *map(str, self.run_dirs), "--"]
        # With SBATCH_EXPORT=NONE or SLURM_EXPORT_ENV=NONE, srun by default passes no variables on, not even PATH.
        srun = ["srun", "--export=ALL", "--unbuffered", "--output", log, "--kill-on-bad-exit=1", "--open-mode=append"]
        return f"exec {shlex.join([*supervise, *srun, *self.srun])} {super()._submitit_command_str}"

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        """The id in sbatch's output, to which a site may add its own lines."""
        text = string if isinstance(string, str) else string.decode(errors="replace")
        found = re.findall(r"^Submitted batch job (\d+)", text, re.MULTILINE)
        return found[-1] if found else submitit.SlurmExecutor._get_job_id_from_submission_command(text)

    def _num_tasks(self) -> int:
        return 1 if self.elastic else super()._num_tasks()  # SLURM decides; submitit would multiply by a range of nodes

    def script(self) -> str:
        count = len(self.run_dirs) if len(self.run_dirs) > 1 else None
        return _make_sbatch_string(self._submitit_command_str, self.folder, map_count=count, **self.parameters)


def lanes_problem(lanes: int, nodes: range, per_node: int) -> str | None:
    """Return why none of these numbers of nodes can share the lanes, with numbers that can; None if one can."""
    if fitting(lanes, nodes, per_node):
        return None
    if fit := fitting(lanes, range(1, lanes + 1), per_node):
        advice = f"numbers of nodes that fit: {', '.join(map(str, fit))}"
    else:
        advice = f"no number of nodes fits; numbers of ranks per node that fit: {fitting_world_sizes(lanes)}"
    shared_by = describe_nodes(nodes, per_node)
    return f"data.lanes: {counted(lanes, 'lane')} cannot be shared evenly by {shared_by}; {advice}"


def describe_nodes(nodes: range, per_node: int) -> str:
    number = counted(nodes.start, "node") if len(nodes) == 1 else f"{describe(nodes)} nodes"
    return f"{number} with {counted(per_node, 'rank')} each"


def job_nodes(args: argparse.Namespace, configs: Sequence[Config]) -> list[int]:
    """The requested numbers of nodes that share the lanes of every run evenly. If none does, all requested ones."""
    lanes = math.gcd(*(config.data.lanes for config in configs))
    return fitting(lanes, nodes_of(args), ranks_per_node(args)) or list(nodes_of(args))


def check(args: argparse.Namespace, configs: Sequence[Config], problems: list[str]) -> list[str]:
    """Check the runs and their job, and return notes. Raises UserError with `problems` and all that are found."""
    found = preflight.Checked(list(problems), [])
    requested = parse_range(args.nodes) if ranks_per_node(args) > 0 else None
    nodes = job_nodes(args, configs) if requested else [1]
    for config in configs:
        ranks = max(1, nodes[0] * ranks_per_node(args))  # with the fewest ranks, each needs the most memory
        found.add(preflight.check_run(config, ranks, on_gpu=bool(args.gpus_per_node)))
        found.notes.extend(notes_on_cores(args, config))
        if requested and (problem := lanes_problem(config.data.lanes, requested, ranks_per_node(args))):
            found.problems.append(problem)
    if requested and len(nodes) < len(requested):
        found.notes.append(
            f"--nodes: got {args.nodes}; the lanes can be shared by {', '.join(map(str, nodes))} nodes, "
            f"and the job releases additional nodes when it starts"
        )
    found.problems.extend(container_problems(args, configs))
    found.add(preflight.check_places(seen_by_nodes(configs)))
    if shutil.which("sbatch") and not any(option_problems(args)):
        script = make_executor(args, configs, ROOT).script()
        if ignored := forget_overrides(script):
            found.notes.append(f"{', '.join(ignored)}: not used; the options of the launcher decide, see --help")
        found.add(preflight.check_slurm(script, args.partition, nodes[0], minutes_of(args), args.qos))
    if found.problems:
        raise UserError(*dict.fromkeys(found.problems))
    return found.notes


def notes_on_cores(args: argparse.Namespace, config: Config) -> Iterator[str]:
    """Yield a note if a rank and its loader processes have fewer cores than they need."""
    if config.data.workers and (args.cpus_per_task or 0) <= config.data.workers:
        got = f"got {args.cpus_per_task}" if args.cpus_per_task else "not given, and a cluster's default is often 1"
        yield (
            f"--cpus-per-task: {got}; {config.name} has {counted(config.data.workers, 'loader process')} "
            f"for each rank (data.workers) and needs {config.data.workers + 1} cores"
        )


def problem_of_jobs(config: Config) -> str | None:
    """Return why a run cannot be submitted: it already has a job. Raises UserError if SLURM does not answer."""
    for job, state in jobs.active(config.run_dir):
        if state == jobs.NO_ANSWER:
            raise UserError(f"run {config.run_dir}: SLURM does not answer whether job {job.job} is over; {IS_IT_UP}")
        return (
            f"run {config.run_dir}: job {job.job} is already pending or running; stop it with bfsys slurm stop "
            f"{shlex.quote(str(config.run_dir))}, queue behind it with --dependency singleton, or start another run "
            "with name=…"
        )
    return None


def without_jobs(args: argparse.Namespace, configs: Sequence[Config], problems: list[str]) -> list[Config]:
    """Return the runs that can be submitted; of a sweep, those without a job. If there are none, add to `problems`."""
    if args.dependency or not shutil.which("sbatch"):
        return list(configs)
    with collecting(problems):
        found = [(config, problem_of_jobs(config)) for config in configs]
        if free := [config for config, problem in found if not problem]:
            for problem in (problem for _, problem in found if problem):
                print(f"note: {problem.partition(';')[0]}, and is not submitted again", file=sys.stderr)
            return free
        problems += [problem for _, problem in found if problem]
    return list(configs)


def seen_by_nodes(configs: Sequence[Config]) -> list[tuple[str, Path]]:
    """The paths that a job needs on every node, each after its description, without Python."""
    places = [("current folder", Path.cwd())]
    for config in configs:
        scheme, _, folder = (config.train.checkpoint_copy or "").partition("://")
        needed = (
            *(("data", path) for source in config.data.sources for path in (source.path, source.eval_path)),
            ("train.init_from", config.train.init_from),
            ("train.checkpoint_copy", folder if scheme in ("file", "local") else None),
        )
        places += [(f"run directory {config.name}", config.run_dir.absolute())]
        places += [(what, Path(path).absolute()) for what, path in needed if path and not is_remote(path)]
    return list(dict.fromkeys(places))


def container_problems(args: argparse.Namespace, configs: Sequence[Config]) -> Iterator[str]:
    """Yield why the container cannot be used: its image is missing, or a folder cannot be mounted in it."""
    if not args.container:
        return
    if args.container.endswith(".sif") and not os.path.isfile(args.container):
        yield f"--container: {args.container} is not a file here; give the path of an image that all nodes see"
    for what, path in seen_by_nodes(configs):
        if found := [character for character in ",:" if character in str(path)]:
            yield (
                f"--container: {what} {path} cannot be mounted, because {found[0]!r} separates the parts of a mount; "
                "choose another folder"
            )


def snapshot(config: Config) -> Path:
    """Copy bfsys/ and the resolved config into the run directory, unless it has an equal copy. Returns the path of the
    config."""
    sources = sorted(path for path in (ROOT / "bfsys").rglob("*") if path.suffix == ".py")
    texts = {path.relative_to(ROOT): path.read_bytes() for path in sources}
    texts[Path(f"{config.name}.yaml")] = typed_yaml.dump(config).encode()
    texts[Path(GIT_STATE)] = (git_state() or "").encode()
    digest = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:12]
    folder = jobs.slurm_folder(config.run_dir.absolute()) / f"code-{digest}"
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    if not folder.exists():
        for path, text in texts.items():
            (part / path).parent.mkdir(parents=True, exist_ok=True)
            (part / path).write_bytes(text)
        part.rename(folder)
    return folder / f"{config.name}.yaml"


def make_executor(args: argparse.Namespace, configs: Sequence[Config], code_dir: Path) -> Executor:
    """Make submitit's executor with all options of sbatch and srun."""
    run_dirs = [config.run_dir.absolute() for config in configs]
    base = run_dirs[0] if len(configs) == 1 else run_dirs[0].with_name(load_config(args.config, args.overrides).name)
    python, srun_args = shlex.quote(sys.executable), []
    folder = jobs.slurm_folder(base)
    if args.container:
        places = ",".join(dict.fromkeys(map(str, [folder, *(path for _, path in seen_by_nodes(configs))])))
        python = "python3"
        if args.container.endswith(".sif"):
            nv = "--nv " if args.gpus_per_node else ""
            python = f"apptainer exec {nv}--bind {shlex.quote(places)} {shlex.quote(args.container)} python3"
        else:
            srun_args += [f"--container-image={args.container}", f"--container-mounts={places}"]
    # submitit limits its own requeues after time-outs. They are not used, so the limit must not end a run.
    executor = Executor(folder=folder, python=PYTHON + python, max_num_timeout=10**6)
    executor.run_dirs = run_dirs
    exports = [f"export {name}={shlex.quote(value)}" for name, _, value in (e.partition("=") for e in args.env)]
    if args.cpus_per_task:  # srun no longer inherits it from sbatch
        srun_args.append(f"--cpus-per-task={args.cpus_per_task}")
    others: dict[str, object] = {"reservation": args.reservation} if args.reservation else {}
    nodes, per_node = job_nodes(args, configs), ranks_per_node(args)
    tasks: dict[str, object] = {"ntasks_per_node": per_node, "cpus_per_task": args.cpus_per_task}
    if len(nodes) > 1:
        # If sbatch gets tasks, SLURM 22.05 gives a job without GPUs the fewest nodes of a range. So it gets cores.
        tasks = {"ntasks_per_node": None}
        others["mincpus"] = per_node * (args.cpus_per_task or 1)
        srun_args.append(f"--ntasks-per-node={per_node}")
        executor.elastic = [f"--fit={','.join(map(str, nodes))}"]
        executor.elastic += [f"--grow-every-s={60 * args.grow:g}"] if args.grow else []
    executor.srun = srun_args
    minutes = minutes_of(args)
    executor.update_parameters(
        job_name=args.name or base.name,
        nodes=nodes[0] if len(nodes) == 1 else f"{nodes[0]}-{nodes[-1]}",
        **tasks,
        gpus_per_node=args.gpus_per_node or None,
        mem=args.mem,
        time=minutes,
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        constraint=args.constraint,
        exclude=args.exclude,
        dependency=args.dependency,
        comment=args.comment,
        wckey="",  # sites that check keys refuse submitit's default
        stderr_to_stdout=True,  # one log per rank, in the order of events
        use_srun=False,  # the command already contains srun
        setup=[
            *([] if args.gpus_per_node else ["export DS_ACCELERATOR=cpu"]),  # the GPUs of the node may still be visible
            *exports,  # the commands of the setup see the variables
            *args.setup,
            *exports,  # and do not change them for the ranks
            # The job's copy of the code comes first, and no module is imported from the current folder.
            f"export PYTHONPATH={shlex.quote(str(code_dir))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
        ],
        additional_parameters={
            "chdir": str(Path.cwd()),
            "signal": f"USR2@{min(STOP_NOTICE_S, 20 * minutes)}",
            "requeue": True,  # some sites have another default
            **others,
        },
    )
    return executor


def submit(executor: Executor, tasks: Sequence[TrainJob]) -> list[submitit.Job]:
    """Submit the job, as an array if there are several tasks. If SLURM refuses it, remove submitit's files and raise
    UserError."""
    if "SLURM_JOB_ID" in os.environ:  # within another job: do not inherit its number of tasks
        for name in [n for n in os.environ if n.startswith("SLURM_") and n != "SLURM_CONF"]:
            del os.environ[name]
    folder = Path(executor.folder)
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit also prints the error that it raises
            return [executor.submit(tasks[0])] if len(tasks) == 1 else executor.map_array(TrainJob.__call__, tasks)
    except FailedJobError as error:
        for path in set(folder.iterdir()) - before:
            if path.name.startswith(".submission_file") or path.suffix == ".pkl":  # not a log of another job
                path.unlink()
        reason = re.sub(r"^sbatch: (error: )?", "", str(error).strip(), flags=re.MULTILINE).replace("\n", "; ")
        if is_unreached(reason):
            raise UserError(
                f"sbatch: SLURM does not answer: {reason}; {IS_IT_UP}. Before you submit again, run `squeue --me`. If "
                "the job is there, cancel it with scancel, because its files were removed"
            ) from None
        raise UserError(f"sbatch refused the job: {reason}") from None
    except FailedSubmissionError as error:
        raise UserError(f"unexpected output of sbatch; squeue shows whether the job was submitted: {error}") from None


def submit_runs(args: argparse.Namespace, configs: Sequence[Config], problems: list[str]) -> int:
    """Check the runs and submit them as one job. Returns the exit code. Raises UserError if there are `problems`."""
    configs = without_jobs(args, configs, problems)
    notes = check(args, configs, problems)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if args.dry_run:
        print(make_executor(args, configs, ROOT).script())
        return 0
    console.go_on_without()  # a closed console must not stop this: each submitted job must be recorded
    with contextlib.ExitStack() as locks:
        for config in configs:
            locks.enter_context(jobs.submitting(config.run_dir))
        if not args.dependency and (found := [p for config in configs if (p := problem_of_jobs(config))]):
            raise UserError(*found)  # submitted since the check
        with holding_stop_signals():
            submitted = submit_and_note(args, configs)
            tell(args, configs, submitted)
    return jobs.follow(configs[0].run_dir) if args.follow else 0


@contextlib.contextmanager
def holding_stop_signals() -> Iterator[None]:
    """Deliver stop signals after the block, so that each submitted job is recorded."""
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    received: list[int] = []
    previous = {n: signal.signal(n, lambda number, _: received.append(number)) for n in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # for sbatch, which inherits it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in previous.items():
            signal.signal(number, handler)
        if received:
            os.kill(os.getpid(), received[0])


def submit_and_note(args: argparse.Namespace, configs: Sequence[Config]) -> list[jobs.Submitted]:
    """Submit the runs, and record their jobs in their directories."""
    try:
        paths = [snapshot(config) for config in configs]
    except OSError as error:
        raise UserError(f"run directory {configs[0].run_dir}: cannot be written: {error.strerror}") from None
    # An array has one script and therefore one PYTHONPATH. The copies differ only in their configs.
    code_dir = paths[0].parent
    tasks = [TrainJob(config=path, overrides=(), code_dir=code_dir, work_dir=Path.cwd()) for path in paths]
    executor = make_executor(args, configs, code_dir)
    command, now = shlex.join(["bfsys", "slurm", *args.arguments]), time.strftime("%F %T")
    for config in configs:
        requeue.forget(config.run_dir)
    submitted = [
        jobs.Submitted(str(job.job_id), str(job.paths.stdout), now, command) for job in submit(executor, tasks)
    ]
    unnoted = []
    for config, job in zip(configs, submitted, strict=True):
        try:
            jobs.note_submission(config.run_dir, job)
            forget_end(config.run_dir)
        except OSError as error:
            unnoted.append(
                f"run directory {config.run_dir}: cannot be written: {error.strerror}; job {job.job} is submitted, "
                f"but status and stop do not know it: end it with `scancel {job.job}`, or see `squeue --jobs {job.job}`"
            )
    if unnoted:
        raise UserError(*unnoted)
    return submitted


def tell(args: argparse.Namespace, configs: Sequence[Config], submitted: Sequence[jobs.Submitted]) -> None:
    """Print a summary of the submitted jobs, and the commands to manage them."""
    device = "one per GPU" if args.gpus_per_node else "on CPUs"
    for config, job in zip(configs, submitted, strict=True):
        run = shlex.quote(str(config.run_dir))
        print(
            f"job {job.job}: {describe_nodes(nodes_of(args), ranks_per_node(args))}, "
            f"{device}, {counted(parse_minutes(args.time) or 0, 'minute')} at a time\n"
            f"log     {job.log}\n"
            f"status  bfsys slurm status {run}\n"
            f"follow  bfsys slurm logs --follow {run}\n"
            f"stop    bfsys slurm stop {run}\n"
            f"resume  the same command again, after it has ended"
        )

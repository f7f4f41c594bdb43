"""Train on a SLURM cluster: check the run, then submit it as one job with one task per GPU, or CPU tasks.

Problems are reported before the job is queued (preflight.py). slurm_job.py makes the job and submits it. requeue.py
resumes it after a time limit, a lost node, a pre-emption or a crash.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bfsys import console
from bfsys.config import Config
from bfsys.data.streaming.plan import fitting_world_sizes
from bfsys.errors import STOPS_COMMANDS, UserError, collecting, counted, os_errors_as
from bfsys.launch import jobs, preflight, requeue
from bfsys.launch.elastic import describe, fitting, parse_range
from bfsys.launch.job import CODE_DIR, TrainJob
from bfsys.launch.slurm_commands import IS_IT_UP
from bfsys.launch.slurm_job import (
    EARLY_S,
    STOP_NOTICE_S,
    job_nodes,
    make_executor,
    seen_by_nodes,
    snapshot,
    stop_notice_s,
    submit,
)
from bfsys.launch.slurm_options import (
    forget_overrides,
    minutes_of,
    nodes_of,
    option_problems,
    parse_minutes,
    ranks_per_node,
)
from bfsys.process import blocking, handling
from bfsys.supervision.run_end import forget_end


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
    if minutes := parse_minutes(args.time):
        found.notes.extend(notes_on_time(minutes))
    found.problems.extend(container_problems(args, configs))
    found.add(preflight.check_places(seen_by_nodes(configs)))
    if shutil.which("sbatch") and not any(option_problems(args)):
        script = make_executor(args, configs, CODE_DIR).script()
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


def notes_on_time(minutes: int) -> Iterator[str]:
    """Yield a note if a start may have little time for more than one step, so that the job is requeued endlessly."""
    trains_s = max(0, 60 * minutes - stop_notice_s(minutes) - EARLY_S)
    if trains_s < STOP_NOTICE_S:
        yield (
            f"--time: got {counted(minutes, 'minute')}; SLURM may ask the run after {trains_s} s to save and exit, and "
            "the job is then requeued, perhaps after a single step; give 5 minutes or more"
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


def submit_runs(args: argparse.Namespace, configs: Sequence[Config], problems: list[str]) -> int:
    """Check the runs and submit them as one job. Returns the exit code. Raises UserError if there are `problems`."""
    configs = without_jobs(args, configs, problems)
    notes = check(args, configs, problems)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if args.dry_run:
        print(make_executor(args, configs, CODE_DIR).script())
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
    numbers = [n for n in STOPS_COMMANDS if signal.getsignal(n) != signal.SIG_IGN]
    received: list[int] = []
    try:
        # They are blocked for sbatch, which inherits the mask.
        with handling(numbers, lambda number, _: received.append(number)), blocking(numbers):
            yield
    finally:
        if received:
            os.kill(os.getpid(), received[0])


def submit_and_note(args: argparse.Namespace, configs: Sequence[Config]) -> list[jobs.Submitted]:
    """Submit the runs, and record their jobs in their directories."""
    with os_errors_as(f"run directory {configs[0].run_dir}: cannot be written"):
        paths = [snapshot(config) for config in configs]
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
            f"{device}, {counted(minutes_of(args), 'minute')} at a time\n"
            f"log     {job.log}\n"
            f"status  bfsys slurm status {run}\n"
            f"follow  bfsys slurm logs --follow {run}\n"
            f"stop    bfsys slurm stop {run}\n"
            f"resume  the same command again, after it has ended"
        )

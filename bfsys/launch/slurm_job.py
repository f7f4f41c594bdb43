"""A SLURM job: its script, the copy of the code that it runs, and its submission through submitit.

submitit stores the job as a pickle; job.py runs inside the job. Rejected alternative: a template of a script that users
edit, because copies would become outdated.
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
import sys
from collections.abc import Sequence
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths
from submitit.slurm.slurm import _make_sbatch_string

from bfsys import typed_yaml
from bfsys.config import Config, load_config
from bfsys.errors import UserError
from bfsys.files import exists
from bfsys.git_state import FILE as GIT_STATE
from bfsys.git_state import git_state
from bfsys.launch import jobs
from bfsys.launch.elastic import fitting
from bfsys.launch.job import CODE_DIR, TrainJob
from bfsys.launch.slurm_commands import AS_OF_SBATCH, IS_IT_UP, is_unreached, outside_a_job
from bfsys.launch.slurm_options import minutes_of, nodes_of, ranks_per_node
from bfsys.locations import is_remote

# From the stop signal to the time limit: enough for a step and a checkpoint, and for the start-up if it is not over.
# SLURM may send the signal up to EARLY_S early, never late. A short job has a shorter notice, to have time for steps.
STOP_NOTICE_S = 120
EARLY_S = 60

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
        supervise = [sys.executable, "-m", "bfsys.launch.requeue", "--folder", str(self.folder), *self.elastic]
        supervise += [*map(str, self.run_dirs), "--"]
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


def job_nodes(args: argparse.Namespace, configs: Sequence[Config]) -> list[int]:
    """The requested numbers of nodes that share the lanes of every run evenly. If none does, all requested ones."""
    lanes = math.gcd(*(config.data.lanes for config in configs))
    return fitting(lanes, nodes_of(args), ranks_per_node(args)) or list(nodes_of(args))


def stop_notice_s(minutes: int) -> int:
    return min(STOP_NOTICE_S, 20 * minutes)


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


def snapshot(config: Config) -> Path:
    """Copy bfsys/ and the resolved config into the run directory, unless it has an equal copy. Returns the path of the
    config."""
    sources = sorted(path for path in (CODE_DIR / "bfsys").rglob("*") if path.suffix == ".py")
    texts = {path.relative_to(CODE_DIR): path.read_bytes() for path in sources}
    texts[Path(f"{config.name}.yaml")] = typed_yaml.dump(config).encode()
    texts[Path(GIT_STATE)] = (git_state() or "").encode()
    digest = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:12]
    folder = jobs.slurm_folder(config.run_dir.absolute()) / f"code-{digest}"
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    if not exists(folder):
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
        **{name: getattr(args, name) for name in AS_OF_SBATCH if name != "reservation"},
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
            "signal": f"USR2@{stop_notice_s(minutes)}",
            "requeue": True,  # some sites have another default
            **others,
        },
    )
    return executor


def submit(executor: Executor, tasks: Sequence[TrainJob]) -> list[submitit.Job]:
    """Submit the job, as an array if there are several tasks. If SLURM refuses it, remove submitit's files and raise
    UserError."""
    if "SLURM_JOB_ID" in os.environ:
        for name in os.environ.keys() - outside_a_job(os.environ):
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
                "the job is there, cancel it with scancel: its files were removed, so it would end with code 2"
            ) from None
        raise UserError(f"sbatch refused the job: {reason}") from None
    except FailedSubmissionError as error:
        raise UserError(f"unexpected output of sbatch; squeue shows whether the job was submitted: {error}") from None

"""TrainJob: a training run as launchers pass it to local processes or, pickled, to the tasks of a SLURM job.

A job holds what was requested and no progress. The progress is in the run directory, so the same pickle is started
again after a node failure, a pre-emption or a time limit, and training resumes from the newest checkpoint. Rejected
alternative: submitit's own `checkpoint()` protocol. It acts only on global rank 0, at any point between two byte codes
of Python, where no collective save is possible. Here all ranks agree on the step after which they save and exit, and
the job's script asks SLURM for another start (requeue.py).

Importing this module is quick. Heavy modules are imported within the call, after it has replaced submitit's signal
handlers: a signal may arrive during these imports.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from bfsys.errors import EXIT_CRASHED, UserError, exit_code_of
from bfsys.files import is_dir, is_file
from bfsys.ranks import env_number, ranks_from_environment

# Outside Linux's range of ephemeral ports (32768-60999), which outgoing connections may occupy.
MASTER_PORTS = range(10_000, 30_000)
PORTS_BETWEEN_STARTS = 1009  # between the steps and the starts of one job; consecutive jobs have consecutive ports

# Step numbers from here on are special: the batch script, the shell of salloc, the external step.
FIRST_SPECIAL_STEP = 0xFFFFFFF0

CODE_DIR = Path(__file__).resolve().parents[2]  # the folder that holds this bfsys/


@dataclass(frozen=True)
class TrainJob:
    """A run that can be started any number of times."""

    config: Path
    """Absolute."""
    overrides: tuple[str, ...]
    code_dir: Path
    """Absolute; the folder that holds bfsys/."""
    work_dir: Path
    """Absolute; the base of relative paths in the config."""

    def command(self) -> list[str]:
        """The command of one rank's process, to be run in `work_dir`."""
        return [sys.executable, str(self.code_dir / "bfsys" / "train.py"), str(self.config), *self.overrides]

    def __call__(self) -> None:
        """Run as one task of a SLURM job. Exits with training's code and does not return, so that submitit writes no
        result. The run directory records whether the run is finished."""
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, _ask_again)
        code = exit_code_of(self._train)
        # If a rank fails, srun ends the others. They ignore its SIGTERM, so that their code becomes the job's.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # for the reason, see dist.hard_exit

    def _train(self) -> int:
        if problems := [
            f"node {socket.gethostname()}: does not see {path}, or sees a different one; it must be on a file "
            f"system that the nodes share with the machine that submits"
            for path, is_seen in (
                (self.work_dir, is_dir(self.work_dir)),
                (self.config, is_file(self.config)),
                (self.code_dir, self.code_dir.resolve() == CODE_DIR),
            )
            if not is_seen
        ]:
            raise UserError(*problems, exit_code=EXIT_CRASHED)  # the file system may come back, or another node be used
        os.chdir(self.work_dir)
        os.environ.update(slurm_variables(os.environ, _hosts()))
        from bfsys.config import load_config

        config, ranks = load_config(self.config, self.overrides), ranks_from_environment()
        from bfsys.train import train_rank

        return train_rank(config, ranks)


def rank_variables(
    rank: int, world_size: int, local_rank: int, local_world_size: int, *, master_addr: str, master_port: int
) -> dict[str, str]:
    """Return the environment that tells a process of bfsys/train.py its rank."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(master_port),
    }


def free_port() -> int:
    """Find a free port for the ranks, outside the ephemeral range. Launchers start the search at different ports."""
    for i in range(len(MASTER_PORTS)):
        port = MASTER_PORTS[(os.getpid() + i) % len(MASTER_PORTS)]
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise UserError(f"no free port from {MASTER_PORTS.start} to {MASTER_PORTS.stop - 1} on this machine")


def slurm_variables(env: Mapping[str, str], hosts: Sequence[str]) -> dict[str, str]:
    """Return the variables of a rank from those of a SLURM task. `hosts` are the step's nodes in SLURM's order.

    They replace existing variables, because SLURM passes the variables of the submitting shell to the job.
    """
    world_size = int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"])
    start = int(env.get("SLURM_STEP_ID") or 0) + int(env.get("SLURM_RESTART_COUNT") or 0)
    variables = rank_variables(
        int(env["SLURM_PROCID"]),
        world_size,
        int(env["SLURM_LOCALID"]),
        world_size // len(hosts),  # each node has the same number of tasks
        master_addr=hosts[0],
        # Jobs that share a node, steps of a job, and its starts get different ports. The port of a start may be in use.
        master_port=MASTER_PORTS[(int(env["SLURM_JOB_ID"]) + PORTS_BETWEEN_STARTS * start) % len(MASTER_PORTS)],
    )
    if "OMP_NUM_THREADS" not in env and "SLURM_CPUS_PER_TASK" in env:
        variables["OMP_NUM_THREADS"] = env["SLURM_CPUS_PER_TASK"]
    if "TRITON_CACHE_DIR" not in env and (cache := kernel_cache()):
        variables["TRITON_CACHE_DIR"] = str(cache)
    if "GLOO_SOCKET_IFNAME" not in env:
        others = [host for i, host in enumerate(hosts) if i != int(env["SLURM_NODEID"])]
        interface = gloo_interface(others)
        if interface:
            variables["GLOO_SOCKET_IFNAME"] = interface
    return variables


def set_slurm_variables() -> None:
    """Make this process a rank if plain srun has started it as one of several tasks. A batch script and the shell of
    salloc also have SLURM_NTASKS, but are not such tasks.

    Raises UserError if RANK and WORLD_SIZE come from another launcher than the one that started this task.
    """
    if "SLURM_STEP_NODELIST" not in os.environ or env_number("SLURM_STEP_ID", 0) >= FIRST_SPECIAL_STEP:
        return
    tasks = env_number("SLURM_STEP_NUM_TASKS", env_number("SLURM_NTASKS", 1))
    if tasks <= 1:
        return
    if "RANK" not in os.environ:
        os.environ.update(slurm_variables(os.environ, _hosts()))
        return
    rank, world_size = env_number("RANK", 0), env_number("WORLD_SIZE", 1)
    task = env_number("SLURM_PROCID", 0)
    # Launchers such as torchrun, one on each node, start several ranks in a task and number them themselves.
    is_of_a_task = "TORCHELASTIC_RUN_ID" in os.environ or ("LOCAL_RANK" in os.environ and world_size > tasks)
    if not is_of_a_task and (rank, world_size) != (task, tasks):
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE is {world_size}, but srun has started this process as task {task} of "
            f"{tasks}; these variables are perhaps left over in the shell: unset RANK WORLD_SIZE"
        )


def kernel_cache() -> Path | None:
    """Return a folder of this user for compiled kernels, on the node's local disk. By default, all ranks of all nodes
    would write to one home directory. Returns None if it cannot be made, or if other users can write to it."""
    folder = Path(tempfile.gettempdir()) / f"bfsys-triton-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if is_own else None


def gloo_interface(other_hosts: Sequence[str]) -> str | None:
    """Return the network interface that gloo must use, or None if it finds the right one itself.

    Gloo listens on the address of this machine's host name, and falls back to the loopback device. Many distributions
    map the host name to 127.0.1.1 in /etc/hosts. Other nodes then cannot connect, and time out.
    """
    if not other_hosts or _own_name_is_reachable():
        return None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect((other_hosts[0], 9))  # sends nothing; the kernel only chooses the route
            address = s.getsockname()[0]
    except OSError:
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if any(each.address == address for each in found)), None)


def _own_name_is_reachable() -> bool:
    try:
        address = socket.gethostbyname(socket.gethostname())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.bind((address, 0))
    except OSError:
        return False
    return not address.startswith("127.")


def _hosts() -> Sequence[str]:
    """The nodes of this task's step. An elastic job may have more nodes."""
    from submitit.slurm.slurm import _parse_node_list

    return _parse_node_list(os.environ["SLURM_STEP_NODELIST"])


def _ask_again(number: int, frame: FrameType | None) -> None:
    """Defer a stop request until training has installed its handlers, by sending the signal again after a second.

    A requeue at this point could repeat forever without progress, if the start takes longer than the job may run. If
    SIGTERM killed the task during a pre-emption, the job would fail, and SLURM would not requeue it.
    """
    timer = threading.Timer(1.0, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()

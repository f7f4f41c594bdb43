"""TrainJob: a training run as launchers pass it to local processes or, pickled, to the tasks of a SLURM job.

A job holds what was requested and no progress. The progress is in the run directory, so the same pickle is started
again after a node failure, a pre-emption or a time limit, and training resumes from the newest checkpoint. Rejected
alternative: submitit's own `checkpoint()` protocol. It acts on global rank 0 alone, at any point between two byte codes
of Python, where no collective save is possible. Here all ranks agree on the step after which they save and exit, and
the job's script asks SLURM for another start (requeue.py).

Importing this module is quick. Heavy modules are imported within the call, after it has replaced submitit's signal
handlers: a signal may arrive during these imports.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
import struct
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from bfsys.errors import UserError, exit_code_of
from bfsys.ranks import env_number, ranks_from_environment

# Outside Linux's range of ephemeral ports (32768-60999), where any outgoing connection may sit on a port.
MASTER_PORTS = range(10_000, 30_000)
PORTS_BETWEEN_STEPS = 1009  # of one job; jobs with neighbouring numbers have neighbouring ports

# SLURM's numbers from here on are those of its own steps: a batch script, the shell of salloc, what it keeps outside.
FIRST_SPECIAL_STEP = 0xFFFFFFF0

_SIOCGIFADDR = 0x8915  # Linux: the address of a network interface


@dataclass(frozen=True)
class TrainJob:
    """A run that can be started any number of times."""

    config: Path
    """Absolute."""
    overrides: tuple[str, ...]
    code_dir: Path
    """Absolute; the folder that holds bfsys/."""
    work_dir: Path
    """Absolute; what relative paths in the config refer to."""

    def command(self) -> list[str]:
        """The command of one rank's process, to be run in `work_dir`."""
        return [sys.executable, str(self.code_dir / "bfsys" / "train.py"), str(self.config), *self.overrides]

    def __call__(self) -> None:
        """Run as one task of a SLURM job. Exits with training's code and does not return, so that submitit writes
        no result: whether the run is finished, the run directory says."""
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, _ask_again)
        code = exit_code_of(self._train)
        # A rank that leaves with an error makes srun end the others: these keep their code, and with it the job's.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # as dist.hard_exit, which says why

    def _train(self) -> int:
        if problems := [
            f"node {socket.gethostname()}: does not see {path}, or sees another; it must be on a file system that the "
            f"nodes share with the machine that submits"
            for path, is_seen in (
                (self.work_dir, self.work_dir.is_dir()),
                (self.config, self.config.is_file()),
                (self.code_dir, Path(__file__).resolve().parents[2] == self.code_dir.resolve()),
            )
            if not is_seen
        ]:
            raise UserError(*problems)
        os.chdir(self.work_dir)
        os.environ.update(slurm_variables(os.environ, _hosts()))
        from bfsys.config import load_config

        config, ranks = load_config(self.config, self.overrides), ranks_from_environment()
        from bfsys.train import train_rank

        return train_rank(config, ranks)


def rank_variables(
    rank: int, world_size: int, local_rank: int, local_world_size: int, *, master_addr: str, master_port: int
) -> dict[str, str]:
    """The environment that tells a process of bfsys/train.py which rank it is."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(master_port),
    }


def slurm_variables(env: Mapping[str, str], hosts: Sequence[str]) -> dict[str, str]:
    """The same from the variables of a SLURM task; `hosts` are the step's nodes in SLURM's order.

    They replace what the environment holds already: SLURM hands the submitting shell's variables on to the job.
    """
    world_size = int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"])
    step = PORTS_BETWEEN_STEPS * int(env.get("SLURM_STEP_ID") or 0)
    variables = rank_variables(
        int(env["SLURM_PROCID"]),
        world_size,
        int(env["SLURM_LOCALID"]),
        world_size // len(hosts),  # the launcher puts as many tasks on each node
        master_addr=hosts[0],
        # Jobs that share a node have different numbers, and so have the steps of a job.
        master_port=MASTER_PORTS[(int(env["SLURM_JOB_ID"]) + step) % len(MASTER_PORTS)],
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
    """Make this process a rank, where plain srun has started it as one of several tasks. In a batch script and in the
    shell of salloc, where SLURM_NTASKS is set too, there is no such step.

    Raises UserError where RANK and WORLD_SIZE are of another launcher than the one that started this task.
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
    # torchrun and its like, one on each node, start several ranks in a task, and number them as they please.
    is_of_a_task = "TORCHELASTIC_RUN_ID" in os.environ or ("LOCAL_RANK" in os.environ and world_size > tasks)
    if not is_of_a_task and (rank, world_size) != (task, tasks):
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE is {world_size}, but srun has started this process as task {task} of "
            f"{tasks}; these variables are perhaps left over in the shell: unset RANK WORLD_SIZE"
        )


def kernel_cache() -> Path | None:
    """A folder of this user on the node's own disk for compiled kernels: by default all ranks of all nodes would write
    theirs to one home directory. None where it cannot be made, or where others could put programs into it."""
    folder = Path(tempfile.gettempdir()) / f"bfsys-triton-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if is_own else None


def gloo_interface(other_hosts: Sequence[str]) -> str | None:
    """The network interface that gloo must be told to use; None where it finds the right one by itself.

    Gloo listens on the address that this machine's own name stands for, and falls back to the loopback device. Many
    distributions write that name to /etc/hosts as 127.0.1.1: other nodes then wait for an answer until they time out.
    """
    if not other_hosts or _own_name_is_reachable():
        return None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect((other_hosts[0], 9))  # sends nothing: the kernel looks up which way it would go
            address = s.getsockname()[0]
    except OSError:
        return None
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == address), None)


def _own_name_is_reachable() -> bool:
    try:
        address = socket.gethostbyname(socket.gethostname())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.bind((address, 0))
    except OSError:
        return False
    return not address.startswith("127.")


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            answer = fcntl.ioctl(s.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:  # it has no address
            return None
    return socket.inet_ntoa(answer[20:24])


def _hosts() -> Sequence[str]:
    """The nodes of this task's step: an elastic job may have others."""
    from submitit.slurm.slurm import _parse_node_list

    return _parse_node_list(os.environ["SLURM_STEP_NODELIST"])


def _ask_again(number: int, frame: FrameType | None) -> None:
    """Hold a stop request back until training has handlers of its own: the signal is sent again in a second.

    Requeueing here instead would, where the start takes longer than the job may run, go round for ever without a
    step of progress; and dying of SIGTERM during a pre-emption would be a failure that SLURM does not requeue.
    """
    timer = threading.Timer(1.0, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()

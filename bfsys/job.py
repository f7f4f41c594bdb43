"""TrainJob: one training run as launchers hand it on, to local processes or, pickled, to the tasks of a SLURM job.

A job holds what was asked for and nothing of how far it came: that is in the run directory, so the same pickle is
started again after a node failure, a pre-emption or a time limit, and training continues from the newest
checkpoint. Refused: submitit's own `checkpoint()` protocol. It acts on global rank 0 alone, between two byte codes,
where no collective save is possible; here training itself agrees on the step to stop after and saves, and rank 0
asks SLURM for another start.

Importing this module is quick, and heavy modules are imported within the call: a signal that comes during their
import would find submitit's handlers instead of ours.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from bfsys.errors import EXIT_REQUEUE, EXIT_STOPPED, run_command

# Outside Linux's range of ephemeral ports (32768-60999), where any outgoing connection may sit on a port.
MASTER_PORTS = range(10_000, 30_000)

# How long a task that has saved waits for SLURM to end it. A job that leaves by itself during the grace time of a
# pre-emption counts as failed, and SLURM does not start it again; and a task that leaves while rank 0 asks for the
# requeue makes `srun --kill-on-bad-exit` kill rank 0. The price: `scancel` takes KillWait, 30 s by default.
END_WAIT_S = 600
SCONTROL_TIMEOUT_S = 60

_SIOCGIFADDR = 0x8915  # Linux: the address of a network interface


@dataclass(frozen=True)
class TrainJob:
    """A run to be started any number of times."""

    config: Path
    """Absolute."""
    overrides: tuple[str, ...]
    code_dir: Path
    """Absolute; the folder that holds bfsys/."""
    work_dir: Path
    """Absolute; what relative paths in the config refer to."""

    def arguments(self) -> list[str]:
        """Of bfsys/train.py."""
        return [str(self.config), *self.overrides]

    def command(self) -> list[str]:
        """Of one rank's process, to be run in `work_dir`."""
        return [sys.executable, str(self.code_dir / "bfsys" / "train.py"), *self.arguments()]

    def __call__(self) -> None:
        """Run as one task of a SLURM job. Exits with training's code and does not return, so that submitit writes
        no result: whether the run is finished, the run directory says."""
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, _ask_again)
        os.chdir(self.work_dir)
        os.environ.update(slurm_variables(os.environ, _hosts()))
        from bfsys.dist import leave
        from bfsys.train import main

        try:
            run_command(lambda: main(self.arguments()))
        except SystemExit as end:
            waits = end.code in (EXIT_REQUEUE, EXIT_STOPPED)
            # A rank that leaves with an error makes srun end the others: these keep their code, and with it the job's.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if waits else signal.SIG_IGN)
            if end.code == EXIT_REQUEUE and os.environ["RANK"] == "0":
                requeue()
            elif waits:
                print("waiting for SLURM to end this task", flush=True)
                time.sleep(END_WAIT_S)
            leave(end.code)


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
    """The same from the variables of a SLURM task; `hosts` are the job's nodes in SLURM's order.

    They replace what the environment holds already: SLURM hands the submitting shell's variables on to the job.
    """
    world_size = int(env["SLURM_NTASKS"])
    variables = rank_variables(
        int(env["SLURM_PROCID"]),
        world_size,
        int(env["SLURM_LOCALID"]),
        world_size // len(hosts),  # the launcher puts as many tasks on each node
        master_addr=hosts[0],
        # Jobs that share a node have different numbers.
        master_port=MASTER_PORTS[int(env["SLURM_JOB_ID"]) % len(MASTER_PORTS)],
    )
    if "OMP_NUM_THREADS" not in env and "SLURM_CPUS_PER_TASK" in env:
        variables["OMP_NUM_THREADS"] = env["SLURM_CPUS_PER_TASK"]
    if "GLOO_SOCKET_IFNAME" not in env:
        others = [host for i, host in enumerate(hosts) if i != int(env["SLURM_NODEID"])]
        interface = gloo_interface(others)
        if interface:
            variables["GLOO_SOCKET_IFNAME"] = interface
    return variables


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
    import submitit

    return submitit.JobEnvironment().hostnames


def _ask_again(number: int, frame: FrameType | None) -> None:
    """Hold a stop request back until training has handlers of its own: the signal is sent again in a second.

    Requeueing here instead would, where the start takes longer than the job may run, go round for ever without a
    step of progress; and dying of SIGTERM during a pre-emption would be a failure that SLURM does not requeue.
    """
    timer = threading.Timer(1.0, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def requeue() -> bool:
    """Ask SLURM to start this job again, which ends all of its processes; False if it does not.

    Never after SIGTERM: that is how `scancel` asks, and the cancelled job would come back.
    """
    job_id = os.environ["SLURM_JOB_ID"]
    print(f"asking SLURM to start job {job_id} again", flush=True)
    try:
        subprocess.run(
            ["scontrol", "requeue", job_id], check=True, capture_output=True, text=True, timeout=SCONTROL_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        print(
            f"error: job {job_id} could not be requeued: {reason}; the checkpoint is saved: "
            f"submit again with the same command to continue",
            file=sys.stderr,
        )
        return False
    return True

"""The rank of this process, from the variables that launchers set; launch/job.py sets them under SLURM.

Importing this module is quick, because a rank reads its config before it imports torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bfsys.errors import UserError, counted

if TYPE_CHECKING:
    import torch

_BOTH_OR_NEITHER = (
    "launchers set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT together; to train without a launcher, "
    "unset them"
)
# The number of ranks that Open MPI, and MPICH and its relatives, have started.
_SIZES_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process in a run; by default the only rank."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """One GPU per rank; the CPU if there is no GPU or if DS_ACCELERATOR is cpu. Raises UserError if the machine has
        fewer GPUs than ranks."""
        import torch

        gpus = gpu_count()
        if not gpus:
            return torch.device("cpu")
        # A launcher may make only one GPU visible to each rank.
        index = 0 if gpus == 1 else self.local_rank
        if index >= gpus:
            raise UserError(
                f"{counted(self.local_world_size, 'rank')} on this machine, but {counted(gpus, 'GPU')}; "
                "one rank per GPU is allowed, or DS_ACCELERATOR=cpu for CPU ranks"
            )
        return torch.device("cuda", index)


def gpu_count() -> int:
    """The number of GPUs of this machine that ranks use; 0 if DS_ACCELERATOR is cpu. Raises UserError if the variable
    selects something that bfsys or this machine does not have."""
    import torch

    selected = os.environ.get("DS_ACCELERATOR", "")
    gpus = 0 if selected == "cpu" else torch.cuda.device_count()
    if selected not in ("", "cpu", "cuda") or (selected == "cuda" and not gpus):
        allowed = "cpu or cuda" if gpus else "cpu, since PyTorch finds no GPU"
        raise UserError(f"environment variable DS_ACCELERATOR: got {selected!r}; allowed is {allowed}; or unset it")
    return gpus


def ranks_from_environment() -> Ranks:
    """Read the launcher's environment variables; without a launcher, this is rank 0 of 1.

    Raises UserError for variables that are missing, are not numbers, or contradict each other.
    """
    env = os.environ
    if "RANK" not in env and env_number("WORLD_SIZE", 1) > 1:
        raise UserError(f"WORLD_SIZE is {env['WORLD_SIZE']}, but RANK is not set; {_BOTH_OR_NEITHER}")
    for name in _SIZES_OF_MPI if "RANK" not in env else ():
        if env.get(name, "").isdecimal() and int(env[name]) > 1:  # otherwise all of them would train the same run
            raise UserError(
                f"{name} is {env[name]}, so mpirun has started this process as one of several, but RANK is not set; "
                "start bfsys launch on one machine, torchrun or deepspeed --no_ssh on several (docs/multinode.md), or "
                f"unset {name} to train as a single process"
            )
    if "RANK" in env and "WORLD_SIZE" not in env:
        raise UserError(f"RANK is {env['RANK']!r}, but WORLD_SIZE is not set; {_BOTH_OR_NEITHER}")
    rank, world_size = env_number("RANK", 0), env_number("WORLD_SIZE", 1)
    local_world_size = env_number("LOCAL_WORLD_SIZE" if env.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE", world_size)
    if not 0 <= rank < world_size:
        raise UserError(
            f"RANK is {rank}, but there are {world_size} ranks (WORLD_SIZE), numbered from 0; {_BOTH_OR_NEITHER}"
        )
    if local_world_size < 1:
        raise UserError(f"LOCAL_WORLD_SIZE is {local_world_size}; a machine has at least 1 rank")
    return Ranks(rank, world_size, env_number("LOCAL_RANK", rank), local_world_size)


def env_number(variable: str, default: int) -> int:
    """A variable of a launcher, or the default if it is not set. Raises UserError if it is not a whole number of 0
    or more."""
    text = os.environ.get(variable) or str(default)
    if not text.strip().isdecimal():
        raise UserError(f"{variable} is {text!r}, which is not a whole number of 0 or more; {_BOTH_OR_NEITHER}")
    return int(text)

"""Ranks and their agreement. Thin words over torch.distributed that also work for a single process.

Rank, world size and rendezvous come from the environment, as the deepspeed launcher, torchrun and srun set it.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bfsys.errors import EXIT_CRASHED, EXIT_USER_ERROR, PASSING, UserError

T = TypeVar("T")


class AgreedError(UserError):
    """A UserError that every rank raises, so that one of them can say it for all."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is; by default a process on its own."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """One GPU per rank; the CPU where there is none, or where DS_ACCELERATOR asks for it."""
        if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        # A launcher may show each rank its own GPU only.
        return torch.device("cuda", 0 if torch.cuda.device_count() == 1 else self.local_rank)


def ranks_from_environment() -> Ranks:
    """Read the launcher's variables; without a launcher this is rank 0 of 1."""
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        return _ranks_from_slurm()
    rank, world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    local_world_size = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world_size)
    return Ranks(rank, world_size, int(env.get("LOCAL_RANK", rank)), local_world_size)


def _ranks_from_slurm() -> Ranks:
    env = os.environ
    rank, world_size, local = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"])
    per_node = int(re.match(r"\d+", env.get("SLURM_TASKS_PER_NODE", str(world_size)))[0])
    return Ranks(rank, world_size, local, per_node)


def start(ranks: Ranks, timeout_s: int) -> None:
    """Join the process group: NCCL on GPUs, gloo on CPUs. `timeout_s` bounds every collective."""
    if ranks.world_size > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError("MASTER_ADDR is not set: launchers/slurm.py sets it, or export the first host's name")
    if ranks.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    device = ranks.device
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"{ranks.local_world_size} ranks on this machine, but {torch.cuda.device_count()} GPUs; one rank "
                f"per GPU is allowed, or DS_ACCELERATOR=cpu for CPU ranks"
            )
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:  # ranks of one machine share its cores
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size))
    # DeepSpeed takes LOCAL_RANK for the number of the GPU.
    local = ranks.local_rank if device.index is None else device.index
    for name, value in (("RANK", ranks.rank), ("WORLD_SIZE", ranks.world_size), ("LOCAL_RANK", local)):
        os.environ[name] = str(value)
    dist.init_process_group(
        backend="cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo",
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(exit_code: int) -> NoReturn:
    """End this process without tearing it down; to be called when all is written.

    Threads of process groups that DeepSpeed still holds abort the process while C++ is torn down, in 5 of 83
    two-rank runs ("terminate called without an active exception", torch 2.12 and DeepSpeed 0.19), and a finished run
    would look like a crashed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    return isinstance(error, dist.DistBackendError) or "gloo/transport" in str(error)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Elementwise sum, on every rank; in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def agree_on_max(*values: int) -> tuple[int, ...]:
    """For each of the values, the largest of all ranks, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    agreed = torch.tensor(values)  # on the CPU: control messages do not wait for the GPU's queue
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return tuple(agreed.tolist())


def from_first_rank(value: T) -> T:
    """Rank 0's value, on every rank. What is read from disk or clock is decided there."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_to_all(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Tensor, source: int) -> Tensor:
    """Rank `source`'s tensor, on every rank; in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(value, src=source)
    return value


def same_errors_on_all(act: Callable[[], T]) -> T:
    """`act()`; if a rank fails with UserError or OSError, all raise AgreedError with everybody's problems.

    An error of a file server that may pass has the code of a crash, so that launchers start the run again.
    """
    result, problems, code = None, (), 0
    try:
        result = act()
    except UserError as error:
        problems, code = error.problems, error.exit_code
    except OSError as error:
        problems, code = (str(error),), EXIT_CRASHED if error.errno in PASSING else EXIT_USER_ERROR
    everybodys = gather_to_all((problems, code))
    all_problems = dict.fromkeys(p for rank, _ in everybodys for p in rank)
    if all_problems:
        raise AgreedError(*all_problems, exit_code=max(code for _, code in everybodys))
    return result


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

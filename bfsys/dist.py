"""Process group, collectives and agreement of ranks, by torch.distributed. All of it also works for a single process.

Before ranks form a process group, they meet at an address (rendezvous.py).
"""

from __future__ import annotations

import errno
import functools
import os
import pickle
import socket
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bfsys.errors import EXIT_CRASHED, UserError, code_of
from bfsys.process import usable_cores
from bfsys.ranks import Ranks
from bfsys.rendezvous import (
    MOST_RANKS_ALL_CONNECTED,
    check_loopback,
    check_open_files,
    check_threads,
    first_line,
    meet,
    store_of_all,
)

T = TypeVar("T")

# Collectives that NCCL records for the watchdog: the last calls of each rank, and their progress.
FLIGHT_RECORDER_EVENTS = "2000"
# With a GPU, a rank computes only indices on the CPU, and shares the cores with other ranks and loader processes.
THREADS_BESIDE_A_GPU = 4
# With 1, gloo connects two ranks at their first exchange; otherwise it connects all ranks at the start.
CONNECT_ON_DEMAND = "TORCH_GLOO_LAZY_INIT"
STOP_LIMIT = timedelta(minutes=1)
# Messages of gloo and NCCL when a peer has ended. Their other errors are network errors or timeouts.
LOST_CONNECTION = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "remote process exited",
    "Socket closed",
)


class AgreedError(UserError):
    """A UserError that every rank raises, so one rank can report it for all."""


def start(ranks: Ranks, timeout_s: int) -> None:
    """Join the process group: NCCL on GPUs, gloo on CPUs. `timeout_s` is the timeout of every collective until the
    watchdog watches them, and of the wait for the other ranks.

    Raises UserError if the ranks cannot connect, with the exit code of a crash if a restart may help.
    """
    device = ranks.device
    check_open_files(ranks.world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # A weight's gradient is a sum over a million tokens. By default, cuBLAS may add its parts in bfloat16.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.set_num_threads(min(torch.get_num_threads(), THREADS_BESIDE_A_GPU))
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", FLIGHT_RECORDER_EVENTS)  # read when NCCL starts
    else:
        _share_cores(ranks.local_world_size)
    check_threads(1, torch.get_num_threads())
    # DeepSpeed uses LOCAL_RANK as the number of the GPU.
    local = ranks.local_rank if device.index is None else device.index
    for name, value in (("RANK", ranks.rank), ("WORLD_SIZE", ranks.world_size), ("LOCAL_RANK", local)):
        os.environ[name] = str(value)
    # DeepSpeed refuses a LOCAL_RANK that differs. It does if mpirun has started a launcher, which starts several ranks.
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
    if ranks.world_size == 1:  # a single process needs no port, which might be in use
        store: dist.Store = dist.HashStore()
    else:
        store = store_of_all(ranks, timeout_s)
        identity = _device_identity(device)
        identities = meet(store, ranks, identity, timeout_s)
        if device.type == "cuda":
            _check_gpus(identities)
        else:  # launchers of Kubernetes set no LOCAL_WORLD_SIZE, and start one rank per container
            _share_cores(min(ranks.local_world_size, identities.count(identity)))
    os.environ.setdefault(CONNECT_ON_DEMAND, str(int(ranks.world_size > MOST_RANKS_ALL_CONNECTED)))
    try:
        dist.init_process_group(
            backend="cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo",
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:
        if str(error) == os.strerror(errno.EAGAIN):  # a thread cannot be started
            raise
        if device.type == "cpu" and "GLOO_SOCKET_IFNAME" not in os.environ:  # gloo has tried the loopback interface
            check_loopback("127.0.0.1")
        raise UserError(
            f"communication among the ranks cannot be set up: {first_line(error)}. Set GLOO_SOCKET_IFNAME or "
            "NCCL_SOCKET_IFNAME to choose the network interface; NCCL_DEBUG=INFO shows NCCL's choice",
            exit_code=EXIT_CRASHED,
        ) from error


def _share_cores(ranks_here: int) -> None:
    """Let a CPU rank compute with its share of the cores of this machine."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // ranks_here))


def _device_identity(device: torch.device) -> str:
    """An identifier of the rank's GPU, or of its machine if it computes on the CPU."""
    host = socket.gethostname()
    return f"{torch.cuda.get_device_properties(device).uuid} of {host}" if device.type == "cuda" else host


def _check_gpus(identities: list[str]) -> None:
    """Raise AgreedError if ranks would share a GPU, given the `_device_identity` of each."""
    ranks_on: dict[str, list[int]] = {}
    for rank, identity in enumerate(identities):
        ranks_on.setdefault(identity, []).append(rank)
    problems = [
        f"ranks {', '.join(map(str, shared))} would share GPU {identity}; one rank per GPU is allowed: start fewer "
        f"ranks, or let each see its own GPU (srun --gpus-per-task=1)"
        for identity, shared in ranks_on.items()
        if len(shared) > 1
    ]
    if problems:
        raise AgreedError(*problems)


def leave_hangs_to_the_watchdog() -> None:
    """Let collectives of every process group wait for a week, also of groups that libraries made.

    The watchdog ends a hang earlier. Unlike the timeouts of PyTorch, it does not count the time during which the
    processes were suspended (`scontrol suspend`, pre-emption with PreemptMode=SUSPEND, Ctrl-Z).
    """
    _set_timeout_of_groups(timedelta(days=7))


def _set_timeout_of_groups(timeout: timedelta) -> None:
    for group in list(dist.distributed_c10d._world.pg_map):
        group.set_timeout(timeout)


def stop() -> None:
    """Leave the process group. The watchdog no longer watches, so this has a time limit."""
    if dist.is_initialized():
        _set_timeout_of_groups(STOP_LIMIT)
        dist.destroy_process_group()


def hard_exit(exit_code: int) -> NoReturn:
    """End this process without cleanup. Call this when everything is written.

    Otherwise, threads of process groups that DeepSpeed still holds may abort the process during C++ cleanup. This
    happened in 5 of 83 two-rank runs ("terminate called without an active exception", torch 2.12 and DeepSpeed 0.19),
    and a finished run would look like a crashed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def lost_connection(error: RuntimeError) -> str:
    """The message of a collective that failed because another rank was lost; "" if it failed for another reason."""
    text = str(error)
    return first_line(error) if any(sign in text for sign in LOST_CONNECTION) else ""


def sum_over_ranks(values: Tensor) -> Tensor:
    """Elementwise sum in the order of the ranks, on every rank; in place. The tensor is on the CPU."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        values.copy_(_gather_rows(values).sum(0))
    return values


def agree_on_max(*values: int) -> tuple[int, ...]:
    """The elementwise maximum of the values over all ranks, on every rank. The values are at most 2**53."""
    return tuple(int(value) for value in gather_numbers(values).amax(0).tolist())


def broadcast_from_rank0(value: T) -> T:
    """Rank 0's value, on every rank. Use it for values that depend on the disk or the clock."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_numbers(values: Sequence[float]) -> Tensor:
    """Every rank's numbers, float64 [ranks, numbers], gathered on the CPU so that messages do not wait for the GPU."""
    mine = torch.tensor(values, dtype=torch.float64)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine[None]
    return _exchange_of_numbers(len(mine), dist.get_world_size(), dist.get_rank()).gather(mine)


def gather_to_all(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    mine, sizes = _pickled(value)
    return _unpickled(_gather_rows(mine), sizes)


def gather_to_rank0(value: T) -> list[T]:
    """Every rank's value, by rank, on rank 0; an empty list on the other ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    mine, sizes = _pickled(value)
    if dist.get_rank() > 0:
        dist.gather(mine)
        return []
    rows = mine.new_empty(len(sizes), len(mine))
    dist.gather(mine, list(rows.unbind()))
    return _unpickled(rows, sizes)


def _pickled(value: object) -> tuple[Tensor, list[int]]:
    """(the value as bytes, padded to the longest of all ranks; the lengths without padding, by rank)."""
    content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    sizes = [int(size) for size in gather_numbers([len(content)]).flatten().tolist()]
    return torch.cat([content, content.new_zeros(max(sizes) - len(content))]), sizes


def _unpickled(rows: Tensor, sizes: list[int]) -> list:
    return [pickle.loads(row[:size].numpy()) for row, size in zip(rows, sizes, strict=True)]


def _gather_rows(mine: Tensor) -> Tensor:
    """Every rank's tensor, [ranks, …] by rank. All tensors have the same shape and are on the CPU."""
    return RowExchange(mine.shape, mine.dtype, dist.get_world_size(), dist.get_rank()).gather(mine)


class _Round(NamedTuple):
    arriving: Tensor
    source: int
    leaving: Tensor
    destination: int


class RowExchange:
    """Gathers a tensor of every rank on all ranks, over gloo.

    This is Bruck's algorithm. In each round, a rank sends all rows that it has to another rank, so log2(ranks) rounds
    of one message each suffice. The all-gather of gloo takes ranks - 1 rounds, and its all-reduce twice as many.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, ranks: int, rank: int) -> None:
        self._rank = rank
        self._rows = torch.empty(ranks, *shape, dtype=dtype)  # row i is that of rank (rank + i) % ranks
        self.rounds = [
            _Round(
                self._rows[have : 2 * have], (rank + have) % ranks,
                self._rows[: min(have, ranks - have)], (rank - have) % ranks,
            )
            for have in (1 << number for number in range((ranks - 1).bit_length()))
        ]  # fmt: skip

    def gather(self, mine: Tensor) -> Tensor:
        """[ranks, …] by rank; collective."""
        group = dist.group.WORLD
        assert group is not None
        self._rows[0] = mine
        # All receives are posted first. Otherwise gloo sends a request to the receiver and waits for its answer.
        arrivals = [group.recv([each.arriving], each.source, 0) for each in self.rounds]
        departures = []
        for each, arrival in zip(self.rounds, arrivals, strict=True):
            departures.append(group.send([each.leaving], each.destination, 0))
            arrival.wait()
        for departure in departures:
            departure.wait()
        return self._rows.roll(self._rank, 0)


@functools.cache
def _exchange_of_numbers(numbers: int, ranks: int, rank: int) -> RowExchange:
    """The exchange for messages of a length. It is cached, since creating its tensors takes a third of the time."""
    return RowExchange([numbers], torch.float64, ranks, rank)


def broadcast(value: Tensor, source: int) -> Tensor:
    """Rank `source`'s tensor, on every rank; in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(value, src=source)
    return value


def all_reduce(values: Tensor) -> Tensor:
    """Elementwise sum on every rank, in place. The library chooses the order of the sum."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def all_to_all(values: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Send `sent[r]` numbers of a flat tensor to rank r, in the order of ranks; collective.

    Returns the numbers that this rank receives, in the order of ranks: `received[r]` numbers from rank r.
    """
    result = values.new_empty(sum(received))
    dist.all_to_all_single(result, values, list(received), list(sent))
    return result


def same_errors_on_all(act: Callable[[], T]) -> T:
    """`act()` on every rank. If a rank fails with UserError or OSError, all ranks raise AgreedError with all problems.

    If the error may be transient, its exit code is that of a crash, so launchers restart the run.
    """
    results: list[T] = []
    problems: tuple[str, ...] = ()
    code = 0
    try:
        results.append(act())
    except UserError as error:
        problems, code = error.problems, error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        problems = (f"{where}{error.strerror or error}",)
        code = code_of(error)
    code, has_failed = agree_on_max(code, bool(problems))
    if has_failed:
        raise AgreedError(*dict.fromkeys(p for of_rank in gather_to_all(problems) for p in of_rank), exit_code=code)
    return results[0]


def on_rank0(act: Callable[[], T], ranks: Ranks) -> T:
    """`act()` on rank 0. Returns its result on every rank. All ranks raise its errors, as `same_errors_on_all` does."""
    mine = same_errors_on_all(lambda: [act()] if ranks.is_rank_zero else [])
    return broadcast_from_rank0(mine)[0]

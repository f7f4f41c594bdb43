"""Sums over ranks: whether they are right, and how fast they are. GPUs use NCCL, and CPU ranks use gloo.

Under srun or torchrun, the ranks are those of the launcher, on all nodes. Without a launcher, this check starts a rank
for each GPU of the machine, or two on the CPU.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed
from torch import Tensor

from bfsys import dist
from bfsys.gpu_check.findings import Finding, Verdict
from bfsys.gpu_check.processes import finish, start
from bfsys.launch.job import free_port, rank_variables
from bfsys.model.flops import seconds_of
from bfsys.ranks import Ranks, gpu_count, ranks_from_environment

NUMBERS = {"cuda": 2**26, "cpu": 2**20}  # float32 numbers that are summed: 268 MB and 4 MB
PERIOD = 4096  # of the numbers that are summed; 4,096 ranks times numbers below 4,096 are exact in float32
REPEATS = 5
MEET_S = 60
LIMIT_S = 150
LEAST_GB_PER_S = 3.0  # a little less than Ethernet of 25 Gbit/s


def check(device: torch.device, seconds: float) -> list[Finding]:
    ranks = ranks_from_environment()
    local = gpu_count() or 2
    if ranks.world_size > 1 or local == 1:
        return measure(ranks)
    port, children = free_port(), []
    with TemporaryDirectory(prefix="bfsys-ranks-") as name:
        for rank in range(local):
            folder = Path(name, str(rank))
            folder.mkdir()
            variables = rank_variables(rank, local, rank, local, master_addr="127.0.0.1", master_port=port)
            children.append((start("all-reduce", seconds, folder, {**os.environ, **variables}, is_part=True), folder))
        until = time.monotonic() + LIMIT_S
        found = [finish("all-reduce", child, folder, until - time.monotonic()) for child, folder in children]
    # Report the findings of the first rank with a wrong result, or those of rank 0.
    return next((f for f in found if any(each.verdict == Verdict.WRONG for each in f)), found[0])


def measure(ranks: Ranks) -> list[Finding]:
    """Check and time an all-reduce; collective."""
    device, n = ranks.device, ranks.world_size
    backend = "NCCL" if device.type == "cuda" else "gloo"
    dist.start(ranks, MEET_S)
    own = values_of(ranks.rank, NUMBERS[device.type]).to(device)
    got = own.clone()
    torch.distributed.all_reduce(got)
    is_right = torch.equal(got.cpu(), expected_sum(n, len(own)))
    times = []
    for _ in range(REPEATS):
        torch.distributed.barrier()
        times.append(seconds_of(lambda: torch.distributed.all_reduce(got.copy_(own)), device))
    (slowest_us,) = dist.agree_on_max(int(1e6 * min(times)))
    dist.stop()
    what = f"{backend} among {n} ranks" if n > 1 else f"{backend} with one rank"
    if not is_right:
        advice = f"rank {ranks.rank} receives corrupted data: try NCCL_P2P_DISABLE=1, and have the hardware checked"
        return [Finding(what, Verdict.WRONG, "the sum is not exact", advice)]
    megabytes = 4e-6 * len(own)
    if n == 1:
        return [Finding(what, Verdict.OK, "starts; there is no other rank to send to")]
    rate = 2 * (n - 1) / n * 4 * len(own) / slowest_us / 1e3  # GB/s that a ring sends through each rank
    detail = f"exact; {megabytes:.0f} MB in {slowest_us / 1e3:.1f} ms, {rate:.1f} GB/s per rank"
    if device.type == "cuda" and rate < LEAST_GB_PER_S:
        advice = "NCCL_DEBUG=INFO names the path that it takes; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose another"
        return [Finding(what, Verdict.SLOW, detail, advice)]
    return [Finding(what, Verdict.OK, detail)]


def values_of(rank: int, count: int) -> Tensor:
    """Whole numbers below PERIOD that differ between ranks, so that sums over up to PERIOD ranks are exact in float32.
    They repeat after PERIOD numbers."""
    return ((torch.arange(PERIOD) + 17 * rank) % PERIOD).float().repeat(-(-count // PERIOD))[:count]


def expected_sum(ranks: int, count: int) -> Tensor:
    """The sum of the ranks' values. Only one period is added up, because adding up all numbers of 64 ranks would take
    minutes."""
    total = torch.zeros(PERIOD)
    for rank in range(ranks):
        total += values_of(rank, PERIOD)
    return total.repeat(-(-count // PERIOD))[:count]

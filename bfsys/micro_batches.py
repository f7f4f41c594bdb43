"""The division of a rank's lanes into micro-batches.

Ranks divide the lanes among themselves, so the number of lanes is the largest world size of a run. A micro-batch is
what a device computes at once. A GPU needs hundreds of thousands of tokens: with fewer, it waits for the host to launch
its kernels. A CPU gains nothing from more than one lane. Batches are ragged, so lanes are joined without padding, and
the gradient is the same sum.

All ranks make the same number of micro-batches in every step, as gradient accumulation and ZeRO require. Rejected
alternative: as many lanes as fit in each step, because that number differs between steps and ranks.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from bfsys import dist
from bfsys.config import Config
from bfsys.data.streaming.plan import lane_groups, lanes_of_rank
from bfsys.data.streaming.run_data import FIRST_STEPS, RunData
from bfsys.errors import counted
from bfsys.model.layout import token_counts

# Default of tokens times channels of a micro-batch on a GPU. This is 700,000 tokens for tiny and 175,000 for base. They
# take longer than their kernel launches (docs/performance.md).
GPU_NUMBERS = 2**27
# Activations may take this share of the memory of a smaller GPU. They take 11 GB for GPU_NUMBERS in bf16.
MEMORY_SHARE = 0.5
BYTES_PER_NUMBER = {"bf16": 84, "fp32": 168}


def agree_on_micro_batches(data: RunData, ranks: dist.Ranks) -> tuple[int, str]:
    """(number of micro-batches per step on every rank, a note about them); collective."""
    lanes, on_gpu = data.plan.lanes // ranks.world_size, ranks.device.type == "cuda"
    memory = torch.cuda.get_device_properties(ranks.device).total_memory if on_gpu else 0
    lane_tokens, least = dist.agree_on_max(largest_micro_batch(data, ranks, lanes)[1], -memory)
    count = micro_batches_of(lanes, lane_tokens, data.config, on_gpu=on_gpu, gpu_bytes=-least)
    (tokens,) = dist.agree_on_max(largest_micro_batch(data, ranks, count)[1])
    parts = f"{counted(count, 'micro-batch')} of up to {tokens:,} tokens"
    return count, f"each step has {parts} on every rank, from {counted(lanes, 'lane')}"


def micro_batches_of(lanes: int, lane_tokens: int, config: Config, *, on_gpu: bool, gpu_bytes: float = math.inf) -> int:
    """The number of micro-batches into which the lanes of a rank are grouped.

    lane_tokens  tokens of the largest lane
    gpu_bytes    memory of the smallest GPU of the run; a plan does not know it, and assumes that it is large
    """
    automatic = 0
    if on_gpu:
        fitting = MEMORY_SHARE * gpu_bytes / BYTES_PER_NUMBER[config.train.precision]
        automatic = int(min(GPU_NUMBERS, fitting)) // config.model.architecture().dim
    together = max(1, (config.train.micro_batch_tokens or automatic) // max(1, lane_tokens))
    return -(-lanes // together)


def largest_micro_batch(data: RunData, ranks: dist.Ranks, micro_batches: int) -> tuple[np.ndarray, int]:
    """(int64 [B] lengths in bytes, tokens) of a rank's micro-batch with the most tokens in the first steps."""
    config, architecture = data.config, data.config.model.architecture()
    groups = lane_groups(lanes_of_rank(data.plan.lanes, ranks.rank, ranks.world_size), micro_batches)
    best, most = np.zeros(0, np.int64), -1
    for step in range(min(FIRST_STEPS, config.train.steps)):
        for lanes in groups:
            lengths = data.lengths_of(step, lanes)
            tokens = int(token_counts(lengths, architecture, config.model.mode).sum())
            if tokens > most:
                best, most = lengths, tokens
    return best, most

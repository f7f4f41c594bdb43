"""The division of a rank's lanes into micro-batches.

Ranks divide the lanes among themselves, so the number of lanes is the largest world size of a run. A micro-batch is
what a device computes at once. A GPU needs hundreds of thousands of tokens to be busy for longer than the host takes to
launch its kernels, while a CPU gains nothing from more than one lane. Batches are ragged, so lanes are joined without
padding, and the gradient is the same sum.

All ranks make the same number of micro-batches in every step, as gradient accumulation and ZeRO require. Rejected
alternative: as many lanes as fit in each step, because that number differs between steps and ranks.
"""

from __future__ import annotations

import numpy as np

from bfsys import dist
from bfsys.config import Config
from bfsys.data.streaming.plan import lane_groups, lanes_of_rank
from bfsys.data.streaming.run_data import FIRST_STEPS, RunData
from bfsys.model.layout import token_counts

# Default of tokens times channels of a micro-batch on a GPU. This is 700,000 tokens for tiny and 175,000 for base. They
# take longer than their kernel launches (docs/performance.md), and their activations take 11 GB in bf16.
GPU_NUMBERS = 2**27


def agree_on_micro_batches(data: RunData, ranks: dist.Ranks) -> tuple[int, str]:
    """(number of micro-batches per step on every rank, a note about them); collective."""
    lanes = data.plan.lanes // ranks.world_size
    (lane_tokens,) = dist.agree_on_max(largest_micro_batch(data, ranks, lanes)[1])
    count = micro_batches_of(lanes, lane_tokens, data.config, on_gpu=ranks.device.type == "cuda")
    (tokens,) = dist.agree_on_max(largest_micro_batch(data, ranks, count)[1])
    return count, f"each step has {count} micro-batches of up to {tokens:,} tokens on every rank, from {lanes} lanes"


def micro_batches_of(lanes: int, lane_tokens: int, config: Config, *, on_gpu: bool) -> int:
    """The number of micro-batches into which the lanes of a rank are grouped; the largest lane has `lane_tokens`
    tokens."""
    automatic = GPU_NUMBERS // config.model.architecture().dim if on_gpu else 0
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

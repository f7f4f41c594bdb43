"""Try the largest micro-batch of a run's first steps before training.

If a run does not fit into GPU memory, it thus ends at its start with the reason. Otherwise it would end after hours,
and again at the same step after each restart.

Loss and gradient are computed and dropped, without the engine: `torch.autograd.grad` adds nothing to the gradients of
parameters and calls none of their hooks. Stage 3 is left out, because a parameter's shape there is not that of its
gradient.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bfsys.batch import CONTENT_COLUMNS, CONTENT_ROWS, ByteBatch, Sample
from bfsys.data.streaming.run_data import RunData
from bfsys.dist import Ranks
from bfsys.engine import Engine
from bfsys.errors import UserError, is_out_of_memory
from bfsys.loss import training_loss
from bfsys.micro_batches import largest_micro_batch

TO_NEED_LESS = (
    "Set a lower train.micro_batch_tokens, model.activation_checkpointing=true or a higher train.zero_stage, or start "
    "a new run with more data.lanes"
)


def rehearse(engine: Engine, data: RunData, ranks: Ranks) -> list[Tensor]:
    """Run forward and backward on zero bytes, with the lengths of the largest micro-batch of this rank's first steps.

    Returns the gradient of each parameter (None for an unused one). At stage 3 nothing is run, and the list is empty.
    Raises UserError if the micro-batch does not fit into memory."""
    if engine.stage == 3:
        return []
    lengths, tokens = largest_micro_batch(data, ranks, engine.micro_batches)
    lengths = np.maximum(lengths, data.config.model.least_bytes)  # reading replaces files that are too short
    batch = ByteBatch.from_samples([Sample("", np.zeros(n, np.uint8), label=0) for n in lengths.tolist()])
    if data.config.content_weight:
        content = torch.zeros(len(lengths), CONTENT_ROWS, CONTENT_COLUMNS, dtype=torch.float16)
        batch = replace(batch, content=content)
    try:
        batch = batch.to(ranks.device)
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=engine.uses_autocast):
            outputs = engine.module(batch)  # not through the engine, which would expect its own backward pass
        loss, _ = training_loss(outputs, batch, len(data.training.splits), data.config)
        return list(torch.autograd.grad(loss, list(engine.module.parameters()), allow_unused=True))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"rank {ranks.rank}: a micro-batch of {len(lengths)} files, {lengths.sum():,} bytes and {tokens:,} tokens "
            f"does not fit into the memory of {ranks.device}: {str(error).splitlines()[0].rstrip('.')}. {TO_NEED_LESS}"
        ) from None

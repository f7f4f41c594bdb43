"""The engine by itself: what it asks of the accelerator."""

from __future__ import annotations

from pathlib import Path

import pytest

COUNT_WAITS = """
import sys
import torch
from bfsys import dist
from bfsys.batch import ByteBatch
from bfsys.config import load_config
from bfsys.engine import Engine
from bfsys.model.byteformer import ByteFormer
from bfsys.ranks import ranks_from_environment

ranks = ranks_from_environment()
dist.start(ranks, timeout_s=60)
config = load_config(sys.argv[1], sys.argv[2:])
engine = Engine(ByteFormer(config.model.architecture(), 5), config, ranks)
from deepspeed.accelerator import get_accelerator
waits = []
type(get_accelerator()).synchronize = lambda *_: waits.append(1)
for _ in range(4):
    for _ in range(engine.micro_batches):
        engine.backward(engine.forward(ByteBatch.of_zeros(40)).float().square().sum())
    assert engine.step(1e-3, 0.9) > 0
print("waits:", len(waits), "of", engine.micro_batches, "micro-batches a step")
dist.hard_exit(0)
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_micro_batch_waits_for_the_accelerator(stage: int, precision: str, config_file: Path, run_ranks) -> None:
    """Each wait would leave a GPU idle while the next micro-batch is prepared."""
    options = [f"train.zero_stage={stage}", f"train.precision={precision}"]
    (result,) = run_ranks(1, ["-c", COUNT_WAITS, str(config_file), *options])
    assert "waits: 0 of 4 micro-batches a step" in result.stdout, result.stdout + result.stderr

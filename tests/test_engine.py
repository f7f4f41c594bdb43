"""The engine by itself: its calls of the accelerator."""

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
dist.start(ranks, timeout_s=900)
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


OVERFLOW = """
import sys
from dataclasses import replace
import torch
from bfsys import dist
from bfsys.batch import ByteBatch
from bfsys.config import load_config
from bfsys.engine import Engine
from bfsys.model.byteformer import ByteFormer
from bfsys.ranks import ranks_from_environment

ranks = ranks_from_environment()
dist.start(ranks, timeout_s=900)
config = load_config(sys.argv[1], sys.argv[2:])
for stage in (0, 1, 2, 3):
    of_stage = replace(config, train=replace(config.train, zero_stage=stage))
    engine = Engine(ByteFormer(config.model.architecture(), 5), of_stage, ranks)
    seen = []
    for scale in (1.0, 1e21, 1.0):
        for _ in range(engine.micro_batches):
            engine.backward(scale * engine.forward(ByteBatch.of_zeros(40)).float().square().sum())
        norm = engine.step(1e-3, 0.9)
        parts = [part for state in engine.state_names() for *_, part in engine.read_pieces(state)]
        is_finite = all(part.isfinite().all() for part in parts)
        seen.append((norm < float("inf"), engine.updates, is_finite))
    print("stage", stage, seen)
dist.hard_exit(0)
"""


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_gradient_whose_square_overflows_changes_nothing_at_any_stage(
    name: str, config_file: Path, run_ranks
) -> None:
    """All of its elements are finite. DeepSpeed's stage 3 reports a finite norm, which float32 cannot hold."""
    options = [f"optim.name={name}", "train.precision=fp32", "optim.clip_norm=0"]
    (result,) = run_ranks(1, ["-c", OVERFLOW, str(config_file), *options])
    for stage in (0, 1, 2, 3):
        expected = [(True, 1, True), (False, 1, True), (True, 2, True)]
        assert f"stage {stage} {expected}" in result.stdout, result.stdout + result.stderr

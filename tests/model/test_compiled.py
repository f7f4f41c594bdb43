"""Blocks under torch.compile: one program for all blocks and all lengths, and the same numbers."""

from functools import partial

import numpy as np
import pytest
import torch

from bfsys.batch import ByteBatch, Sample
from bfsys.model.byteformer import ByteFormer
from bfsys.model.sizes import architecture

LENGTHS = ([40], [700, 3, 90], [333], [64, 65, 66, 67], [1200, 5])


def batch_of(lengths: list[int]) -> ByteBatch:
    rng = np.random.default_rng(sum(lengths))
    return ByteBatch.from_samples([Sample("", rng.integers(0, 256, n, dtype=np.uint8)) for n in lengths])


def test_lengths_and_blocks_share_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend  # this import takes two seconds

    # Training on CPUs in this process may have disabled the compiler before its import.
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    a = architecture("custom", dim=16, layers=6, heads=2, kernel=4, window=16, shift=8, merge_after=(0, 1, 3))
    torch.manual_seed(0)
    compiled = ByteFormer(a, 5, compiled=True)
    plain = ByteFormer(a, 5)
    plain.load_state_dict(compiled.state_dict())
    programs = []
    for lengths in LENGTHS:
        for model in (compiled, plain):
            model.zero_grad()
            logits = model(batch_of(lengths))
            logits.square().sum().backward()
        torch.testing.assert_close(compiled(batch_of(lengths)), plain(batch_of(lengths)))
        for p, q in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        programs.append(counter.frame_count)
    assert programs[0] >= 2, "nothing was compiled"
    assert programs[-1] == programs[1] <= 6, programs  # before and after attention; the first batch may be special
    torch._dynamo.reset()

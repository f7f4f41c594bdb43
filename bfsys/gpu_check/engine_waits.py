"""Count how often a training step through DeepSpeed makes the host wait for the device.

While the host waits, it launches no kernels. An update needs the norm of its gradient, so it waits a few times. Another
micro-batch must not add a wait.
"""

from __future__ import annotations

from collections import Counter

import torch

from bfsys import dist
from bfsys.gpu_check.findings import Finding, Verdict
from bfsys.gpu_check.operations import count_waits
from bfsys.gpu_check.training_steps import engine_step, random_files
from bfsys.model.flops import seconds_of
from bfsys.model.sizes import architecture
from bfsys.ranks import Ranks

MOST_OF_AN_UPDATE = 6  # DeepSpeed 0.19.8 at ZeRO 1 waits for the norm in several places
FEW, MANY = 1, 3  # micro-batches
MEET_S = 60


def check(device: torch.device, seconds: float) -> list[Finding]:
    on_gpu = device.type == "cuda"
    a = (
        architecture("tiny", kernel=16, max_tokens=2500)
        if on_gpu
        else architecture("custom", kernel=16, dim=32, layers=4, max_tokens=100)
    )
    files = random_files([20_000] * 12 if on_gpu else [700, 300])
    dist.start(Ranks(), MEET_S)
    waits, step = {}, None
    for micro_batches in (FEW, MANY):
        step = engine_step(files, a, 10, device, bf16=True, micro_batches=micro_batches)
        for _ in range(2):  # warm-up: DeepSpeed initialises in the first step, and starts its timers later
            step()
        waits[micro_batches] = count_waits(step, device)
    assert step is not None
    ms = 1e3 * min(seconds_of(step, device) for _ in range(3))
    dist.stop()
    return judge(waits[FEW], waits[MANY], device, f"{ms:.0f} ms for a step of {MANY} micro-batches")


def judge(few: Counter[str], many: Counter[str], device: torch.device, detail: str) -> list[Finding]:
    more = many - few
    in_update, each = few.total(), more.total() / (MANY - FEW)
    what = "waits" if device.type == "cuda" else "waits (counted as on a GPU)"
    said = f"{each:g} per micro-batch, {in_update} per update; {detail}"
    if each:
        where = ", ".join(f"{place} {n} x" for place, n in more.most_common(3))
        return [Finding(what, Verdict.SLOW, said, f"each micro-batch waits for the GPU: {where}; report it")]
    if in_update > MOST_OF_AN_UPDATE:
        where = ", ".join(f"{place} {n} x" for place, n in few.most_common(3))
        return [Finding(what, Verdict.SLOW, said, f"at most {MOST_OF_AN_UPDATE} are expected: {where}; report it")]
    return [Finding(what, Verdict.OK, said)]

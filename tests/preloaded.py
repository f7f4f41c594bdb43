"""What the server of forked processes imports and measures once, in the place of each of them."""

from __future__ import annotations

import functools

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  DeepSpeed imports it when it sets up an optimizer
import torch
import torch._dynamo
import torch.utils.tensorboard

import bfsys.train  # noqa: F401
from bfsys.supervision import metrics

# Every start of training measures this for 0.2 s of a core, which is a quarter of what a small run takes.
metrics.matrix_peak = functools.cache(metrics.matrix_peak)
for dtype in (torch.float32, torch.bfloat16):
    metrics.matrix_peak(torch.device("cpu"), dtype)

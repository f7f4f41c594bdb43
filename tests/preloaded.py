"""The imports and measurements that the server of forked processes makes once for all of them."""

from __future__ import annotations

import functools

import deepspeed.ops
import deepspeed.utils.numa
import numpy.ma  # noqa: F401
import torch
import torch._dynamo
import torch.utils.tensorboard

# DeepSpeed imports these at the start of training.
from deepspeed.module_inject import auto_ep_layer  # noqa: F401

import bfsys.train  # noqa: F401
from bfsys.engine import import_deepspeed
from bfsys.git_state import git_state
from bfsys.supervision import metrics

# Every start of training measures this, which takes 0.2 s, a quarter of the time of a small run.
metrics.matrix_peak = functools.cache(metrics.matrix_peak)
for dtype in (torch.float32, torch.bfloat16):
    metrics.matrix_peak(torch.device("cpu"), dtype)

git_state()
import_deepspeed()
deepspeed.ops.__compatible_ops__  # noqa: B018  runs the C compiler when it is first read
# Stage 3 runs `numactl` twice per step to count devices.
deepspeed.utils.numa.get_numa_cores = functools.cache(deepspeed.utils.numa.get_numa_cores)

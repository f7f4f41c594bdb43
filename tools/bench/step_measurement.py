"""One measurement of bench_step.py: steps of one side on one workload, in this process or in a separate one.

A side is a form of the model with its optimizer. A job names the side, the files and the number of steps.
"""

from __future__ import annotations

import gc
import json
import re
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from bfsys import dist
from bfsys.gpu_check.operations import CountedOperations
from bfsys.gpu_check.training_steps import Step, bfsys_step, engine_step, published_step, random_files
from bfsys.model.flops import matrix_peak, seconds_of, synchronize
from bfsys.model.sizes import Architecture, architecture
from bfsys.ranks import Ranks
from tools.bench.child_process import result_of_child

MIB = 2**20
LIMIT_S = 900  # limit of a measurement in a separate process
MEET_S = 60  # limit of the engine's start, whose only rank is this process


@dataclass(frozen=True)
class Workload:
    kernel: int
    classes: int
    lengths: tuple[int, ...]


def make_architecture(size: str, workload: Workload) -> Architecture:
    """Make the architecture of a size, with a position table that is just large enough."""
    tokens = -(-max(workload.lengths) // (workload.kernel // 2))
    if size == "custom":
        return architecture(
            size, kernel=workload.kernel, max_tokens=tokens, dim=32, layers=4, heads=2, window=16, shift=8
        )
    return architecture(size, kernel=workload.kernel, max_tokens=tokens)


def count_kernels(run: Callable[[], object]) -> int:
    """Count the kernels and copies that `run` launches on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return sum("cuda" in str(event.device_type).lower() for event in profiled.events())


SIDES: dict[str, Callable[..., Step]] = {
    "baseline": partial(published_step, fused_attention=False),
    "sdpa": partial(published_step, fused_attention=True),
    "bfsys": bfsys_step,
    "bfsys_checkpointing": partial(bfsys_step, checkpointing=True),
    "bfsys_compiled": partial(bfsys_step, compiled=True),
    "bfsys_engine": partial(engine_step, micro_batches=1),
}
ON_REQUEST = ("checkpointing", "compiled", "engine")  # sides of bfsys that have an option


def measure(job: dict) -> dict:
    """Measure the steps of a side: {"ms", "cpu_ms", "mib", "parts"}, and for bfsys "peak_flops_per_s"."""
    device, bf16 = torch.device(job["device"]), job["precision"] == "bf16"
    make = SIDES[job["side"]]
    workload = Workload(**job["workload"])
    if (job["side"] == "bfsys_engine" or device.type == "cuda") and not torch.distributed.is_initialized():
        dist.start(Ranks(), MEET_S)  # all sides then use DeepSpeed's settings for a GPU
    small = architecture("custom", kernel=4, window=8, shift=4, dim=64, layers=2, heads=1, max_tokens=50)
    make(random_files([100, 90]), small, 2, device, bf16)()
    synchronize(device)
    before = start_of_memory(device)
    files = random_files(workload.lengths)
    step = make(files, make_architecture(job["size"], workload), workload.classes, device, bf16)
    for _ in range(3 if device.type == "cuda" else 1):
        step()
    passes = []
    for _ in range(job["repeats"]):
        synchronize(device)
        begin = time.perf_counter(), time.process_time()
        step()
        synchronize(device)
        passes.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    wall, cpu = zip(*passes, strict=True)
    result = {"ms": 1000 * min(wall), "cpu_ms": 1000 * min(cpu)}
    result["mib"] = (peak_memory_bytes(device) - before) / MIB
    result["parts"] = measure_parts(step, device, job["repeats"] if job["times"] else 0)
    if job["side"] == "bfsys":
        result["peak_flops_per_s"] = matrix_peak(device, torch.bfloat16 if bf16 else torch.float32, seconds=1)
    return result


def measure_parts(step: Step, device: torch.device, repeats: int) -> dict[str, dict]:
    """Measure forward, backward and update: the number of PyTorch's operations, of launching operations and (on a GPU)
    of kernels and copies, and the fastest of `repeats` times, each with a synchronisation."""
    loss: list = [None]

    def forward() -> None:
        loss[0] = step.forward()

    parts = {"forward": forward, "backward": lambda: step.backward(loss[0]), "update": step.update}
    found: dict[str, dict] = {}
    for name, run in parts.items():
        with CountedOperations() as counted:
            run()
        found[name] = {"operations": counted.all.total(), "launches": counted.launching.total()}
    if device.type == "cuda":
        for name, run in parts.items():
            found[name]["kernels"] = count_kernels(run)
    for _ in range(repeats):
        for name, run in parts.items():
            found[name]["ms"] = min(found[name].get("ms", float("inf")), 1000 * seconds_of(run, device))
    return found


def start_of_memory(device: torch.device) -> int:
    """Reset the peak of the process' memory on the device, if the system allows it; returns the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return bytes_in_proc("self/status", "VmHWM")


def bytes_in_proc(file: str, name: str) -> int:
    """Read a figure in kB from /proc, and return bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc", file).read_text())
    assert found, f"/proc/{file} says nothing of {name}"
    return int(found[1]) * 1024


def in_this_process(job: dict) -> dict:
    """`measure(job)`, or {"problem": …}."""
    try:
        return measure(job)
    except Exception as error:  # errors of the model, the device memory or the compiler
        return {"problem": traceback.format_exception_only(error)[-1].strip()}
    finally:
        if job["side"] == "bfsys_compiled":
            torch.compiler.reset()  # PyTorch compiles only a limited number of models
        gc.collect()
        if job["device"] == "cuda":
            torch.cuda.empty_cache()


def in_child(job: dict) -> dict:
    """`measure(job)` in a separate process, or {"problem": …}."""
    with tempfile.TemporaryDirectory(prefix="bench_step-") as scratch:
        result = Path(scratch, "result")
        return result_of_child([sys.executable, __file__, json.dumps(job), str(result)], result, LIMIT_S)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(sys.argv[1]))))

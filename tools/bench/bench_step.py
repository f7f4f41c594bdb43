"""Training steps of bfsys and of the published implementation: the same files, precision and machine, in one run.

    python tools/bench/bench_step.py --precision bf16 --json step.json --checkpointing

A step is forward, backward and AdamW on float32 weights. `published` is published_form.py on a padded batch in random
order. `+ sdpa` is the same with PyTorch's fused attention. In bf16, the published implementation runs under autocast,
like the released code. bfsys runs as in training, with bfloat16 weights in the model and float32 weights in the
optimizer. Files are copied to the device before the measurement. The indices that bfsys computes on the CPU are part of
its step. Time is that of the fastest step after a warm-up, because other work on the machine can only add to it. The
JSON also has the processor time. Memory is the peak of these steps above the memory before the model was made. It
includes weights, gradients and optimizer. A small step loads PyTorch's libraries first. `of peak` is the rate of the
operations that real tokens need (bfsys/model/flops.py), relative to that of a large matrix product in the same
precision and process. On a CPU each measurement runs in a separate process, and memory is resident memory. It includes
freed blocks that the C library keeps. With MALLOC_MMAP_THRESHOLD_=262144 in the environment it does not, which shows
how much checkpointing saves. On a GPU a step takes less time than the start of a process. All measurements are
therefore made in one process, and memory is the memory that PyTorch has allocated.

Each measurement is printed when it is made. Besides time and memory, it gives the number of PyTorch's operations in a
micro-batch's forward and backward pass and in an update. It also gives the number of those that launch a kernel on a
GPU; views and allocations do not. A kernel of bfsys is not one of these operations. On a GPU the profiler counts all
kernels and copies.

Exit code 0: measured; 1: a measurement failed; 2: wrong arguments or other wrong input. Rejected alternative: figures
of different runs in one table, because on shared machines runs differ by more than the forms do.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from bfsys.start import let_signals_end_the_process

    let_signals_end_the_process()

import numpy as np
import torch

from bfsys.errors import run_command, summary_of
from bfsys.files import replace_file
from bfsys.model.flops import flops_per_step, published_flops
from bfsys.model.sizes import SIZES, Architecture
from tools.bench.report import machine, show
from tools.bench.step_measurement import (
    ON_REQUEST,
    SIDES,
    Workload,
    bytes_in_proc,
    in_child,
    in_this_process,
    make_architecture,
)

# Main memory of the published implementation for each token and each byte of a padded batch, by dim (tiny, float32).
PADDED_TOKEN_BYTES_PER_DIM, PADDED_BYTE_BYTES_PER_DIM = 240, 16
SHARE_OF_MEMORY = 0.7  # share of free memory that a measurement on the CPU may use


def workloads() -> dict[str, Workload]:
    rng = np.random.default_rng(0)
    jpeg = np.exp(rng.normal(np.log(12_000), 0.7, 16)).astype(np.int64).clip(64)
    wav = rng.permutation([32_044, 64_058] * 4)  # one second of sound, in 16 and in 32 bits
    return {
        "tiff": Workload(32, 1000, (150_668,) * 4),
        "jpeg": Workload(8, 1000, tuple(jpeg.tolist())),
        "wav": Workload(16, 12, tuple(wav.tolist())),
    }


def trial_workloads() -> dict[str, Workload]:
    """The same workloads with small files, for a quick trial."""
    return {n: Workload(w.kernel, 12, tuple(i // 40 for i in w.lengths[:4])) for n, w in workloads().items()}


def with_files(workload: Workload, files: int | None) -> Workload:
    """Take the first `files` files, and repeat them if there are fewer; by default take all."""
    lengths = workload.lengths
    return replace(workload, lengths=tuple(lengths[i % len(lengths)] for i in range(files or len(lengths))))


def that_fits(workload: Workload, a: Architecture) -> Workload:
    """Reduce the files so that their padded form fits into main memory."""
    available = available_bytes()
    for count in range(len(workload.lengths), 0, -1):
        lengths = workload.lengths[:count]
        tokens = count * max(lengths) / a.stride
        bytes_per_dim = PADDED_TOKEN_BYTES_PER_DIM + PADDED_BYTE_BYTES_PER_DIM * a.stride
        if tokens * a.dim * bytes_per_dim < SHARE_OF_MEMORY * available:
            break
    return Workload(workload.kernel, workload.classes, lengths)


def available_bytes() -> int:
    """Free main memory. (A GPU is large enough for the workloads.)"""
    return bytes_in_proc("meminfo", "MemAvailable")


def measure_workload(name: str, workload: Workload, args: argparse.Namespace, run: Callable[[dict], dict]) -> dict:
    """Measure a row. `run` does a job."""
    workload = with_files(workload, args.files)
    if args.device == "cpu":
        workload = that_fits(workload, make_architecture(args.size, workload))
    a = make_architecture(args.size, workload)
    lengths = np.array(workload.lengths)
    flops, published = (f(lengths, a, workload.classes).total for f in (flops_per_step, published_flops))
    real_tokens = int((-(-lengths // a.stride)).sum())
    row: dict = {"workload": name, "kernel": workload.kernel, "files": len(lengths), "bytes": int(lengths.sum())}
    row |= {"real_tokens": real_tokens, "flops": flops, "published_flops": published, "problem": None}
    row["padding"] = 1 - row["bytes"] / (len(lengths) * int(lengths.max()))
    for side in SIDES:
        done = {}
        if side.removeprefix("bfsys_") not in ON_REQUEST or getattr(args, side.removeprefix("bfsys_")):
            job = {"side": side, "workload": asdict(workload), "size": args.size, "repeats": args.repeats}
            job["times"] = args.times
            done = run({**job, "device": args.device, "precision": args.precision})
            print(f"  {name}, {len(lengths)} files, {side}: {describe(done)}", flush=True)
        row |= {f"{side}_{key}": done.get(key) for key in ("ms", "cpu_ms", "mib", "parts")}
        if "problem" in done:
            row["problem"] = f"{side}: {done['problem']}"
        if side == "bfsys":
            row["peak_flops_per_s"] = done.get("peak_flops_per_s")
    seconds = row["bfsys_ms"] / 1000 if row["bfsys_ms"] else None
    row["tokens_per_s"] = real_tokens / seconds if seconds else None
    row["bytes_per_s"] = row["bytes"] / seconds if seconds else None
    row["share_of_peak"] = flops / seconds / row["peak_flops_per_s"] if seconds else None
    for key, over, under in RATIOS:
        row[key] = row[over] / row[under] if row[over] and row[under] else None
    return row


RATIOS = (
    ("ratio", "baseline_ms", "bfsys_ms"),
    ("sdpa_ratio", "sdpa_ms", "bfsys_ms"),
    ("memory_ratio", "bfsys_mib", "baseline_mib"),
    ("sdpa_memory_ratio", "bfsys_mib", "sdpa_mib"),
)
COLUMNS = {
    "files": ("files", "{}"),
    "padding": ("padding", "{:.0%}"),
    "baseline_ms": ("published, ms", "{:,.1f}"),
    "sdpa_ms": ("+ sdpa, ms", "{:,.1f}"),
    "bfsys_ms": ("bfsys, ms", "{:,.1f}"),
    "bfsys_checkpointing_ms": ("checkp., ms", "{:,.1f}"),
    "bfsys_compiled_ms": ("compiled, ms", "{:,.1f}"),
    "bfsys_engine_ms": ("engine, ms", "{:,.1f}"),
    "ratio": ("faster", "{:.2f} x"),
    "sdpa_ratio": ("than sdpa", "{:.2f} x"),
    "baseline_mib": ("published, MiB", "{:,.0f}"),
    "sdpa_mib": ("+ sdpa, MiB", "{:,.0f}"),
    "bfsys_mib": ("bfsys, MiB", "{:,.0f}"),
    "bfsys_checkpointing_mib": ("checkp., MiB", "{:,.0f}"),
    "memory_ratio": ("memory", "{:.2f} x"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "bytes_per_s": ("bytes/s", "{:,.0f}"),
    "share_of_peak": ("of peak", "{:.0%}"),
    "problem": ("problem", "{}"),
}


def describe(done: dict) -> str:
    """Describe a measurement in words."""
    if "problem" in done:
        return done["problem"]
    parts = [f"{name} {describe_part(part)}" for name, part in done["parts"].items()]
    return "; ".join([f"{done['ms']:,.1f} ms, {done['mib']:,.0f} MiB", *parts])


def describe_part(part: dict) -> str:
    kernels = f", {part['kernels']:,} kernels" if "kernels" in part else ""
    ms = f", {part['ms']:,.1f} ms" if "ms" in part else ""
    return f"{part['operations']:,} operations ({part['launches']:,} launch{kernels}){ms}"


def machine_with(device: str) -> dict:
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {**machine(), "bf16_instructions": bf16_instructions(), "threads": torch.get_num_threads(), "gpu": gpu}


def bf16_instructions() -> str:
    """Name the processor's instructions that multiply bfloat16."""
    known = {"AVX512_BF16": torch.cpu._is_avx512_bf16_supported(), "AMX": torch.cpu._is_amx_tile_supported()}
    return ", ".join(name for name, is_there in known.items() if is_there) or "none (products in float32)"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=summary_of(__doc__))
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=("fp32", "bf16"), default="bf16", help="default: %(default)s")
    add("--size", choices=tuple(SIZES), default="tiny", help="default: %(default)s")
    add("--workloads", default=",".join(workloads()), metavar="A,B", help="default: %(default)s")
    add("--repeats", type=int, help="measured steps, of which the fastest counts (default: 3; on a GPU 20)")
    add(
        "--files",
        type=int,
        metavar="N",
        help="files per step (default: 4 to 16; on the CPU, fewer where memory is short)",
    )
    add("--checkpointing", action="store_true", help="measure bfsys with activation checkpointing, too")
    add("--compiled", action="store_true", help="measure bfsys with torch.compile, too; on a GPU")
    add("--engine", action="store_true", help="measure bfsys through DeepSpeed's engine, too")
    add("--times", action="store_true", help="measure forward, backward and update each, too")
    add("--one-process", action="store_true", help="measure all in one process; memory on a CPU is then inexact")
    add("--json", type=Path, metavar="OUT", help="write the rows to this file too")
    add("--trial", action="store_true", help=argparse.SUPPRESS)  # a small model on small files
    args = parser.parse_args(arguments)
    args.workloads = args.workloads.split(",")
    args.repeats = (20 if args.device == "cuda" else 3) if args.repeats is None else args.repeats
    wrong = [name for name in args.workloads if name not in workloads()]
    if wrong:
        parser.error(f"--workloads: got {', '.join(wrong)}; workloads are {', '.join(workloads())}")
    if args.repeats < 1 or (args.files is not None and args.files < 1):
        parser.error("--repeats and --files must be positive")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    if args.compiled and args.device == "cpu":
        parser.error("--compiled: models are compiled on GPUs only; leave it out, or give --device cuda")
    args.one_process |= args.device == "cuda"
    if args.trial:
        args.size = "custom"
    return args


def main(arguments: Sequence[str] | None = None, run: Callable[[dict], dict] | None = None) -> int:
    """`run` does a job; by default it is `in_child` or `in_this_process`."""
    args = parse_arguments(arguments)
    run = run or (in_this_process if args.one_process else in_child)
    os.makedirs(args.json.parent if args.json else ".", exist_ok=True)
    report: dict = {"device": args.device, "precision": args.precision, "size": args.size}
    report["machine"] = machine_with(args.device)
    print(f"{report['machine']['cpu']}, instructions for bfloat16: {bf16_instructions()}", file=sys.stderr)
    report["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    all_workloads = trial_workloads() if args.trial else workloads()
    show_rows = partial(
        show, columns=COLUMNS, headings=["workload"], names_of=lambda row: [f"{row['workload']}, k {row['kernel']}"]
    )
    rows: list[dict] = []
    for name in args.workloads:
        rows.append(measure_workload(name, all_workloads[name], args, run))
        show_rows(rows[-1:])  # show each row at once, so that a later failure does not lose it
        if args.json:
            date = datetime.now(UTC).isoformat(timespec="seconds")
            replace_file(args.json, json.dumps({"rows": rows, **report, "date": date}, indent=1) + "\n")
    if len(rows) > 1:
        show_rows(rows)
    return int(any(row["problem"] for row in rows))


if __name__ == "__main__":
    run_command(main)

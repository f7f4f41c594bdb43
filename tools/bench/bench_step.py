"""Training steps of bfsys and of the published form side by side: the same files, precision and machine, in one run.

    python tools/bench/bench_step.py --precision bf16 --json step.json --checkpointing

A step is forward, backward and AdamW on float32 weights. `published` is published_form.py on a padded batch in random
order; `+ sdpa` is the same with PyTorch's fused attention. In bf16 it runs under autocast, as released code
does; bfsys as it trains: bfloat16 weights, with float32 ones in the optimizer. Files lie on the device beforehand; what
bfsys computes from their lengths on the CPU is part of its step.
Each measurement is a process of its own. Time is the fastest step after warming up, since what else a machine does can
only add to it; the JSON has processor time too. Memory is the peak of these steps above what the process held before
it had a model, after a small step that starts PyTorch's libraries: weights, gradients and optimizer included. On the
CPU it is resident memory, freed blocks that the C library keeps included; MALLOC_MMAP_THRESHOLD_=262144 in the
environment leaves them out, and shows what checkpointing saves. `of peak` is what real tokens need
(bfsys/model/flops.py) over what a large matrix product in the same precision and process reaches.

Exit code 0: measured; 1: a measurement failed; 2: wrong arguments, or the like.
Refused: figures of different runs in one table; on shared machines they differ by more than programs do.
"""

import argparse
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from bfsys.batch import ByteBatch, Sample
from bfsys.errors import run_command, summary_of
from bfsys.files import replace_file
from bfsys.model.byteformer import ByteFormer
from bfsys.model.flops import flops_per_step, matrix_peak, published_flops
from bfsys.model.published_form import PublishedForm, pad
from bfsys.model.sizes import SIZES, Architecture, architecture

MIB = 2**20
LIMIT_S = 900  # of one measurement
# Main memory that the published form wants for each token and each byte of a padded batch, by dim (tiny, float32).
PADDED_TOKEN_BYTES_PER_DIM, PADDED_BYTE_BYTES_PER_DIM = 240, 16
SHARE_OF_MEMORY = 0.7  # of what is free, that a measurement on the CPU may want


@dataclass(frozen=True)
class Workload:
    kernel: int
    classes: int
    lengths: tuple[int, ...]


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
    """The same in small, to see whether everything works."""
    return {n: Workload(w.kernel, 12, tuple(i // 40 for i in w.lengths[:4])) for n, w in workloads().items()}


def make_architecture(size: str, workload: Workload) -> Architecture:
    """With a position table just large enough."""
    tokens = -(-max(workload.lengths) // (workload.kernel // 2))
    if size == "custom":
        return architecture(
            size, kernel=workload.kernel, max_tokens=tokens, dim=32, layers=4, heads=2, window=16, shift=8
        )
    return architecture(size, kernel=workload.kernel, max_tokens=tokens)


def random_files(lengths: Sequence[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, length, dtype=np.uint8) for length in lengths]


# ---------------------------------------------------------------------------------------------- in a child process


def published_step(
    files: list[np.ndarray], a: Architecture, classes: int, device: torch.device, bf16: bool, fused_attention: bool
) -> Callable[[], None]:
    model = PublishedForm(a, classes, fused_attention).to(device)
    x, labels = pad(files, a).to(device), labels_of(files, classes, device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(x).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bfsys_step(
    files: list[np.ndarray], a: Architecture, classes: int, device: torch.device, bf16: bool, checkpointing: bool
) -> Callable[[], None]:
    model = ByteFormer(a, classes, activation_checkpointing=checkpointing).to(device)
    batch = ByteBatch.from_samples([Sample("", file) for file in files]).to(device)
    labels = labels_of(files, classes, device)
    masters: list[Tensor] = list(model.parameters())
    if bf16:  # as DeepSpeed keeps them: float32 weights and gradients, from which and to which bfloat16 is rounded
        masters = [p.detach().clone() for p in model.parameters()]
        model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(masters, weight_decay=0.05, fused=True)
    weights: list[Tensor] = list(model.parameters())

    def step() -> None:
        F.cross_entropy(model(batch).float(), labels).backward()
        if bf16:
            gradients = [torch.empty_like(master) for master in masters]
            torch._foreach_copy_(gradients, [p.grad for p in weights if p.grad is not None])
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient
            model.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
        if bf16:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)

    return step


def labels_of(files: list[np.ndarray], classes: int, device: torch.device) -> Tensor:
    return torch.arange(len(files), device=device) % classes


SIDES = {
    "baseline": (published_step, False),
    "sdpa": (published_step, True),
    "bfsys": (bfsys_step, False),
    "bfsys_checkpointing": (bfsys_step, True),
}


def measure(job: dict) -> dict:
    """{"ms", "cpu_ms", "mib"} of a side's steps, and for bfsys "peak_flops_per_s"."""
    device, bf16 = torch.device(job["device"]), job["precision"] == "bf16"
    make, option = SIDES[job["side"]]
    workload = Workload(**job["workload"])
    small = architecture("custom", kernel=4, window=8, shift=4, dim=64, layers=2, heads=1, max_tokens=50)
    make(random_files([100, 90]), small, 2, device, bf16, option)()
    synchronize(device)
    before = start_of_memory(device)
    files = random_files(workload.lengths)
    step = make(files, make_architecture(job["size"], workload), workload.classes, device, bf16, option)
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
    if job["side"] == "bfsys":
        result["peak_flops_per_s"] = matrix_peak(device, torch.bfloat16 if bf16 else torch.float32, seconds=1)
    return result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def start_of_memory(device: torch.device) -> int:
    """Bytes that the process holds on the device; from here on its peak counts anew, where the system lets it."""
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
    """A figure that the system gives in kB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc", file).read_text())
    assert found, f"/proc/{file} says nothing of {name}"
    return int(found[1]) * 1024


# --------------------------------------------------------------------------------------------- in the first process


def in_child(job: dict) -> dict:
    """Do a job in a new process group. Returns its result, or {"problem": …}."""
    with tempfile.TemporaryDirectory(prefix="bench_step-") as scratch:
        result, errors = Path(scratch, "result"), Path(scratch, "errors")
        with open(errors, "wb") as output:
            command = [sys.executable, __file__, "--child", json.dumps({**job, "result": str(result)})]
            child = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            code = child.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            return {"problem": f"no end after {LIMIT_S} s"}
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if code == 0:
            return json.loads(result.read_text())
        lines = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
        return {"problem": lines[-1] if lines else f"ended with code {code}"}


def that_fits(workload: Workload, a: Architecture, files: int | None) -> Workload:
    """The workload with `files` of its files at most, and so few that their padded form fits into main memory."""
    available = available_bytes()
    for count in range(min(len(workload.lengths), files or len(workload.lengths)), 0, -1):
        lengths = workload.lengths[:count]
        tokens = count * max(lengths) / a.stride
        bytes_per_dim = PADDED_TOKEN_BYTES_PER_DIM + PADDED_BYTE_BYTES_PER_DIM * a.stride
        if tokens * a.dim * bytes_per_dim < SHARE_OF_MEMORY * available:
            break
    return Workload(workload.kernel, workload.classes, lengths)


def available_bytes() -> int:
    """Of main memory. (A GPU is large enough for the workloads.)"""
    return bytes_in_proc("meminfo", "MemAvailable")


def measure_workload(name: str, workload: Workload, args: argparse.Namespace, run: Callable[[dict], dict]) -> dict:
    """A row. `run` does a job: `in_child`, or in a test something quicker."""
    if args.device == "cpu":
        workload = that_fits(workload, make_architecture(args.size, workload), args.files)
    a = make_architecture(args.size, workload)
    lengths = np.array(workload.lengths)
    flops, published = (f(lengths, a, workload.classes).total for f in (flops_per_step, published_flops))
    real_tokens = int((-(-lengths // a.stride)).sum())
    row: dict = {"workload": name, "kernel": workload.kernel, "files": len(lengths), "bytes": int(lengths.sum())}
    row |= {"real_tokens": real_tokens, "flops": flops, "published_flops": published, "problem": None}
    row["padding"] = 1 - row["bytes"] / (len(lengths) * int(lengths.max()))
    for side in SIDES:
        done = {}
        if side != "bfsys_checkpointing" or args.checkpointing:
            print(f"measuring {name}, {len(lengths)} files, {side} …", file=sys.stderr)
            job = {"side": side, "workload": asdict(workload), "size": args.size, "repeats": args.repeats}
            done = run({**job, "device": args.device, "precision": args.precision})
        row |= {f"{side}_{key}": done.get(key) for key in ("ms", "cpu_ms", "mib")}
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


def show(rows: Sequence[dict]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 280)  # a log has no width, and would be cut to 80
    table = Table("workload", box=box.SIMPLE if sys.stdout.isatty() else None)
    for key, (title, _) in COLUMNS.items():
        table.add_column(title, justify="left" if key == "problem" else "right", overflow="fold")
    for row in rows:
        values = ["" if row[key] is None else form.format(row[key]) for key, (_, form) in COLUMNS.items()]
        table.add_row(f"{row['workload']}, k {row['kernel']}", *map(Text, values))
    console.print(table)


def machine(device: str) -> dict:
    cpu = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": f"{platform.platform()}, load {os.getloadavg()[0]:.1f} before",
    }


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=summary_of(__doc__))
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=("fp32", "bf16"), default="bf16", help="default: %(default)s")
    add("--size", choices=tuple(SIZES), default="tiny", help="default: %(default)s")
    add("--workloads", default=",".join(workloads()), metavar="A,B", help="default: %(default)s")
    add("--repeats", type=int, help="measured steps, of which the fastest counts (default: 3; on a GPU 20)")
    add("--files", type=int, metavar="N", help="on the CPU, at most so many files (default: as many as memory holds)")
    add("--checkpointing", action="store_true", help="measure bfsys with activation checkpointing, too")
    add("--json", type=Path, metavar="OUT", help="write the rows to this file too")
    add("--trial", action="store_true", help=argparse.SUPPRESS)  # a small model on small files
    add("--child", type=json.loads, help=argparse.SUPPRESS)
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
    if args.trial:
        args.size = "custom"
    return args


def main(arguments: Sequence[str] | None = None, run: Callable[[dict], dict] = in_child) -> int:
    args = parse_arguments(arguments)
    if args.child:
        Path(args.child["result"]).write_text(json.dumps(measure(args.child)))
        return 0
    os.makedirs(args.json.parent if args.json else ".", exist_ok=True)
    report = {"device": args.device, "precision": args.precision, "size": args.size, "machine": machine(args.device)}
    report["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    all_workloads = trial_workloads() if args.trial else workloads()
    rows: list[dict] = []
    for name in args.workloads:
        rows.append(measure_workload(name, all_workloads[name], args, run))
        show(rows[-1:])  # what was measured stays, whatever becomes of the rest
        if args.json:
            date = datetime.now(UTC).isoformat(timespec="seconds")
            replace_file(args.json, json.dumps({"rows": rows, **report, "date": date}, indent=1) + "\n")
    if len(rows) > 1:
        show(rows)
    return int(any(row["problem"] for row in rows))


if __name__ == "__main__":
    if "--child" not in sys.argv:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that folders and processes are cleaned up
    run_command(main)

"""Benchmark of one file of a given length: time and memory of a prediction, and of a training step.

    python tools/bench/bench_length.py --lengths 64k,256k,1m,4m,16m --json length.json

Attention is confined to windows, so the cost should grow linearly with the length. The last column is the time per byte
relative to that of the first row. A step is forward and backward with activation checkpointing. Files with more tokens
than model.max_tokens repeat positions (bfsys/model/stem.py). Each measurement runs in a separate process. Memory is
measured as in bench_step.py.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from bfsys.start import let_signals_end_the_process

    let_signals_end_the_process()

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bfsys.batch import ByteBatch, Sample
from bfsys.errors import UserError, run_command, summary_of
from bfsys.files import replace_file
from bfsys.gpu_check.training_steps import random_files
from bfsys.model.byteformer import ByteFormer
from bfsys.model.flops import seconds_of, synchronize
from bfsys.model.sizes import SIZES, Architecture, architecture
from tools.bench.bench_step import machine_with
from tools.bench.step_measurement import MIB, peak_memory_bytes, start_of_memory

UNITS = {"k": 1000, "m": 1_000_000}
LIMIT_S = 900


def measure(job: dict) -> dict:
    """Measure {"ms", "mib"} of an answer, or of a step, for one file."""
    device, dtype = torch.device(job["device"]), torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    shape: dict = {k: tuple(v) if isinstance(v, list) else v for k, v in job["architecture"].items()}
    batches = [ByteBatch.from_samples([Sample("", f)]).to(device) for f in random_files([1000, job["length"]])]
    small = architecture("custom", kernel=4, window=8, shift=4, dim=64, layers=2, heads=1, max_tokens=50)
    run(ByteFormer(small, 2).to(device, dtype), batches[0], job["step"])
    synchronize(device)
    before, times = start_of_memory(device), []
    model = ByteFormer(Architecture(**shape), 10, activation_checkpointing=True).to(device, dtype).train(job["step"])
    for _ in range(job["repeats"]):
        times.append(seconds_of(lambda: run(model, batches[1], job["step"]), device))
    return {"ms": 1000 * min(times), "mib": (peak_memory_bytes(device) - before) / MIB}


def run(model: ByteFormer, batch: ByteBatch, step: bool) -> None:
    with torch.set_grad_enabled(step):
        logits = model(batch)
    if step:
        logits.float().square().sum().backward()
        model.zero_grad()


def in_child(job: dict) -> dict:
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--child", json.dumps(job)], capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{job['length']:,} bytes: no end after {LIMIT_S} s; leave such lengths out") from None
    if done.returncode:
        raise UserError(f"{job['length']:,} bytes: ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


def bytes_of(text: str) -> int:
    """Convert 64k to 64,000."""
    unit = UNITS.get(text[-1:].lower())
    return int(text[:-1]) * unit if unit else int(text)


def show(rows: list[dict]) -> None:
    table = Table("bytes", box=box.SIMPLE)
    for title in ("tokens", "answer, ms", "MiB", "step, ms", "MiB", "step, ns/byte", "over the first"):
        table.add_column(title, justify="right")
    for row in rows:
        per_byte, first = (r["step_ms"] / r["length"] for r in (row, rows[0]))
        cells = (row["length"], row["tokens"], row["answer_ms"], row["answer_mib"], row["step_ms"], row["step_mib"])
        table.add_row(*(f"{c:,.0f}" for c in cells), f"{1e6 * per_byte:,.0f}", f"{per_byte / first:.2f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=summary_of(__doc__))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--kernel", type=int, default=32)
    parser.add_argument("--lengths", default="64k,256k,1m,4m,16m", metavar="A,B", help="default: %(default)s")
    parser.add_argument(
        "--repeats", type=int, default=2, help="measured repetitions; the fastest counts (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        print(json.dumps(measure(args.child)))
        return 0
    try:
        lengths = [bytes_of(text) for text in args.lengths.split(",")]
    except ValueError:
        parser.error(f"--lengths: got {args.lengths}; bytes such as 64000, 64k or 16m are expected")
    if min(lengths) < 1 or args.repeats < 1:
        parser.error("--lengths and --repeats must be positive")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    a, rows = architecture(args.size, kernel=args.kernel), []
    for length in lengths:
        row = {"length": length, "tokens": -(-length // a.stride)}
        for name in ("answer", "step"):
            job = {"length": length, "step": name == "step", "architecture": asdict(a), "repeats": args.repeats}
            done = in_child(job | {"device": args.device, "precision": args.precision})
            row |= {f"{name}_{key}": value for key, value in done.items()}
        rows.append(row)
        print(f"measured {length:,} bytes", file=sys.stderr)
    show(rows)
    if args.json:
        replace_file(args.json, json.dumps({"rows": rows, "machine": machine_with(args.device)}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)

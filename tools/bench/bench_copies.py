"""Benchmark of copies of checkpoints in an object store: how much they slow down training.

    python tools/bench/bench_copies.py            # needs s3fs and moto[server], and a gigabyte of memory

A published model trains on random bytes on one CPU rank. Its checkpoint is copied repeatedly to an S3 server, which is
a separate process on the same machine. Steps during a copy and steps without a copy are measured in turn. The server
also takes CPU time from the steps, so a copy to another machine slows training less.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from bfsys.start import let_signals_end_the_process

    let_signals_end_the_process()

import numpy as np
import psutil

from bfsys.errors import run_command, summary_of
from tools.bench.command import at_least

if TYPE_CHECKING:
    from bfsys.engine import Engine

MIB = 2**20
STEPS_BETWEEN = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=summary_of(__doc__))
    parser.add_argument("--copies", type=at_least(1), default=6, help="default: %(default)s")
    parser.add_argument(
        "--files", type=at_least(1), default=4, help="files of each step, of 20,000 bytes (default: %(default)s)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        log = Path(folder) / "requests.log"
        with open(log, "wb") as file:
            server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=file, stderr=file)
        try:
            wait_for(port)
            figures = measure(Path(folder), port, log, args.copies, args.files)
        finally:
            server.kill()
    for name, value in figures.items():
        print(f"{name:<40}{value}")


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the server does not start")


def engine_and_step(files: int) -> tuple[Engine, Callable[[], float]]:
    """Return an engine of `tiny`, and a function that makes a training step and returns its seconds."""
    from bfsys import dist
    from bfsys.batch import ByteBatch, Sample
    from bfsys.config import Config, Data
    from bfsys.engine import Engine
    from bfsys.loss import loss_and_sums
    from bfsys.model.byteformer import ByteFormer

    dist.start(dist.Ranks(), 600)
    config = Config(data=Data(sources=(), batch_samples=files, lanes=1))
    engine = Engine(ByteFormer(config.model.architecture(), 1000), config, dist.Ranks())
    rng = np.random.default_rng(0)
    batch = ByteBatch.from_samples(
        [Sample("", rng.integers(0, 256, 20_000, dtype=np.uint8), label=0) for _ in range(files)]
    )

    def step_s() -> float:
        began = time.perf_counter()
        loss, _ = loss_and_sums(engine.forward(batch), batch, 1)
        engine.backward(loss)
        engine.step(1e-4, 0.99)
        return time.perf_counter() - began

    return engine, step_s


def measure(folder: Path, port: int, log: Path, copies: int, files: int) -> dict[str, str]:
    variables = {
        "DS_ACCELERATOR": "cpu",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    os.environ.update(variables)

    import boto3  # type: ignore[import-untyped]

    from bfsys.checkpoint.copies import Copies
    from bfsys.checkpoint.files import MANIFEST
    from bfsys.checkpoint.retention import RetentionPolicy
    from bfsys.checkpoint.saving import save
    from bfsys.ranks import Ranks

    boto3.client("s3").create_bucket(Bucket="bucket")
    engine, step_s = engine_and_step(files)
    run, keep = folder / "run", RetentionPolicy(1)
    facts = {"step": 1, "updates": 1, "classes": [], "config": {}, "plan": {}, "versions": {}, "metrics": None}
    path = save(engine, run, facts, ranks=Ranks(), keep=keep)
    mib = sum(file.stat().st_size for file in path.iterdir()) / MIB
    copier = Copies(run, "s3://bucket/copies/run", keep)
    alone_s, beside_s, offers_s, copies_s, requests, peaks_mib = [], [], [], [], [], []
    for _ in range(3):
        step_s()
    for _ in range(copies):
        alone_s += [step_s() for _ in range(STEPS_BETWEEN)]
        manifest = path / MANIFEST
        manifest.write_bytes(manifest.read_bytes() + b" ")  # a different manifest, so that there is no copy yet
        before = log.read_bytes().count(b"\n")
        began = time.perf_counter()
        copier.offer()
        offers_s.append(time.perf_counter() - began)
        peak = 0.0
        while copier.copying:
            process = psutil.Process(copier._present.process.pid)  # type: ignore[union-attr]
            beside_s.append(step_s())
            peak = max(peak, process.memory_info().rss / MIB) if process.is_running() else peak
            if news := copier.attend():
                print(news, file=sys.stderr)
        copies_s.append(time.perf_counter() - began)
        requests.append(log.read_bytes().count(b"\n") - before)
        peaks_mib.append(peak)
    assert not copier.problem_of_newest(), copier.problem_of_newest()
    alone, beside = statistics.median(alone_s), statistics.median(beside_s)
    return {
        "checkpoint": f"{mib:.0f} MiB in {len(list(path.iterdir()))} files",
        "step, no copy": f"{alone:.3f} s (median of {len(alone_s)})",
        "step beside a copy": f"{beside:.3f} s (median of {len(beside_s)}), {beside / alone:.2f} x",
        "training waits for the start of a copy": f"{1000 * statistics.median(offers_s):.1f} ms",
        "a copy": f"{statistics.median(copies_s):.1f} s, {statistics.median(requests):.0f} requests",
        "memory of the copying process": f"{max(peaks_mib):.0f} MiB",
    }


if __name__ == "__main__":
    run_command(main)

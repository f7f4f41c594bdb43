"""Benchmark of recovery: the time that training waits for checkpoints, and the goodput of a run whose ranks are killed.

    python tools/bench/bench_recovery.py saving --disk-mb-s 20    # needs root and cgroup v1; without: the disk as is
    python tools/bench/bench_recovery.py attacks --minutes 20 --every-s 120

saving: a published model trains on random bytes on one CPU rank three times: without saves, with saves that training
waits for, and as bfsys saves. A save is made every few steps. The stall is the time for which a save blocks the
training loop. The share is the stall divided by the time of the steps of the default interval. The benchmark also
reports how much a writing process slows the steps down.

attacks: launchers/local.py trains a small model on two ranks, and a randomly chosen rank is killed repeatedly. The
seconds in goodput.jsonl are compared with a clock outside of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from bfsys.start import let_signals_end_the_process

    let_signals_end_the_process()

import numpy as np
import psutil
import yaml
from rich.console import Console
from rich.table import Table

from bfsys.config import Train
from bfsys.errors import UserError, run_command, summary_of
from bfsys.supervision.goodput import CAUSES, goodput, read_seconds
from tools.bench.command import at_least, positive

ROOT = Path(__file__).resolve().parents[2]
THROTTLE = Path("/sys/fs/cgroup/blkio/bfsys-bench")
MIB = 2**20
STEPS_PER_SAVE, SAVES = 10, 3


# ------------------------------------------------------------------------------------------------------------ saving


def train_and_save(how: str, folder: Path, kernel: int, file_bytes: int, files: int) -> dict:
    """Measure {"steps_s", "stalls_s", "beside_s", "mib"} of a training; `how` is none, waiting or beside."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

    from bfsys import dist
    from bfsys.batch import ByteBatch, Sample
    from bfsys.checkpoint.retention import RetentionPolicy
    from bfsys.checkpoint.saving import Saver
    from bfsys.config import Config, Data, Model
    from bfsys.engine import Engine
    from bfsys.loss import loss_and_sums
    from bfsys.model.byteformer import ByteFormer

    ranks = dist.Ranks()
    dist.start(ranks, 600)
    config = Config(data=Data(sources=(), batch_samples=files, lanes=1), model=Model(kernel=kernel))
    model = ByteFormer(config.model.architecture(), 1000)
    engine = Engine(model, config, ranks)
    rng = np.random.default_rng(0)
    batch = ByteBatch.from_samples(
        [Sample("", rng.integers(0, 256, file_bytes, dtype=np.uint8), label=0) for _ in range(files)]
    )
    saver = Saver(folder, ranks, RetentionPolicy(1))
    steps_s: list[float] = []
    beside_s: list[float] = []
    stalls_s = []

    def facts(step: int) -> dict:
        return {"step": step, "updates": step, "classes": [], "config": {}, "plan": {}, "versions": {}, "metrics": None}

    step = 0
    for _ in range(SAVES):
        began = time.perf_counter()
        if how != "none":
            saver.start(engine, facts(step))
        if how == "waiting":
            saver.finish()
        stalls_s.append(time.perf_counter() - began)
        first_step = step
        while step < first_step + STEPS_PER_SAVE or saver.under_way:
            began = time.perf_counter()
            loss, _ = loss_and_sums(engine.forward(batch), batch, 1)
            engine.backward(loss)
            engine.step(1e-4, 0.99)
            step += 1
            (beside_s if saver.is_writing() else steps_s).append(time.perf_counter() - began)
            began = time.perf_counter()
            if saver.under_way and not saver.is_writing():
                saver.finish()
            stalls_s.append(time.perf_counter() - began)
    mib = 4 * 4 * sum(p.numel() for p in model.parameters()) / MIB
    return {"steps_s": steps_s[2:], "beside_s": beside_s, "stall_s": sum(stalls_s) / SAVES, "mib": mib}


def throttled(disk_mb_s: float | None, folder: Path) -> bool:
    """Limit the write speed of this process and its children to the folder's disk. Returns False if not permitted."""
    if disk_mb_s is None:
        return False
    device = os.stat(folder).st_dev
    whole = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if (whole / "partition").exists():
        device_text = (whole.resolve().parent / "dev").read_text().strip()
    else:
        device_text = f"{os.major(device)}:{os.minor(device)}"
    try:
        THROTTLE.mkdir(exist_ok=True)
        (THROTTLE / "blkio.throttle.write_bps_device").write_text(f"{device_text} {int(disk_mb_s * 1e6)}")
        (THROTTLE / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        raise UserError(f"--disk-mb-s: the disk cannot be throttled here: {error}; leave it out") from None
    return True


def write_speed_mb_s(folder: Path) -> float:
    """The speed at which 64 MB are written and synced."""
    path, content = folder / "speed", os.urandom(64_000_000)
    began = time.perf_counter()
    with open(path, "wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    path.unlink()
    return 64 / (time.perf_counter() - began)


def bench_saving(args: argparse.Namespace) -> dict:
    interval = Train().save_every
    with tempfile.TemporaryDirectory(prefix="bench_recovery-", dir=args.folder) as name:
        folder = Path(name)
        throttled(args.disk_mb_s, folder)
        disk = write_speed_mb_s(folder)
        rows = {}
        for how in ("none", "waiting", "beside"):
            print(f"measuring saves: {how} …", file=sys.stderr)
            child = [sys.executable, __file__, "saving", "--child", how, "--folder", str(folder)]
            child += ["--kernel", str(args.kernel), "--file-bytes", str(args.file_bytes), "--files", str(args.files)]
            done = subprocess.run(child, stdout=subprocess.PIPE, timeout=900, check=True)
            rows[how] = json.loads(done.stdout.splitlines()[-1])
    step_s = statistics.median(rows["none"]["steps_s"])
    table = Table("saves", "stall per save, s", f"of {interval} steps", "step, s", "step beside a writer, s")
    for how, row in rows.items():
        beside = f"{statistics.median(row['beside_s']):.3f}" if row["beside_s"] else ""
        share = row["stall_s"] / (interval * step_s)
        table.add_row(how, f"{row['stall_s']:.3f}", f"{share:.3%}", f"{statistics.median(row['steps_s']):.3f}", beside)
    print(f"state {rows['none']['mib']:,.0f} MiB; disk {disk:,.0f} MB/s synced")
    Console(width=120).print(table)
    ratio = rows["waiting"]["stall_s"] / rows["beside"]["stall_s"]
    print(f"training waits {rows['waiting']['stall_s']:.3f} s for a save that blocks it, "
          f"{rows['beside']['stall_s']:.3f} s for a save in the background: {ratio:.1f} x less")  # fmt: skip
    return {"disk_mb_s": disk, "step_s": step_s, "rows": rows}


# ----------------------------------------------------------------------------------------------------------- attacks


def make_run(folder: Path) -> Path:
    """A config of an endless run on random bytes."""
    from bfsys.cli import call

    rng = np.random.default_rng(0)
    for split, files in (("train", 400), ("val", 20)):
        for name in ("a", "b"):
            place = folder / "tree" / split / name
            place.mkdir(parents=True)
            for i in range(files):
                (place / f"{i}.bin").write_bytes(rng.integers(0, 256, 3000, dtype=np.uint8).tobytes())
    call("pack", [str(folder / "tree"), str(folder / "shards"), "--name", "random"])
    config = {
        "data": {"sources": [{"path": str(folder / "shards" / "random")}], "batch_samples": 32, "lanes": 4},
        "model": {"size": "custom", "dim": 64, "layers": 4, "heads": 2, "kernel": 8, "window": 32, "shift": 16,
                  "max_tokens": 1000},
        "optim": {"warmup_steps": 10},
        "train": {"steps": 10**8, "precision": "fp32", "zero_stage": 1, "log_every": 10, "eval_every": 0,
                  "save_every": 10, "spike_zscore": 0},
        "runs_dir": str(folder / "runs"),
    }  # fmt: skip
    path = folder / "attacked.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def bench_attacks(args: argparse.Namespace) -> dict:
    rng, killed = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory(prefix="bench_recovery-", dir=args.folder) as name:
        config = make_run(Path(name))
        run = Path(name) / "runs" / "attacked"
        command = [sys.executable, str(ROOT / "launchers" / "local.py"), "--ranks", "2", str(config)]
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        began = time.monotonic()
        with open(Path(name) / "launcher.log", "wb") as log:
            launcher = subprocess.Popen(command, cwd=name, stdout=log, stderr=log, env=env, start_new_session=True)
        try:
            end, attack = began + 60 * args.minutes, began + args.every_s / 2  # a fault in the middle of each interval
            while time.monotonic() < end and launcher.poll() is None:
                time.sleep(0.2)
                if time.monotonic() >= attack:
                    attack += args.every_s
                    if ranks := ranks_of(launcher.pid):
                        rng.choice(ranks).send_signal(signal.SIGKILL)
                        killed += 1
            wall_s = time.monotonic() - began
            seconds = read_seconds(run)
            if not sum(seconds.values()):
                raise UserError(f"--minutes: got {args.minutes:g}; the run has not started training in that time")
            os.killpg(launcher.pid, signal.SIGKILL)  # its ranks are killed with it
            restarts = (Path(name) / "launcher.log").read_text().count("restarting in ")
        finally:
            with suppress(ProcessLookupError):
                launcher.kill()
            launcher.wait()
    table = Table("cause", "seconds", "share")
    for cause in CAUSES:
        table.add_row(cause, f"{seconds[cause]:,.1f}", f"{seconds[cause] / sum(seconds.values()):.2%}")
    Console(width=80).print(table)
    total = sum(seconds.values())
    print(f"{killed} ranks killed, {restarts} starts again in {wall_s:,.0f} s; "
          f"the ledger has {total:,.1f} s ({total / wall_s:.2%}); goodput {goodput(seconds):.2%}")  # fmt: skip
    return {"killed": killed, "restarts": restarts, "wall_s": wall_s, "seconds": seconds, "goodput": goodput(seconds)}


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The running ranks, found by their process name."""
    found = []
    for process in psutil.Process(launcher).children():
        with suppress(psutil.Error):
            if process.name().startswith("bfsys rank "):
                found.append(process)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=summary_of(__doc__))
    commands = parser.add_subparsers(dest="command", required=True)
    saving = commands.add_parser("saving", help="time that training waits for checkpoints")
    saving.add_argument("--disk-mb-s", type=positive, metavar="MB/S", help="throttle the disk (cgroup v1, root)")
    saving.add_argument("--kernel", type=int, default=32, help="kernel of the tiny model (default: %(default)s)")
    saving.add_argument(
        "--file-bytes", type=at_least(1), default=20_000, help="bytes of each file (default: %(default)s)"
    )
    saving.add_argument("--files", type=at_least(1), default=4, help="files of each step (default: %(default)s)")
    saving.add_argument("--child", choices=("none", "waiting", "beside"), help=argparse.SUPPRESS)
    attacks = commands.add_parser("attacks", help="goodput of a run whose ranks are killed")
    attacks.add_argument("--minutes", type=positive, default=20, help="default: %(default)s")
    attacks.add_argument("--every-s", type=positive, default=120, metavar="S", help="default: %(default)s")
    attacks.add_argument("--seed", type=int, default=0, help="seed of the choice of ranks")
    for command in (saving, attacks):
        command.add_argument("--folder", type=Path, help="folder on the measured disk (default: the temporary folder)")
        command.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file too")
    args = parser.parse_args(arguments)
    if args.command == "saving" and args.child:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            print(json.dumps(train_and_save(args.child, Path(name), args.kernel, args.file_bytes, args.files)))
        sys.stdout.flush()
        os._exit(0)  # for the reason, see dist.hard_exit
    result = bench_saving(args) if args.command == "saving" else bench_attacks(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)

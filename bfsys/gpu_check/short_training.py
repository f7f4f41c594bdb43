"""A short training as users start it: pack data, train a run, resume it from a checkpoint, and compare the bits."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from bfsys.gpu_check.findings import Finding, Verdict

STEPS, HALF = 8, 4
CLASSES, FILES = 2, 24
LIMIT_S = 240

Start = Callable[[Sequence[str]], str]
"""Runs `bfsys ARGUMENT…` to its end; returns "", or why it failed."""


def check(device: torch.device, seconds: float) -> list[Finding]:
    with TemporaryDirectory(prefix="bfsys-training-") as folder:
        return train_twice(Path(folder), device.type == "cuda", start_program)


def start_program(arguments: Sequence[str]) -> str:
    done = subprocess.run([sys.executable, "-m", "bfsys", *arguments], capture_output=True, text=True, timeout=LIMIT_S)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return "" if done.returncode == 0 else f"code {done.returncode}: {lines[-1] if lines else 'no output'}"


def train_twice(folder: Path, on_gpu: bool, start: Start) -> list[Finding]:
    """Train STEPS steps. Then repeat those after step HALF, from a copy without later checkpoints."""
    write_files(folder / "files")
    config = write_config(folder, on_gpu)
    if failed := start(["pack", str(folder / "files"), str(folder / "shards"), "--name", "waves", "--workers", "1"]):
        return [Finding("pack", Verdict.WRONG, failed, "bfsys pack --help")]
    if failed := start(["train", str(config), "name=whole"]):
        return [Finding("training", Verdict.WRONG, failed, "see the other checks first")]
    stop_after(HALF, folder / "runs" / "whole", folder / "runs" / "again")
    if failed := start(["train", str(config), "name=again"]):
        return [Finding("resume", Verdict.WRONG, failed, "see docs/recovery.md")]
    return [judge_losses(folder / "runs" / "whole"), compare_runs(folder / "runs" / "whole", folder / "runs" / "again")]


def stop_after(step: int, run: Path, copy: Path) -> None:
    """Copy the run as if it had been killed after the checkpoint of `step`."""
    shutil.copytree(run, copy, symlinks=True)
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        if int(checkpoint.name.partition("_")[2]) > step:
            shutil.rmtree(checkpoint)
    (copy / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")


def judge_losses(run: Path) -> Finding:
    losses = [line["loss"] for line in _lines(run) if line["kind"] == "train"]
    if losses and all(loss is not None and math.isfinite(loss) for loss in losses):
        return Finding("training", Verdict.OK, f"{STEPS} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return Finding("training", Verdict.WRONG, f"losses: {losses}", "run the check kernels: --only kernels")


def compare_runs(whole: Path, again: Path) -> Finding:
    """Compare the final weights, moments and average, and the losses of all steps."""
    x, y = _hashes(whole), _hashes(again)
    differ = sorted(name for name in x.keys() | y.keys() if x.get(name) != y.get(name))
    losses = [[(line["step"], line["loss"]) for line in _lines(r) if line["kind"] == "train"] for r in (whole, again)]
    if not differ and losses[0] == losses[1]:
        return Finding(
            "resume", Verdict.OK, f"from step {HALF}: {len(x)} files are bit-identical, and the losses are equal"
        )
    detail = f"from step {HALF}: differs in {', '.join(differ) or 'the losses'}"
    advice = (
        "a resumed run differs from an uninterrupted one; an operation may be non-deterministic. Run --only kernels"
    )
    return Finding("resume", Verdict.WRONG, detail, advice)


def _hashes(run: Path) -> dict[str, str]:
    manifest = json.loads((run / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").read_text())
    return {name: file["sha256"] for name, file in manifest["files"].items() if name.endswith(".safetensors")}


def _lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_files(folder: Path) -> None:
    """Write noisy sine waves. The class decides the frequency."""
    rng = np.random.default_rng(0)
    for split, files in (("train", FILES), ("val", 4)):
        for i in range(files):
            label, length = i % CLASSES, int(rng.integers(200, 2000))
            wave = 128 + 60 * np.sin(np.arange(length) * (label + 1) / 9) + rng.normal(0, 12, length)
            path = folder / split / f"class{label}" / f"{i:04}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(wave.clip(0, 255).astype(np.uint8).tobytes())


def write_config(folder: Path, on_gpu: bool) -> Path:
    model = {"dim": 192, "layers": 6, "heads": 3} if on_gpu else {"dim": 32, "layers": 2, "heads": 1}
    config = {
        "data": {"sources": [{"path": str(folder / "shards" / "waves")}], "batch_samples": 8, "lanes": 2},
        "model": {"size": "custom", "kernel": 8, "max_tokens": 600, **model},
        "optim": {"warmup_steps": 2, "clip_norm": 1.0, "ema_decay": 0.9},
        "train": {"steps": STEPS, "log_every": 1, "eval_every": 0, "save_every": HALF, "keep_checkpoints": 9},
        "runs_dir": str(folder / "runs"),
    }
    path = folder / "check.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path

"""Compare a training step of bfsys with one of the published implementation: equal answers, and the time of each."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import numpy as np
import torch

from bfsys.batch import ByteBatch, Sample
from bfsys.gpu_check.findings import Finding, Verdict
from bfsys.gpu_check.training_steps import Step, bfsys_step, published_step, random_files
from bfsys.model.byteformer import ByteFormer
from bfsys.model.flops import flops_per_step, matrix_peak, seconds_of
from bfsys.model.peaks import data_sheet_peak
from bfsys.model.published_form import PublishedForm, load_bfsys_weights, pad
from bfsys.model.sizes import PAD_BYTE, architecture

TIFF_BYTES = 150_668  # size of a picture of 224 x 224 pixels
MOST_FILES = 48  # with tiny these took 13.8 GB in the published implementation and 7.3 GB in bfsys on an H200
BYTES_PER_FILE = 500 * 2**20  # GPU memory for both forms
ANSWERS_AGREE = 1e-3  # largest difference over the largest answer, in float32
LEAST_RATIO = 1.5  # an H200 reached 5.3
LEAST_OF_DATA_SHEET = 0.5  # an H200 reached 0.8 of it with large matrix products


def check(device: torch.device, seconds: float) -> list[Finding]:
    findings = [same_answers(device)]
    if device.type == "cuda":
        findings.append(matrix_products(device))
    return [*findings, speed(device, seconds)]


def same_answers(device: torch.device, make: Callable[..., ByteFormer] = ByteFormer) -> Finding:
    """Compare the logits of both forms in float32, for equal weights and ragged files. Tests pass a wrong model."""
    a = architecture("custom", kernel=8, dim=192, layers=6, heads=3, max_tokens=2000)
    torch.manual_seed(0)
    model = make(a, 5)
    with torch.no_grad():  # with the initial weights, the logits hardly depend on the bytes
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model.stem.embedding[PAD_BYTE] = 0
    published = PublishedForm(a, 5)
    load_bfsys_weights(published, model.state_dict())
    files = random_files([1, 3000, 700, 64, 1290])
    with torch.no_grad():
        given = ByteBatch.from_samples([Sample("", file) for file in files]).to(device)
        answers = model.to(device)(given)
        expected = published.to(device)(pad(files, a).to(device))
    error = float((answers - expected).abs().max() / expected.abs().max())
    if error <= ANSWERS_AGREE:
        detail = f"equal to the published implementation; largest relative difference {error:.1e}"
        return Finding("answers", Verdict.OK, detail)
    detail = f"differ from the published implementation by {error:.1e} of the largest; allowed are {ANSWERS_AGREE:.0e}"
    return Finding("answers", Verdict.WRONG, detail, "do not train here; see which kernel is wrong: --only kernels")


def matrix_products(device: torch.device) -> Finding:
    """Compare the rate of large matrix products with the data sheet."""
    reached, promised = matrix_peak(device, torch.bfloat16), data_sheet_peak(device, torch.bfloat16)
    detail = f"{reached / 1e12:.0f} TFLOP/s in bfloat16"
    if promised is None:
        return Finding("matrix products", Verdict.OK, f"{detail}; no data sheet is known for this GPU")
    detail += f", {reached / promised:.2f} of the data sheet's"
    if reached < LEAST_OF_DATA_SHEET * promised:
        advice = "see nvidia-smi -q -d PERFORMANCE,CLOCK: heat, a power limit, or another process"
        return Finding("matrix products", Verdict.SLOW, detail, advice)
    return Finding("matrix products", Verdict.OK, detail)


def speed(device: torch.device, seconds: float) -> Finding:
    """Time a step of tiny in bfloat16 in both forms. The files fill a GPU; a CPU gets a few small ones."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        files = random_files([TIFF_BYTES] * max(1, min(MOST_FILES, int(0.8 * free / BYTES_PER_FILE))))
        a = architecture("tiny", kernel=32, max_tokens=-(-TIFF_BYTES // 16))
    else:
        files = random_files([9000, 5000, 2000])
        a = architecture("tiny", kernel=16, max_tokens=1200)
    steps: dict[str, Step] = {
        "bfsys": bfsys_step(files, a, 1000, device, bf16=True),
        "published": published_step(files, a, 1000, device, bf16=True, fused_attention=False),
    }
    best, until = dict.fromkeys(steps, float("inf")), time.monotonic() + seconds
    for i in range(12):
        if i >= 3 and time.monotonic() > until:
            break
        for name, step in steps.items():
            took_s = seconds_of(step, device)
            if i:  # the first step compiles
                best[name] = min(best[name], took_s)
    del steps
    gc.collect()
    ratio = best["published"] / best["bfsys"]
    flops = flops_per_step(np.array([len(file) for file in files]), a, 1000).total
    tflops = flops / best["bfsys"] / 1e12
    detail = (
        f"tiny, {len(files)} files: {1e3 * best['bfsys']:.1f} ms, {ratio:.1f} x as fast as the published "
        f"implementation, {tflops:.3g} TFLOP/s"
    )
    if device.type == "cuda" and ratio < LEAST_RATIO:
        return Finding(
            "speed", Verdict.SLOW, detail, "an H200 reached 5.3 x; see the host's load (docs/performance.md)"
        )
    return Finding("speed", Verdict.OK, detail)

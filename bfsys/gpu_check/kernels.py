"""The kernels of bfsys against float64: on a GPU as they run there, on a CPU by Triton's interpreter in small sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch

from bfsys.gpu_check.findings import Finding, Verdict
from bfsys.gpu_check.interpreter import interpreted
from bfsys.gpu_check.kernel_cases import Compared, attention_case, norm_case, positions_case, stem_case
from bfsys.model.attention import kernels_for

Case = tuple[str, str, Callable[[], list[Compared]]]  # the kernel's name, the sizes, what to run

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LIKELY = "the compiler, the driver or the GPU computes wrongly; try another release of PyTorch, then another GPU"


def check(device: torch.device, seconds: float) -> list[Finding]:
    if device.type == "cuda":
        if kernels_for(device, torch.bfloat16) is None:
            why = "they are not for this GPU, or PyTorch comes without Triton"
            return [Finding("all kernels", Verdict.SKIPPED, why, "training uses PyTorch's own operations")]
        from bfsys.model import kernels, norm_kernels

        return compare_all(kernels, norm_kernels, device, seconds)
    try:
        with interpreted("kernels", "norm_kernels") as (kernels_here, norms_here):
            return compare_all(kernels_here, norms_here, device, seconds)
    except ImportError:
        return [Finding("all kernels", Verdict.SKIPPED, "Triton is not installed; a CPU does not need it")]


def compare_all(kernels: ModuleType, norms: ModuleType, device: torch.device, seconds: float) -> list[Finding]:
    """Compare the cases for about `seconds`, and at least one case of each kernel."""
    until, left_out = time.monotonic() + seconds, 0
    done: dict[str, tuple[list[str], list[str], list[float]]] = {}  # by name: sizes, wrong results, errors
    for name, sizes, run in cases(kernels, norms, device):
        compared, wrong, worst = done.setdefault(name, ([], [], []))
        if compared and time.monotonic() > until:
            left_out += 1
            continue
        results = run()
        compared.append(sizes)
        wrong += [f"{r.what} ({sizes}): {r.error:.2g}, allowed {r.allowed:.2g}" for r in results if not r.is_right]
        worst += [r.error / r.allowed for r in results if r.allowed]
    by = "" if device.type == "cuda" else " (interpreted)"
    findings = [
        Finding(name + by, Verdict.WRONG, f"{len(wrong)} wrong results; {wrong[0]}", LIKELY)
        if wrong
        else Finding(name + by, Verdict.OK, f"{len(compared)} cases, largest error {max(worst):.2f} of what is allowed")
        for name, (compared, wrong, worst) in done.items()
    ]
    if left_out:
        findings.append(Finding("other sizes", Verdict.SKIPPED, f"{left_out} cases: no time", "give more --seconds"))
    return findings


def cases(kernels: ModuleType, norms: ModuleType, device: torch.device) -> Iterator[Case]:
    """Yield the published sizes on a GPU, and small ones for the interpreter. The most important come first."""
    on_gpu = device.type == "cuda"
    longest = 2500 if on_gpu else 150
    attentions = [(128, 192, 3), (100, 48, 1)] if on_gpu else [(16, 32, 1)]
    stems = [(32, 192, 64), (8, 192, 64)] if on_gpu else [(4, 48, 4)]
    rows = [(192, 70_001), (768, 29)] if on_gpu else [(24, 61)]
    if on_gpu:
        attentions += [(128, 384, 6), (128, 768, 12), (128, 1280, 20), (32, 192, 3), (5, 96, 3)]
        stems += [(16, 192, 64), (32, 768, 64), (4, 48, 4), (2, 24, 1)]
        rows += [(384, 7001), (768, 7001), (1280, 7001)]
    segments = 40 if on_gpu else 3
    for short, dtype in DTYPES.items():
        on = partial(partial, device=device, dtype=dtype)  # a case, on this device and in this type
        for width, dim, heads in attentions:
            sizes = f"{short}, {dim} channels, {heads} heads, windows of {width}"
            yield "attention", sizes, on(attention_case, kernels, width=width, dim=dim, heads=heads, segments=segments)
        for kernel, dim, alignment in stems:
            sizes = f"{short}, {dim} channels, kernel {kernel}"
            yield (
                "stem",
                sizes,
                on(stem_case, kernels, kernel=kernel, dim=dim, alignment=alignment, longest=longest, tail=True),
            )
        for dim in (48, 192) if on_gpu else (24,):
            yield "positions", f"{short}, {dim} channels", on(positions_case, kernels, dim=dim, rows=40)
        for dim, count in rows:
            sizes = f"{short}, {count} rows of {dim} channels"
            yield "addition and norm", sizes, on(norm_case, norms, weight_dtype=dtype, dim=dim, rows=count, adds=True)

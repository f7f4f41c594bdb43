"""The machine: driver, PyTorch, memory, and what Triton needs to compile."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

import torch

from bfsys.files import exists
from bfsys.gpu_check.findings import Finding, Verdict
from bfsys.model.peaks import data_sheet_peak

OLDEST_CAPABILITY = (8, 0)  # oldest GPUs that the kernels support
FREE_SHARE = 0.9  # share of a GPU's memory; less means that another process uses it
COMPILE_S = 60


def check(device: torch.device, seconds: float) -> list[Finding]:
    findings = [_versions(), _gpu(device)]
    if device.type == "cuda":
        findings.append(_memory(device))
    return [*findings, _compiler(device), _kernel_cache(), _deepspeed()]


def _versions() -> Finding:
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    detail = f"Python {platform.python_version()}, torch {torch.__version__} for {built_for}"
    try:
        detail += f", Triton {metadata.version('triton')}"
    except metadata.PackageNotFoundError:
        detail += ", no Triton"
    return Finding("versions", Verdict.OK, detail)


def _gpu(device: torch.device) -> Finding:
    if device.type != "cuda":
        if os.environ.get("DS_ACCELERATOR") == "cpu":
            return Finding("GPU", Verdict.SKIPPED, "DS_ACCELERATOR=cpu selects the CPU", "unset it")
        if not (exists(Path("/dev/nvidia0")) or exists(Path("/dev/nvidiactl"))):
            return Finding("GPU", Verdict.SKIPPED, "this machine has none (no /dev/nvidia*)")
        advice = "nvidia-smi shows the driver; install the PyTorch that is built for it (pytorch.org)"
        return Finding("GPU", Verdict.WRONG, "the machine has an NVIDIA GPU, but PyTorch finds none", advice)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    detail = f"{name}, sm_{capability[0]}{capability[1]}, driver {_driver()}"
    torch.ones(1, device=device).add_(1).item()  # raises, which ends the check, if PyTorch was not built for this GPU
    if capability < OLDEST_CAPABILITY:
        advice = "training uses PyTorch's operations instead of bfsys's kernels, and this GPU has no bfloat16 units"
        return Finding("GPU", Verdict.SLOW, detail, advice)
    if data_sheet_peak(device, torch.bfloat16) is None:
        return Finding("GPU", Verdict.OK, f"{detail}; it is not in model/peaks.py, so runs log no mfu")
    return Finding("GPU", Verdict.OK, detail)


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown (nvidia-smi does not answer)"


def _memory(device: torch.device) -> Finding:
    free, total = torch.cuda.mem_get_info(device)
    detail = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
    if free < FREE_SHARE * total:
        return Finding("memory", Verdict.SLOW, detail, "another process uses this GPU: see nvidia-smi")
    return Finding("memory", Verdict.OK, detail)


def _compiler(device: torch.device) -> Finding:
    """Check the C compiler: Triton builds a small C library against Python.h for each kernel."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    # Without our kernels nothing is compiled.
    missing = Verdict.WRONG if device.type == "cuda" else Verdict.SKIPPED
    if not compiler:
        return Finding("C compiler", missing, "not found; Triton needs one", "install gcc, or set CC to a C compiler")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "try.c").write_text("#include <Python.h>\nint answer(void) { return 0; }\n")
        command = [compiler, "-shared", "-fPIC", f"-I{sysconfig.get_paths()['include']}", "try.c", "-o", "try.so"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=COMPILE_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Finding(
                "C compiler", missing, f"{compiler} cannot be run: {error}", "install gcc, or set CC to a C compiler"
            )
    if done.returncode:
        says = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        advice = "install Python's headers (python3-dev, python3-devel), or use a Python that includes them"
        return Finding("C compiler", missing, f"{compiler}: {says}", advice)
    return Finding("C compiler", Verdict.OK, f"{compiler}, with Python.h")


def _kernel_cache() -> Finding:
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        advice = "set TRITON_CACHE_DIR, best to a local disk"
        return Finding("kernel cache", Verdict.WRONG, f"{folder}: {error.strerror}", advice)
    return Finding("kernel cache", Verdict.OK, f"{folder} can be written")


def _deepspeed() -> Finding:
    try:
        return Finding("DeepSpeed", Verdict.OK, metadata.version("deepspeed"))
    except metadata.PackageNotFoundError:
        return Finding("DeepSpeed", Verdict.WRONG, "not installed; training needs it", "pip install 'bfsys[train]'")

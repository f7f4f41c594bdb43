"""Run each check in a separate process, so that its crash, its hang or its changes to the GPU do not affect the others.

Rejected alternative: forked processes, which cannot use CUDA after their parent has listed its devices.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from bfsys.gpu_check.checks import CHECKS
from bfsys.gpu_check.findings import Finding, Verdict
from bfsys.process import end_of
from bfsys.ranks import Ranks, ranks_from_environment

LEAST_S = 10  # with less time left, a check is skipped: Python, PyTorch and CUDA take as long to start
# Variables that make a process a rank. SLURM's go too: srun sets dozens, and one of them left over would make a check a
# task of the step again.
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
PREFIXES_OF_LAUNCHERS = ("SLURM_", "TORCHELASTIC_")


def run_checks(
    names: Sequence[str], seconds: float, ranks: Ranks, say: Callable[[str, list[Finding]], None]
) -> dict[str, list[Finding]]:
    """Run checks one after the other, `seconds` in total. Each result is passed to `say` at once."""
    until = time.monotonic() + seconds
    results: dict[str, list[Finding]] = {}
    for name in names:
        check, left = CHECKS[name], until - time.monotonic()
        if left < LEAST_S:
            more = "give more --seconds, or this check alone with --only"
            results[name] = [Finding("whole check", Verdict.SKIPPED, "no time was left", more)]
        else:
            variables = dict(os.environ) if check.is_collective else variables_of_one(os.environ, ranks)
            with TemporaryDirectory(prefix="bfsys-check-", ignore_cleanup_errors=True) as folder:
                child = start(name, check.share * seconds, Path(folder), variables)
                results[name] = finish(
                    name, child, Path(folder), min(left, check.limit_s), is_cut_short=left < check.limit_s
                )
        say(name, results[name])
    return results


def variables_of_one(env: Mapping[str, str], ranks: Ranks) -> dict[str, str]:
    """Return the environment of a check that a rank runs alone, on its own GPU."""
    variables = {
        name: value
        for name, value in env.items()
        if name not in OF_LAUNCHERS and not name.startswith(PREFIXES_OF_LAUNCHERS)
    }
    if ranks.world_size > 1 and ranks.device.type == "cuda":
        visible = [device for device in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
        index = ranks.device.index or 0
        variables["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
    return variables


def start(
    name: str, seconds: float, folder: Path, variables: Mapping[str, str], *, is_part: bool = False
) -> subprocess.Popen:
    """Start a check, which writes its findings, its output and its temporary files to `folder`, because a check that is
    killed cannot remove them. With `is_part`, it stays in the process group of this process and is killed with it."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), variables.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "bfsys.gpu_check.processes", name, str(seconds), str(folder / "findings.json")]
    env = {**variables, "PYTHONPATH": path, "TMPDIR": str(folder)}
    with open(folder / "output", "wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=not is_part)


def finish(
    name: str, child: subprocess.Popen, folder: Path, limit_s: float, *, is_cut_short: bool = False
) -> list[Finding]:
    """Wait up to `limit_s` for a started check, and return its findings. A check that has not ended counts as hung, or
    as skipped if `is_cut_short`: its limit is shorter than usual."""
    try:
        code = child.wait(limit_s)
    except subprocess.TimeoutExpired:
        if is_cut_short:
            said = f"stopped after {limit_s:.0f} s, because the time was used up"
            return [Finding("whole check", Verdict.SKIPPED, said, "give more --seconds")]
        return [Finding("whole check", Verdict.WRONG, f"it hung: it did not end within {limit_s:.0f} s", _hint(name))]
    finally:  # kill the check and the processes that it started
        with suppress(ProcessLookupError):  # a part of a check has no group of its own
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.wait()
    if code == 0:
        findings = json.loads((folder / "findings.json").read_text())
        return [Finding(**{**finding, "verdict": Verdict(finding["verdict"])}) for finding in findings]
    lines = (folder / "output").read_text(errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return [Finding("whole check", Verdict.WRONG, f"it {end_of(code)}: {last}", _hint(name))]


def _hint(name: str) -> str:
    return "NCCL_DEBUG=INFO in the environment says more" if name == "all-reduce" else f"run it alone: --only {name}"


def main(name: str, seconds: str, out: str) -> None:
    """Run a check in this process, and write its findings to `out`."""
    module = importlib.import_module(f"bfsys.gpu_check.{CHECKS[name].module}")
    findings = module.check(ranks_from_environment().device, float(seconds))
    Path(out).write_text(json.dumps([asdict(finding) for finding in findings]))


if __name__ == "__main__":
    main(*sys.argv[1:])

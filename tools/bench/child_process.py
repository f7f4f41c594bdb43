"""One measurement in a separate process, which leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


def result_of_child(command: Sequence[str], result: Path, limit_s: float, env: Mapping[str, str] | None = None) -> dict:
    """Run a command that writes a JSON object to the file `result`. Returns the object, or {"problem": …}.

    The command gets a new process group, which is killed at its end. Its output goes into a file beside `result`.
    """
    errors = result.with_name("errors")
    with open(errors, "wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)
    try:
        code = child.wait(limit_s)
    except subprocess.TimeoutExpired:
        return {"problem": f"no end after {limit_s} s"}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if code == 0:
        return json.loads(result.read_text())
    lines = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
    return {"problem": lines[-1] if lines else f"ended with code {code}"}

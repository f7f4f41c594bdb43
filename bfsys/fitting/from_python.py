"""`bfsys.fit`: the command `bfsys fit` for programs and notebooks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bfsys.errors import EXIT_USER_ERROR, UserError


def fit(
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    minutes: float = 10.0,
    as_stored: bool = False,
    skip_bad: bool = False,
    runs: str | os.PathLike[str] = "runs",
    shards: str | os.PathLike[str] = "data/shards",
) -> Path:
    """Train and evaluate a model on a folder with a folder of files per class: the directory of the run, for `load`.

    It is the command `bfsys fit`, in a process of its own, whose output is printed: training forks, and this process
    may hold threads and a GPU. The same call resumes after a stop, and does not train again what is trained.

    name       name of the run; by default that of the folder
    minutes    time for all of it
    as_stored  never decode and encode the files
    skip_bad   leave out files that cannot be used, instead of naming them in an error
    runs       folder of runs, in which NAME.yaml and NAME are written
    shards     folder of packed data

    Raises UserError for what the command refuses, and if training ends early.
    """
    arguments = ["--minutes", str(minutes), "--runs", os.fspath(runs), "--shards", os.fspath(shards)]
    arguments += ["--name", name] if name is not None else []
    arguments += ["--as-stored"] if as_stored else []
    arguments += ["--skip-bad"] if skip_bad else []
    command = [sys.executable, "-m", "bfsys", "fit", *arguments, "--", os.fspath(folder)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None  # it is a PIPE
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
            code = process.wait()
        finally:
            process.terminate()  # it saves a checkpoint first
            process.wait()
        errors.seek(0)
        said = [line.removeprefix("error: ") for line in errors.read().splitlines()]
    if code == EXIT_USER_ERROR:
        raise UserError(*said)
    print("\n".join(said), end="\n" if said else "", file=sys.stderr)
    if code:
        raise UserError(f"training ended with code {code}, see above; the same call resumes from its last checkpoint")
    from bfsys.fitting.fit import name_for

    return Path(runs) / (name or name_for(Path(folder)))

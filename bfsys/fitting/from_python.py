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
    """Train and evaluate a model on a folder of files, as `bfsys fit` accepts it. Returns the run directory for `load`.

    It runs `bfsys fit` in a separate process and prints its output, because training forks, and this process may hold
    threads and a GPU. The same call resumes after a stop. A finished training is not repeated.

    folder     a folder with a folder of files per class, a list of files, or a packed dataset
    name       name of the run; by default the name of the folder
    minutes    time for the whole call
    as_stored  never re-encode the files
    skip_bad   leave out files that cannot be used, instead of raising an error that names them
    runs       folder of runs; NAME.yaml and NAME are written there
    shards     folder of packed data

    Raises UserError if the command reports bad input, and if training ends early.
    """
    if not isinstance(folder, str | os.PathLike):
        raise UserError(f"the folder: got {type(folder).__name__}; a path is allowed")
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
            process.terminate()  # it saves a checkpoint before it ends
            process.wait()
        errors.seek(0)
        said = [line.removeprefix("error: ") for line in errors.read().splitlines()]
    if code == EXIT_USER_ERROR:
        raise UserError(*said)
    print("\n".join(said), end="\n" if said else "", file=sys.stderr)
    if code:
        raise UserError(f"training ended with code {code}, see above; the same call resumes from its last checkpoint")
    from bfsys.fitting.request import name_for

    return Path(runs) / (name or name_for(Path(folder)))

"""The commit of bfsys that is running."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

FILE = "git-state.txt"  # in copies of the code, which launchers make
# Variables that select a repository, as hooks of git have them. It may be another one than that of this code.
OF_A_REPOSITORY = {"GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX"}


@cache  # the three git processes take as long as a small checkpoint
def git_state() -> str | None:
    """The commit of this code at the first call, with a + if files were changed since; None outside a repository."""
    here = Path(__file__).resolve().parents[1]
    with suppress(OSError):
        return (here / FILE).read_text() or None

    env = {name: value for name, value in os.environ.items() if name not in OF_A_REPOSITORY}

    def git(*arguments: str) -> str:
        return subprocess.run(
            # Another user may own the repository, whose code is running already.
            # Without the lock that `git status` takes to refresh its index: a killed process would leave it behind.
            ["git", "--no-optional-locks", "-c", f"safe.directory={here}", "-C", str(here), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            env=env,
            check=True,
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None

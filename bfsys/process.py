"""The process of a command: limits and environment that libraries expect, wherever it runs."""

from __future__ import annotations

import os
import pwd
import resource
from contextlib import suppress


def prepare() -> None:
    """Raise the limit of open files as far as this user may, and give a user without a passwd entry a name.

    Containers run under such users (`docker run --user 12345`, OpenShift). PyTorch asks for the user's name when it is
    imported, and fails where there is none.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # some systems promise more than they allow
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = f"uid-{os.getuid()}"


def open_files_limit() -> int:
    """How many files this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

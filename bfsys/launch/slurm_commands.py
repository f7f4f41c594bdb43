"""SLURM's own commands, and what they say.

A controller may be away for a while, so no command is waited for without a limit, and one that fails is an answer, too.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

LIMIT_S = 60.0


class Answer(NamedTuple):
    output: str
    errors: str
    code: int | None
    """The exit code; None if the command is missing, or did not end in time."""

    @property
    def is_good(self) -> bool:
        return self.code == 0


def ask(*command: str, env: Mapping[str, str] | None = None) -> Answer:
    """Run a command of SLURM, by default in the environment of this process."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=env)
    except subprocess.TimeoutExpired:
        return Answer("", f"no answer within {LIMIT_S:g} s", None)
    except OSError as error:
        return Answer("", str(error), None)
    return Answer(ended.stdout, ended.stderr, ended.returncode)


def fields_of(line: str) -> dict[str, str]:
    """The fields of a line `NAME=VALUE NAME=VALUE …` of scontrol. A value may contain spaces, such as a path."""
    return dict(re.findall(r"(\S+?)=(.*?)(?=\s+[A-Za-z][\w:/]*=|\s*$)", line))

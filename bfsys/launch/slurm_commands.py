"""SLURM's own commands, and how their output is read.

A controller may be unavailable for a while. Every command therefore has a time limit, and a failed command is a result,
not an exception.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

# Options of sbatch, which `bfsys slurm` passes on.
AS_OF_SBATCH = ("partition", "account", "qos", "constraint", "reservation", "exclude", "dependency", "comment")
LIMIT_S = 60.0
IS_IT_UP = "is the controller up? See sinfo"
# Errors of SLURM's commands if the controller is unavailable. It may still have executed the request.
_UNREACHED = re.compile(
    r"timed out|unable to contact|connect failure|unexpected message|zero bytes|connection refused|communication",
    re.IGNORECASE,
)
# A user's variables that leave out jobs or partitions, or change the form of times.
_OF_USERS = re.compile(r"SQUEUE_|SINFO_|SACCT_|SLURM_TIME_FORMAT$")
# The variables that lead SLURM's commands to a cluster. The other variables SLURM_… in a job are those of that job.
_OF_THE_CLUSTER = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}


class Answer(NamedTuple):
    output: str
    errors: str
    code: int | None
    """The exit code; None if the command is missing, or did not end in time."""

    @property
    def is_good(self) -> bool:
        return self.code == 0

    @property
    def is_none(self) -> bool:
        """Whether the controller did not answer."""
        return self.code is None or (self.code != 0 and is_unreached(self.errors))


def is_unreached(errors: str) -> bool:
    return _UNREACHED.search(errors) is not None


def outside_a_job(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for a new job, which would take the number of tasks of the job in which this process runs."""
    return {name: value for name, value in env.items() if name in _OF_THE_CLUSTER or not name.startswith("SLURM_")}


def ask(*command: str, env: Mapping[str, str] | None = None, limit_s: float | None = None) -> Answer:
    """Run a SLURM command, by default in the environment of this process and for at most LIMIT_S."""
    limit_s = LIMIT_S if limit_s is None else limit_s
    variables = os.environ if env is None else env
    try:
        ended = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",
            timeout=limit_s,
            env={name: value for name, value in variables.items() if not _OF_USERS.match(name)},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer("", f"no answer within {limit_s:g} s", None)
    except OSError as error:
        return Answer("", str(error), None)
    return Answer(ended.stdout, ended.stderr, ended.returncode)


def fields_of(line: str) -> dict[str, str]:
    """Parse a line `NAME=VALUE NAME=VALUE …` of scontrol. Values, such as paths, may contain spaces."""
    return dict(re.findall(r"(\S+?)=(.*?)(?=\s+[A-Za-z][\w:/]*=|\s*$)", line))

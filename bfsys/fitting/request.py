"""What a user asks of `bfsys fit`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

LONGEST_NAME = 100  # of a run; file systems allow names of 255 bytes


@dataclass(frozen=True)
class Request:
    """The arguments of `bfsys fit`."""

    folder: Path
    name: str
    minutes: float
    as_stored: bool
    skip_bad: bool
    shards: Path
    runs: Path

    @property
    def config_file(self) -> Path:
        return self.runs / f"{self.name}.yaml"

    @property
    def run_dir(self) -> Path:
        return self.runs / self.name

    def record(self) -> dict:
        return {"folder": str(self.folder.absolute()), "minutes": self.minutes, "as_stored": self.as_stored}


def name_for(folder: Path) -> str:
    """Derive the name of a run from the name of its folder. Names of files contain it, so a long one is cut."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", folder.absolute().name)[:LONGEST_NAME].strip("._-") or "fit"

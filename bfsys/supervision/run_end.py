"""The end of a run, recorded for users and launchers in ended.json in its directory."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

from bfsys.files import is_dir, read_regular, replace_file
from bfsys.json_lines import parse_json_object

FILE = "ended.json"


def note_end(run_dir: Path, exit_code: int, reason: str) -> None:
    """Record how a run ended. Errors are ignored: if the disk is full, the caller's error says so."""
    note = {"exit_code": exit_code, "reason": reason, "time": time.strftime("%F %T %z")}
    with suppress(OSError):
        if is_dir(run_dir):
            replace_file(run_dir / FILE, json.dumps(note, indent=1) + "\n", durable=False)


def forget_end(run_dir: Path) -> None:
    """Delete the record, because the run resumes."""
    (run_dir / FILE).unlink(missing_ok=True)


def how_it_ended(run_dir: Path) -> dict | None:
    """Return {"exit_code", "reason", "time"} of a run that has ended, else None; also None for a damaged record."""
    with suppress(OSError):
        return parse_json_object(read_regular(run_dir / FILE), {"exit_code": int, "reason": str, "time": str})
    return None

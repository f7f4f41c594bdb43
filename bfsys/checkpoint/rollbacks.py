"""The roll-backs of a run: rollbacks.json in its directory, and which checkpoints they invalidated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from bfsys.errors import UserError, code_of
from bfsys.files import read_regular

FILE = "rollbacks.json"


def read_rollbacks(run_dir: Path) -> list[dict]:
    """The roll-backs of a run, the oldest first. Raises UserError if the file is damaged."""
    path = run_dir / FILE
    try:
        rollbacks = json.loads(read_regular(path))
        if not all(r["to"] < min(r["steps"]) and r["updates"] >= 0 for r in rollbacks):
            raise ValueError("its steps contradict each other")
        return rollbacks
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", exit_code=code_of(error)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); restore it from a copy ({run_dir}/checkpoints/step_…/{FILE}, in "
            "checkpoints saved since its last roll-back), or delete it to train on its steps again"
        ) from None


def was_rolled_back(manifest: Mapping, rollbacks: Sequence[Mapping]) -> bool:
    """Whether a checkpoint has updates of steps that a roll-back has undone since.

    A copy in an object store may be such a checkpoint. One that was saved after the roll-back has fewer updates at the
    same step, because the bad steps were skipped.
    """
    step = manifest["step"]
    skipped = {number for rollback in rollbacks for number in rollback["steps"]}
    return any(
        manifest["updates"] > rollback["updates"] + sum(s not in skipped for s in range(rollback["to"] + 1, step + 1))
        for rollback in rollbacks
        if rollback["to"] < step <= max(rollback["steps"])
    )


def is_after_bad_steps(manifest: dict) -> bool:
    """Whether the run may have to roll back further than this checkpoint."""
    return bool((manifest.get("guard") or {}).get("in_a_row"))

"""The findings of a check, with advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    OK = "ok"
    SLOW = "slow"
    WRONG = "wrong"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    what: str
    verdict: Verdict
    detail: str
    """Figures, or the reason."""
    advice: str = ""
    """What to do."""


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 if a finding is wrong, else 0. Slow and skipped findings do not count."""
    return int(any(finding.verdict == Verdict.WRONG for finding in findings))

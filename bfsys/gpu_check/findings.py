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
    """The advice: what to do."""


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if something is wrong; what is slow or skipped does not count."""
    return int(any(finding.verdict == Verdict.WRONG for finding in findings))

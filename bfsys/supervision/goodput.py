"""How the wall time of a run was spent, over all of its starts: productive, or lost to one of several causes.

    goodput.jsonl in the run directory has a line per event: a start (with the step that it resumes from), the start of
    the first step, and records of how many steps are done and how long they waited for data and for saving

Events are only appended. Every second between the first start and now belongs to one cause, so the causes always add up
to the wall time. A process reads the wall clock once and measures from there, so setting the clock makes no duration
wrong. If the clock was set back between two starts, no time is counted between them.

    restart     from the last record of a process to the first step of the next one, also before the very first step
    lost        recorded steps that were repeated, because the checkpoint of a later start did not contain them
    stall       waiting for a checkpoint: the copy to host memory, a slow writer, the commit
    data_wait   waiting for data
    productive  the rest: steps that count, and evaluations

Rejected alternative: sums that checkpoints carry, because they would not include what happened after the last one.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import psutil

from bfsys.files import exists, read_regular
from bfsys.json_lines import NUMBER, read_json_lines

FILE = "goodput.jsonl"
STARTED = "BFSYS_STARTED"  # start of the launcher in seconds since 1970, so that its imports count
FIELDS = {"start": ("step",), "note": ("step", "stall_s", "wait_s")}  # numbers of an event, besides its time
CAUSES = ("productive", "lost", "restart", "stall", "data_wait")


@dataclass
class _Attempt:
    """A process, or the part of it between two roll-backs."""

    idle_since: float  # the end of the attempt before it; of the first attempt, its start
    start: float
    step: int  # the step that it resumes from
    notes: list[tuple[float, int, float, float]] = field(default_factory=list)  # (time, step, stall_s, wait_s)
    began: float | None = None  # time of its first step

    @property
    def end(self) -> float:
        return max([self.start, self.began or 0.0, *(note[0] for note in self.notes[-1:])])


class Ledger:
    """The record of a run's time. Rank 0 writes it; other ranks only measure."""

    def __init__(self, run_dir: Path, is_rank_zero: bool) -> None:
        """Call once the run directory exists."""
        self.stall_s = self.wait_s = 0.0
        self._file: TextIO | None = None
        self._attempts: list[_Attempt] = []
        self._clock_offset_s = time.time() - time.monotonic()
        # The launcher's imports count as part of the first start.
        self._start = float(os.environ.get(STARTED) or psutil.Process().create_time())
        if is_rank_zero:
            path = run_dir / FILE
            torn = exists(path) and not read_regular(path).endswith(b"\n")
            for event in _events(path):
                self._take(event)
            self._clock_offset_s += max(0.0, self._latest - self._now())
            self._file = open(path, "a")  # noqa: SIM115 (until `close`)
            if torn:
                self._file.write("\n")

    def resumed(self, step: int) -> None:
        """The process resumes from `step`, or rolls back to it."""
        self._add({"event": "start", "time": self._start, "step": step})
        self._start = self._now()  # the start of the next attempt, if this process rolls back

    def first_step_begins(self) -> None:
        self.stall_s = self.wait_s = 0.0
        self._add({"event": "begin", "time": self._now()})

    def record_progress(self, step: int) -> None:
        """Record that `step` steps are done. Call it for every checkpoint, before the waits for that checkpoint."""
        self._start = self._now()
        self._add({"event": "note", "time": self._start, "step": step, "stall_s": self.stall_s, "wait_s": self.wait_s})

    @contextmanager
    def stalled(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.stall_s += time.perf_counter() - began

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.wait_s += time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        """Seconds by cause, until the latest event."""
        total = dict.fromkeys(CAUSES, 0.0)
        resumed_from = math.inf  # the smallest step from which a later attempt resumes
        for attempt in reversed(self._attempts):
            _account(total, attempt, resumed_from)
            resumed_from = min(resumed_from, attempt.step)
        return total

    def close(self) -> None:
        if self._file:
            with suppress(OSError):  # the disk may be full
                self._file.close()

    def _now(self) -> float:
        """Seconds since 1970."""
        return time.monotonic() + self._clock_offset_s

    @property
    def _latest(self) -> float:
        return self._attempts[-1].end if self._attempts else 0.0

    def _add(self, event: dict) -> None:
        if self._file:
            self._take(event)
            with suppress(OSError):  # on a full disk metrics fail too, and end the run
                self._file.write(json.dumps(event) + "\n")
                self._file.flush()

    def _take(self, event: dict) -> None:
        now = max(event["time"], self._latest)
        if event["event"] == "start":
            self._attempts.append(_Attempt(self._latest if self._attempts else now, now, event["step"]))
        elif self._attempts and event["event"] == "begin":
            self._attempts[-1].began = now
        elif self._attempts and event["event"] == "note":
            self._attempts[-1].notes.append((now, event["step"], event["stall_s"], event["wait_s"]))


def read_seconds(run_dir: Path) -> dict[str, float]:
    """Seconds by cause of a run directory, until its latest event."""
    ledger = Ledger(run_dir, is_rank_zero=False)
    for event in _events(run_dir / FILE):
        ledger._take(event)
    return ledger.seconds()


def count_starts(run_dir: Path) -> int:
    """Count the starts and roll-backs of a run."""
    return sum(event["event"] == "start" for event in _events(run_dir / FILE))


def goodput(seconds: dict[str, float]) -> float:
    return seconds["productive"] / max(1e-9, sum(seconds.values()))


def _account(total: dict[str, float], attempt: _Attempt, resumed_from: float) -> None:
    """Add an attempt's seconds to the causes. Later attempts repeat the steps after `resumed_from`."""
    began = attempt.end if attempt.began is None else attempt.began
    total["restart"] += began - attempt.idle_since
    kept = (note for note in reversed(attempt.notes) if note[1] <= resumed_from)
    last = next(kept, (began, attempt.step, 0.0, 0.0))
    total["stall"] += last[2]
    total["data_wait"] += last[3]
    total["productive"] += last[0] - began - last[2] - last[3]
    total["lost"] += attempt.end - last[0]


def _events(path: Path) -> Iterator[dict]:
    for event in read_json_lines(path, {"event": str, "time": NUMBER}):
        if all(isinstance(event.get(name), NUMBER) for name in FIELDS.get(event["event"], ())):
            yield event

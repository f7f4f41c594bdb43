"""The hang watchdog: it ends a run that makes no progress, and names the rank at fault.

A thread on every rank watches the progress that its training loop reports (`beat`). If no beat comes within the limit,
which is learned from the intervals so far, the thread makes a folder in the run directory (an incident). The watchdog
of another rank looks for this folder twice a second, but only when it has itself waited for half of the shortest limit.
A healthy run therefore makes no requests to the file server. Each watchdog writes all its Python stacks and its
progress there. A rank that writes nothing is stopped or gone, and is named; otherwise the rank with the least progress
is named. Then all ranks end with EXIT_HUNG, after which launchers restart the run. On GPUs, kernels are queued and all
ranks reach the same place in the code, so each rank also writes NCCL's flight recorder: the rank whose collectives have
the lowest numbers is at fault.

Ranks wait for each other in every step, so if one hangs, all hang within one step. Rejected alternatives: heartbeats
over the network or through files, which cost something in a healthy run; and the timeout of the collectives alone,
which names neither the rank nor the place.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bfsys import dist
from bfsys.errors import EXIT_HUNG
from bfsys.supervision.run_end import note_end

TICK_S = 0.5
LEAST_S = 60.0  # learned limits are not shorter
RECOMPILING_S = 300.0  # nor are they shorter than this, if a step may recompile the model
FACTOR = 10.0  # a learned limit is this multiple of the longest interval so far
GRACE_S = 3.0  # wait for the other ranks' stacks; ranks check every TICK_S
HANGS = "hangs"


def least_limit_s(patience_s: float, *, is_remote: bool, is_compiled: bool) -> float:
    """The shortest limit that may be learned, in seconds.

    A shard may arrive slowly over a network, and its server may be unavailable for a while. A compiled model is
    compiled again, for minutes, if a batch has sizes of another kind.
    """
    if is_compiled:
        return max(patience_s, RECOMPILING_S)
    return patience_s if is_remote else LEAST_S


class Watchdog:
    """Watches from its construction to `close`. It begins with the long limit: see `be_patient`."""

    def __init__(
        self, run_dir: Path, ranks: dist.Ranks, *, limit_s: float, patience_s: float, least_s: float = LEAST_S
    ) -> None:
        """A hang is `limit_s` without a beat. If `limit_s` is 0, the limit is learned, and at least `least_s`.
        `patience_s` is the limit until durations are known."""
        self._run_dir, self._ranks = run_dir, ranks
        self._limit_s, self._patience_s, self._least_s = limit_s, patience_s, least_s
        self._incident = run_dir / HANGS / dist.broadcast_from_rank0(f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        self._where, self._beats, self._longest_s = "start", 0, 0.0
        self._is_patient = True
        self._last = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, where: str) -> None:
        """Report progress. `where` says what comes next. All ranks report the same in the same order."""
        now = time.monotonic()
        if not self._is_patient:
            self._longest_s = max(self._longest_s, now - self._last)
        self._last, self._where = now, where
        self._beats += 1

    def be_patient(self, where: str) -> None:
        """Use the long limit until `times_are_known`: after a start or a roll-back."""
        self._is_patient = True
        self.beat(where)

    def times_are_known(self) -> None:
        """Start to learn how long steps take."""
        self._last = time.monotonic()
        self._is_patient = False

    @contextmanager
    def patient(self, where: str) -> Iterator[None]:
        """Allow a long operation (an evaluation, a save), from which no limit is learned."""
        before, self._is_patient = self._is_patient, True
        self.beat(where)
        try:
            yield
        finally:
            self.beat("after " + where)
            self._is_patient = before

    @property
    def limit_s(self) -> float:
        if self._is_patient:
            return max(self._patience_s, self._limit_s)
        return self._limit_s or max(self._least_s, FACTOR * self._longest_s)

    def close(self) -> None:
        """Stop watching. Does not return after a hang was found, because the process is about to end."""
        self._closing.set()
        self._thread.join()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._closing.wait(TICK_S):
            now = time.monotonic()
            if now - looked > 10 * TICK_S:  # this process was suspended: that time does not count
                self._last += now - looked
            looked = now
            waited_s, limit_s = now - self._last, self.limit_s
            of_others_s = min(limit_s, self._limit_s or self._least_s)  # the shortest limit that another rank may have
            if waited_s > limit_s or (waited_s > of_others_s / 2 and self._others_found_a_hang()):
                self._end(waited_s)
            looked = max(looked, time.monotonic() - TICK_S)  # a slow file system does not count as a suspension

    def _others_found_a_hang(self) -> bool:
        try:  # list the parent: network file systems cache for long that a folder does not exist
            return self._incident.name in os.listdir(self._incident.parent)
        except OSError:
            return False

    def _end(self, waited_s: float) -> None:
        """Write the state of this rank, name the rank at fault, and end the process."""
        try:
            # If the file system or the console hangs too, this ends the process.
            threading.Timer(10 * GRACE_S, os._exit, [EXIT_HUNG]).start()
            what = f"no progress for {waited_s:.0f} s; the last report was {self._where!r}"
            print(f"error: rank {self._ranks.rank}: {what}", file=sys.stderr, flush=True)
            self._incident.mkdir(parents=True, exist_ok=True)
            self._write_stacks(waited_s)
            try:
                self._write_flight_record()
            except Exception as error:  # the verdict is more important
                print(f"error: rank {self._ranks.rank}: no flight record: {error}", file=sys.stderr, flush=True)
            deadline = time.monotonic() + GRACE_S
            while len(found := self._reports()) < self._ranks.world_size and time.monotonic() < deadline:
                time.sleep(0.1)
            verdict = f"{self._verdict(found)}; stacks are in {self._incident}"
            print(f"error: rank {self._ranks.rank}: {verdict}", file=sys.stderr, flush=True)
            if self._ranks.rank == min(found, default=self._ranks.rank):
                note_end(self._run_dir, EXIT_HUNG, verdict)
        except Exception as error:
            print(f"error: {self._incident}: {error}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(2)  # the descriptor, since the stream may have none
        finally:
            os._exit(EXIT_HUNG)

    def _write_stacks(self, waited_s: float) -> None:
        path = self._incident / f"rank-{self._ranks.rank}.txt"
        part = path.with_suffix(".part")
        with open(part, "w") as file:
            file.write(f"{self._beats}\t{self._where}\t{waited_s:.1f} s\t{os.uname().nodename}, pid {os.getpid()}\n\n")
            file.flush()
            faulthandler.dump_traceback(file)
        os.rename(part, path)

    def _write_flight_record(self) -> None:
        """Write the latest collectives of this rank as JSON, on GPUs only."""
        if self._ranks.device.type == "cuda":
            dump = torch._C._distributed_c10d._dump_nccl_trace_json  # type: ignore[attr-defined]  # not in torch's stubs
            record = dump(includeCollectives=True, onlyActive=False)
            (self._incident / f"rank-{self._ranks.rank}.nccl.json").write_bytes(record)

    def _reports(self) -> dict[int, tuple[int, str]]:
        """(beats, where) by rank, of the ranks that have written."""
        reports = {}
        for path in self._incident.glob("rank-*.txt"):
            beats, where, *_ = path.read_text().partition("\n")[0].split("\t")
            reports[int(path.stem.removeprefix("rank-"))] = (int(beats), where)
        return reports

    def _verdict(self, reports: dict[int, tuple[int, str]]) -> str:
        what = f"no progress for {self.limit_s:.0f} s"
        missing = sorted(set(range(self._ranks.world_size)) - reports.keys())
        if missing:
            return (
                f"{what}: rank {', '.join(map(str, missing))} does not answer: stopped, stuck, or its machine was lost"
            )
        least = min(beats for beats, _ in reports.values())
        behind = sorted(rank for rank, (beats, _) in reports.items() if beats == least)
        where = reports[behind[0]][1]
        if len(behind) == len(reports):
            return f"{what}: all ranks are stuck at the same place: {where}"
        return f"{what}: rank {', '.join(map(str, behind))} is stuck at: {where}"

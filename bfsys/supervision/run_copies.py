"""The copies of a run's checkpoints in an object store (`train.checkpoint_copy`), as all ranks see them.

Rank 0 makes them in the background (checkpoint/copies.py). All ranks wait together where the run needs a copy: when it
ends, and when a copy replaces a damaged checkpoint. If the config asks for no copies, the methods do nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from bfsys import dist
from bfsys.checkpoint.copies import POLL_S, Copies, Wanted, fetch_newest
from bfsys.checkpoint.files import read_manifest, step_of
from bfsys.checkpoint.loading import check_same_run
from bfsys.checkpoint.retention import RetentionPolicy
from bfsys.config import Config
from bfsys.errors import EXIT_REQUEUE, EXIT_STORAGE
from bfsys.supervision.goodput import Ledger
from bfsys.supervision.metrics import Metrics
from bfsys.supervision.signals import StopRequests
from bfsys.supervision.watchdog import Watchdog

STOP_WAIT_S = 120.0  # a run that stops on request waits this long for its last copy


class RunCopies:
    """The copies of one run on one rank. Only rank 0 has a copier."""

    def __init__(
        self, config: Config, facts: dict, ranks: dist.Ranks, keep: RetentionPolicy,
        *, watchdog: Watchdog, ledger: Ledger, stop: StopRequests, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`facts` are those with which a fetched copy must agree."""
        self.run_dir, self.url, self.facts, self.ranks = config.run_dir, config.copy_url, facts, ranks
        self.watchdog, self.ledger, self.stop, self.say = watchdog, ledger, stop, say
        self._copier = Copies(self.run_dir, self.url, keep) if self.url and ranks.is_rank_zero else None

    @property
    def copying(self) -> Path | None:
        """The checkpoint that this rank is copying, which must not be removed; None if it copies none."""
        return self._copier.copying if self._copier else None

    def offer(self) -> None:
        """Copy the checkpoints without a copy in the background."""
        if self._copier:
            self._copier.offer()

    def attend(self, step: int, metrics: Metrics, *, is_end: bool = False) -> None:
        """Let the copies continue, and report changes. At the end of the run, the caller reports failures."""
        if self._copier and (news := self._copier.attend()) and not (is_end and self._copier.problem):
            metrics.say(news)
            metrics.show("checkpoint_copy", step, news)

    def finish(self, step: int, exit_code: int, metrics: Metrics) -> int:
        """Wait until the last checkpoint is copied; collective. Returns the exit code of the run.

        A stop may be requested meanwhile. A run that will be requeued leaves a missing copy to its next start.
        Otherwise a missing copy raises AgreedError.
        """
        if not self.url:
            return exit_code
        waits = self.copying is not None
        if waits:
            metrics.say(f"waiting until the last checkpoint is copied to {self.url}")
        stop_code = self._wait(step, exit_code, metrics)
        problem = dist.broadcast_from_rank0(self._copier.problem_of_newest() if self._copier else "")
        if problem and stop_code == EXIT_REQUEUE:
            metrics.say(problem)
            return stop_code
        if problem:
            raise dist.AgreedError(f"{problem}; the same command copies it", exit_code=EXIT_STORAGE)
        if waits and self._copier and not self._copier.newest_is_left_out:
            metrics.say("the last checkpoint is copied")
        return exit_code

    def _wait(self, step: int, stop_code: int, metrics: Metrics) -> int:
        """Wait while rank 0 makes a copy that is needed, but after a stop for at most STOP_WAIT_S; collective. Returns
        the requested exit code, which may have changed from 0."""
        where, began = f"step {step}: waiting for the copy of the checkpoint", time.monotonic()
        with self.watchdog.patient(where), self.ledger.stalled():
            while True:
                self.attend(step, metrics, is_end=True)
                is_late = stop_code and time.monotonic() - began > STOP_WAIT_S
                copier = self._copier if self.copying and not is_late else None
                # After a stop, the run waits only for the copy of the newest checkpoint.
                is_waiting = copier is not None and (not stop_code or bool(copier.problem_of_newest()))
                are_waiting, asked = dist.agree_on_max(is_waiting, self.stop.exit_code)
                if asked and not stop_code:
                    stop_code, began = asked, time.monotonic()
                if not are_waiting:
                    return stop_code
                self.watchdog.beat(where)
                time.sleep(POLL_S)

    def replace_damaged(self, path: Path, after: int) -> Path | None:
        """Fetch the newest intact copy of a step after `after`, up to that of a damaged checkpoint; collective. Returns
        its path, if there is one."""
        if not self.url:
            return None
        fetched = fetch_newest(
            Wanted(self.run_dir, self.url, after=after, until=step_of(path)),
            self.ranks,
            check=lambda work: check_same_run(work, read_manifest(work), self.facts, origin=self.url),
            wait=lambda: self.watchdog.beat(f"fetching a copy instead of {path.name}"),
        )
        for note in (*fetched.notes, *([fetched.problem] if fetched.problem else [])):
            self.say(note)
        return path.with_name(fetched.name) if fetched.name else None

    def close(self) -> None:
        """End the copy that is being made. It does not count, and a later start makes it again."""
        if self._copier:
            self._copier.close()

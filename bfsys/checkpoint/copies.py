"""Copies of a run's checkpoints in an object store: they are made in the background, and fetched at a start.

The checkpoints in the run directory are the originals. A checkpoint is copied after it is complete there, by a separate
process (copier.py), so no step waits for the store. The newest checkpoint without a copy is always next. If the store
is slower than the saves, it gets fewer checkpoints, and no queue grows. A failing store does not end training: the next
save tries again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from bfsys import dist
from bfsys.checkpoint import copier
from bfsys.checkpoint.child import start_child
from bfsys.checkpoint.files import (
    MANIFEST,
    RetentionPolicy,
    all_checkpoints,
    checkpoint_name,
    checkpoints_dir,
    take_over,
)
from bfsys.errors import EXIT_CRASHED, UserError

POLL_S = 0.05
TRIES_AGAIN = "training goes on, and the next save tries again"
STOP_WAIT_S = 120.0  # a run that stops on request waits this long for its last copy


class Copies:
    """Copies the checkpoints of a run, one at a time; for rank 0."""

    def __init__(self, run_dir: Path, url: str, keep: RetentionPolicy) -> None:
        """`url` is the URL of the run in the store."""
        self.run_dir, self.url, self.keep = run_dir, url, keep
        self.problem = ""
        """Why copying fails; empty if it works."""
        self.copying: Path | None = None
        """The checkpoint that is being copied. It must not be removed."""
        self.newest_is_left_out = False
        """Whether the last processed checkpoint was left out on purpose, since it was saved after a bad step."""
        self._process: subprocess.Popen | None = None
        self._is_wanted = False
        self._is_offered = False  # whether `offer` was called since the present copy began
        self._done: dict[tuple[str, int], str] = {}  # problem ("" if none) of checkpoints that are not tried again
        self._said = ""
        self._unsaid = ""

    def offer(self) -> None:
        """Look for checkpoints without a copy, and start to copy them."""
        self._is_wanted = self._is_offered = True
        self._start_next()

    def attend(self) -> str:
        """Start the next copy if the present one has ended. Returns a message for the console; empty if nothing has
        changed."""
        if self._process is None:
            news, self._unsaid = self._unsaid, ""
            return news
        if self._process.poll() is None:
            return ""
        news = self._take(_answer_of(self._process))
        self._process = self.copying = None
        self._start_next()
        return news

    @property
    def is_busy(self) -> bool:
        return self._process is not None

    def problem_of_newest(self) -> str:
        """Why the newest checkpoint has no copy; empty if it has one."""
        newest = all_checkpoints(self.run_dir)[-1]
        problem = self._done.get(_key(newest), self.problem or "the store was too slow")
        return problem and f"checkpoint {newest}: is whole, but has no copy in {self.url}: {problem}"

    def close(self) -> None:
        """Kill the copying process. The incomplete copy has no manifest, so it does not count."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = self.copying = None

    def _start_next(self) -> None:
        if self._process is not None or not self._is_wanted:
            return
        keys: dict[Path, tuple[str, int]] = {}
        for one in reversed(all_checkpoints(self.run_dir)):
            with suppress(FileNotFoundError):  # it has no manifest, or `bfsys checkpoint prune` has removed it
                keys[one] = _key(one)
        path = next((path for path, key in keys.items() if key not in self._done), None)
        if path is None:
            self._is_wanted = False
            return
        task = {"action": "copy", "path": str(path), "keep": asdict(self.keep)}
        try:
            self._process, self.copying = _start(self.run_dir, self.url, task), path
            self._is_offered = False
        except OSError as error:  # the limit of processes or of memory is reached
            self.problem, self._is_wanted = f"the copying process cannot be started: {error.strerror}", False
            if self._said != "failing":
                self._unsaid = f"{path.name} is not copied: {self.problem}; {TRIES_AGAIN}"
            self._said = "failing"
        self._copied_key = keys[path]

    def _take(self, answer: dict) -> str:
        """Record the result of the copying process. Returns a message if it differs from the last one."""
        before, self.problem = self._said, answer.get("problem", "")
        name = self._copied_key[0]
        if self.problem:
            self._is_wanted = self._is_offered  # without an offer in between, retry only after the next save
            self._said = "failing"
            news = f"{name} is not copied: {self.problem}; {TRIES_AGAIN}"
            return news if before != self._said else ""
        self._done[self._copied_key] = answer.get("damaged", "")
        self.newest_is_left_out = "left_out" in answer
        if reason := answer.get("damaged") or answer.get("left_out"):
            return f"{name} is not copied: {reason}"
        self._said = "note" if "note" in answer else "copied"
        if before == self._said:
            return ""
        if note := answer.get("note"):
            return f"{name} is copied, but older copies stay: {note}"
        return f"checkpoints are copied to {self.url}{' again' if before == 'failing' else ''}"


@dataclass(frozen=True)
class Wanted:
    """The copies of a run to choose from: those of steps after `after` and, if it is given, up to `until`."""

    run_dir: Path
    url: str
    after: int
    until: int | None = None


def fetch_newest(
    wanted: Wanted, ranks: dist.Ranks, *, check: Callable[[Path], None], wait: Callable[[], None] = lambda: None
) -> Fetched:
    """Fetch the newest intact copy of those in `wanted` into the run directory, on rank 0; collective.

    `check` raises UserError if the checkpoint belongs to another run. `wait` is called repeatedly meanwhile. There is
    no timeout here: the copying process ends by itself if the store does not respond.
    """
    process: subprocess.Popen | None = None

    def begin() -> None:
        nonlocal process
        process = _start(wanted.run_dir, wanted.url, {"action": "fetch", "after": wanted.after, "until": wanted.until})

    dist.on_rank0(begin, ranks)
    while dist.agree_on_max(process is not None and process.poll() is None)[0]:
        wait()
        time.sleep(POLL_S)

    def finish() -> Fetched:
        assert process is not None
        answer = _answer_of(process)
        notes = [f"skipped a damaged copy: {problem}" for problem in answer.get("skipped", ())]
        if "work" not in answer:
            return Fetched(None, answer.get("problem", ""), answer.get("exit_code", 0), notes)
        work, name = Path(answer["work"]), checkpoint_name(answer["step"])
        try:
            check(work)
        except UserError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        take_over(work, checkpoints_dir(wanted.run_dir) / name)
        return Fetched(name, "", 0, [*notes, f"fetched {name} from {wanted.url}"])

    return dist.on_rank0(finish, ranks)


class Fetched(NamedTuple):
    """The result of `fetch_newest`."""

    name: str | None
    """The checkpoint that was fetched; None if there is no intact copy."""
    problem: str
    """Why the store could not be read; empty if it could."""
    exit_code: int
    """The exit code for the problem."""
    notes: list[str]


def _start(run_dir: Path, url: str, task: dict) -> subprocess.Popen:
    return start_child([copier.__file__], {"url": url, "run_dir": str(run_dir), **task})


def _answer_of(process: subprocess.Popen) -> dict:
    output, _ = process.communicate()
    try:
        return json.loads(output)
    except ValueError:
        return {"problem": f"the copying process ended with code {process.returncode}", "exit_code": EXIT_CRASHED}


def _key(path: Path) -> tuple[str, int]:
    """The identity of a checkpoint. It differs from that of another checkpoint of the same step."""
    return path.name, (path / MANIFEST).stat().st_mtime_ns

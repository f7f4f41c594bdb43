"""Saves in three phases. Training waits for a copy in host memory. A child process writes the files while training
continues. Rank 0 commits the checkpoint when all ranks have written their files.

Training waits for the copy only. Its memory is allocated once per rank and reused, so memory is bounded by this rank's
share of weights, moments and average in float32. If a save is due while the previous one is still being written, it
waits. Each rank's loop calls `is_writing` after every step, so a failed writer is noticed in the same step.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bfsys import dist
from bfsys.checkpoint import writer
from bfsys.checkpoint.child import start_child
from bfsys.checkpoint.files import (
    METRICS,
    all_checkpoints,
    checkpoint_name,
    checkpoints_dir,
    commit,
    cover,
    new_work_dir,
    piece_name,
    remove_folder,
    retire,
)
from bfsys.checkpoint.retention import RetentionPolicy, to_prune
from bfsys.checkpoint.rollbacks import is_after_bad_steps
from bfsys.errors import EXIT_CRASHED, EXIT_STORAGE, TRANSIENT_ERRNOS, UserError, cannot_start, remedy_of
from bfsys.files import exists
from bfsys.process import end_of

POLL_S = 0.05
SILENT_S = 2.0  # at the end of a run, a longer wait for the removal of old checkpoints is reported


class StateSource(Protocol):
    """The source of a checkpoint's tensors: an Engine, or imported weights."""

    def state_names(self) -> tuple[str, ...]: ...

    def parameter_shapes(self, state: str) -> dict[str, tuple[int, ...]]:
        """Whole shapes by name of the parameters that have the state."""
        ...

    def read_pieces(self, state: str) -> Iterator[tuple[str, int, Tensor]]: ...


class Saver:
    """Saves a run's checkpoints, one at a time. Between `start` and `finish` a save is `under_way` on all ranks."""

    def __init__(
        self,
        run_dir: Path,
        ranks: dist.Ranks,
        keep: RetentionPolicy,
        *,
        history: Sequence[str] = (METRICS,),
        in_use: Callable[[], Path | None] = lambda: None,
    ) -> None:
        """`history` names files of the run directory that are copied into every checkpoint if they exist. The
        checkpoint that `in_use` returns is not removed."""
        self.run_dir, self.ranks, self.keep, self.history, self.in_use = run_dir, ranks, keep, history, in_use
        self._facts: dict | None = None
        self._work, self._written_bytes = run_dir, 0
        self._pieces_checked: dict[str, list[str]] | None = None
        self._removal: threading.Thread | None = None
        self._newest: Path | None = None  # the last checkpoint of this process; None after bad steps
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}  # shapes of the whole tensors, by state
        self._pieces: dict[str, list[str]] = {}  # names of this rank's tensors, by state
        self._process: subprocess.Popen | None = None
        self._memory: HostMemory | None = None

    @property
    def under_way(self) -> bool:
        """Whether there is a save to `finish`; the same on all ranks."""
        return self._facts is not None

    def is_writing(self) -> bool:
        """Whether this rank is still writing its files."""
        return self._process is not None and self._process.poll() is None

    def start(self, source: StateSource, facts: dict) -> None:
        """Copy all state, and start to write it as the checkpoint of step `facts["step"]`; collective.

        `facts` goes into the manifest unchanged. No other save may be under way.
        """
        assert not self.under_way
        final = checkpoints_dir(self.run_dir) / checkpoint_name(facts["step"])

        work = dist.on_rank0(_errors_of_saving(final)(partial(new_work_dir, final)), self.ranks)
        self._shapes = {state: source.parameter_shapes(state) for state in source.state_names()}
        files = self._copy(source)
        shapes = {name: list(shape) for of_state in self._shapes.values() for name, shape in of_state.items()}
        history = [self.run_dir / name for name in self.history] if self.ranks.is_rank_zero else []
        copies = {path.name: (str(path), path.stat().st_size) for path in history if exists(path)}
        self._facts = {**facts, "shapes": shapes}
        self._work, self._written_bytes = work, 0
        if self._memory:
            self._memory.report[0] = 0
        self._pieces = {file.partition("-")[0]: list(entries) for file, entries in files.items()}
        self._process = _start_writer(work, self._memory, files, copies) if files or copies else None

    def finish(self, wait: Callable[[], None] = lambda: None) -> Path:
        """Wait for all ranks' files, and commit the checkpoint; collective. Returns its directory.

        `wait` is called whenever more bytes were written. If a rank cannot write, all ranks raise AgreedError, and the
        earlier checkpoints stay valid.
        """
        facts = self._facts
        assert facts is not None, "no save is under way"
        while (news := dist.agree_on_max(self.is_writing(), self._written_bytes_grew()))[0]:
            if news[1]:
                wait()
            time.sleep(POLL_S)
        self._facts = None
        try:
            return self._commit(facts)
        except dist.AgreedError:
            if self.ranks.is_rank_zero:  # no rank writes any more; on a full disk, the space is needed
                shutil.rmtree(self._work, ignore_errors=True)
            raise

    def _commit(self, facts: dict) -> Path:
        """Make the files of all ranks a checkpoint; collective. Returns its directory."""
        final = checkpoints_dir(self.run_dir) / checkpoint_name(facts["step"])
        mine = dist.same_errors_on_all(partial(self._written_files, final))
        files = {name: entry for of_rank in dist.gather_to_rank0(mine) for name, entry in of_rank.items()}
        self._check_pieces()

        @_errors_of_saving(final)
        def commit_and_prune() -> None:
            self._wait_for_removal()
            commit(self._work, final, facts, files)
            self._newest = None if is_after_bad_steps(facts) else final
            self._prune()

        dist.on_rank0(commit_and_prune, self.ranks)  # all ranks wait until the checkpoint is committed
        return final

    def prune(self) -> None:
        """Remove checkpoints that the last save had to keep, because one was in use, or the last one had no score yet;
        collective."""
        dist.on_rank0(self._prune, self.ranks)

    def _prune(self) -> None:
        """Remove the checkpoints that are not kept, in the background. After bad steps, none is removed."""
        if self._newest is None:
            return
        with _errors_of_saving(self._newest):
            self._wait_for_removal()
            paths, stay = all_checkpoints(self.run_dir), (self.in_use(), self._newest)
            going = [retire(path) for path in to_prune(self.run_dir, paths, self.keep) if path not in stay]
            self._removal = threading.Thread(target=_remove_all, args=[going], name="removal of checkpoints")
            self._removal.start()

    def _check_pieces(self) -> None:
        """Assert that the pieces of all ranks are the whole state; collective. Rank 0 does it, and only if the division
        of the state has changed: there are millions of pieces if every rank has a part of every parameter."""
        if not dist.agree_on_max(self._pieces != self._pieces_checked)[0]:
            return
        self._pieces_checked = self._pieces
        pieces_of_ranks = dist.gather_to_rank0(self._pieces)
        checked: list[tuple[list[str], dict]] = []
        for state, shapes in self._shapes.items() if pieces_of_ranks else ():
            pieces = [piece for of_rank in pieces_of_ranks for piece in of_rank.get(state, ())]
            if (pieces, shapes) not in checked:
                assert cover(pieces, shapes), f"{state}: the ranks' pieces are not the whole state"
                checked.append((pieces, shapes))

    def _wait_for_removal(self) -> None:
        if self._removal is not None:
            self._removal.join()

    def close(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Kill a writer that is still running. Its checkpoint is not committed. `say` receives what takes long."""
        if self._removal is not None:
            self._removal.join(SILENT_S)
            if self._removal.is_alive():
                say(f"waiting until old checkpoints of {self.run_dir} are removed; the newer ones are complete")
        self._wait_for_removal()
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = self._facts = None

    def _written_bytes_grew(self) -> bool:
        """Whether this rank has written more bytes since the last call."""
        before, self._written_bytes = self._written_bytes, int(self._memory.report[0]) if self._memory else 0
        return self._written_bytes > before

    def _copy(self, source: StateSource) -> dict[str, dict]:
        """Copy this rank's pieces; {file name: {piece: (shape, first byte, end)}}."""
        pieces = [(state, *piece) for state in self._shapes for piece in source.read_pieces(state)]
        files: dict[str, dict] = {}
        if not pieces:
            return files
        memory = self._memory = self._memory or HostMemory(4 * sum(value.numel() for *_, value in pieces))
        end = 0
        for state, name, first, value in pieces:
            begin, end = end, end + 4 * value.numel()
            memory.tensor(begin, value.numel()).copy_(value.flatten())
            shape = self._shapes[state][name]
            is_whole = value.numel() == math.prod(shape)
            piece = name if is_whole else piece_name(name, first, first + value.numel())
            file = files.setdefault(f"{state}-{self.ranks.rank}-of-{self.ranks.world_size}.safetensors", {})
            file[piece] = (list(shape) if is_whole else [value.numel()], begin, end)
        return files

    def _written_files(self, final: Path) -> dict[str, dict]:
        """Wait for the writer. Returns size and sha256 of this rank's files; raises UserError if it failed."""
        process, self._process = self._process, None
        if process is None:
            return {}
        output, _ = process.communicate()
        if process.returncode:
            problem = f"rank {self.ranks.rank}: the writing process {end_of(process.returncode)}"
            raise _save_error(final, problem, errno.EINTR)
        answer = json.loads(output)
        if "problem" in answer:
            raise _save_error(final, answer["problem"], answer["errno"])
        return answer["files"]


class HostMemory:
    """Anonymous memory that a child process can inherit; it is freed when its processes end.

    `report`, an int64 after the first `size_bytes`, is the number of bytes that the child has written.
    """

    def __init__(self, size_bytes: int) -> None:
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("bfsys-checkpoint")
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        try:
            os.ftruncate(self.descriptor, size_bytes + 8)
        except OSError as error:
            problem = f"{size_bytes:,} bytes: {error.strerror}; {remedy_of(error.errno)}"
            raise UserError(f"the host memory for a checkpoint, {problem}", exit_code=EXIT_STORAGE) from None
        self.size_bytes = size_bytes
        memory = mmap.mmap(self.descriptor, size_bytes + 8)
        self._floats = np.frombuffer(memory, np.float32, size_bytes // 4)
        self.report = np.frombuffer(memory, "<i8", 1, size_bytes)

    def tensor(self, first: int, elements: int) -> Tensor:
        """float32 [elements], a view of the memory from byte `first` on."""
        return torch.from_numpy(self._floats[first // 4 : first // 4 + elements])


def _remove_all(folders: Sequence[Path]) -> None:
    for folder in folders:
        remove_folder(folder)


def save(source: StateSource, run_dir: Path, facts: dict, *, ranks: dist.Ranks, keep: RetentionPolicy) -> Path:
    """Write a checkpoint and wait for it; collective. Returns its directory."""
    saver = Saver(run_dir, ranks, keep)
    saver.start(source, facts)
    return saver.finish()


def _start_writer(work: Path, memory: HostMemory | None, files: dict, copies: dict) -> subprocess.Popen:
    task = {
        "folder": str(work),
        "memory": memory.descriptor if memory else None,
        "memory_bytes": memory.size_bytes if memory else 0,
        "tensors": files,
        "copies": copies,
    }
    # Isolated from the current folder and the environment; without site-packages it starts in two thirds of the time.
    try:
        return start_child(["-I", "-S", writer.__file__], task, [memory.descriptor] if memory else [])
    except OSError as error:
        raise cannot_start("the process that writes checkpoints", error) from None


@contextmanager
def _errors_of_saving(final: Path) -> Iterator[None]:
    """Turn errors of the disk into a UserError about the checkpoint `final`."""
    try:
        yield
    except OSError as error:
        raise _save_error(final, f"{error.filename or final}: {error.strerror}", error.errno) from None


def _save_error(final: Path, problem: str, number: int | None) -> UserError:
    """The error for a checkpoint that cannot be written; `number` is the errno."""
    text = f"checkpoint {final}: cannot be written: {problem}; earlier checkpoints are unchanged"
    if number in TRANSIENT_ERRNOS:
        return UserError(text, exit_code=EXIT_CRASHED)  # launchers restart the run
    return UserError(f"{text}; {remedy_of(number)}, and run the same command to resume", exit_code=EXIT_STORAGE)

"""The supervisor of a run: it does everything in training that is not the step itself.

The training loop (train.py) calls one method for each duty, and the methods are in the order of these calls.

    start     `load_quarantine`; `save_first` in a new run; `resume`, also after a roll-back
    step      `fetch` gets data; `agree` exchanges the only control message; `judge` detects bad steps and reports;
              `save_if_due` writes checkpoints; `end_step`
    end       `end_steps`; or `roll_back`, which returns to a checkpoint before bad steps

Rejected alternative: callbacks, because the loop would no longer show what happens and in which order.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple

import torch

from bfsys import dist
from bfsys.batch import ByteBatch
from bfsys.checkpoint.files import METRICS
from bfsys.checkpoint.retention import RetentionPolicy
from bfsys.checkpoint.rollbacks import FILE as ROLLBACKS
from bfsys.checkpoint.rollbacks import read_rollbacks
from bfsys.checkpoint.saving import Saver
from bfsys.config import Optim
from bfsys.data.streaming.datasets import Sources
from bfsys.data.streaming.quarantine import FILE as QUARANTINE
from bfsys.data.streaming.quarantine import Quarantine
from bfsys.data.streaming.run_data import RunData
from bfsys.engine import Engine
from bfsys.errors import EXIT_CRASHED, EXIT_DIVERGED, UserError, counted
from bfsys.supervision.goodput import Ledger
from bfsys.supervision.guard import Drawn, Guard, ranges_of, return_to_good_checkpoint, samples_of
from bfsys.supervision.metrics import BAD_STEP, Metrics
from bfsys.supervision.run_copies import RunCopies
from bfsys.supervision.run_end import note_end
from bfsys.supervision.signals import StopRequests
from bfsys.supervision.watchdog import Watchdog, least_limit_s

WARMUP_STEPS = 3  # first steps of a start, in which kernels may still be compiled
HISTORY = (METRICS, QUARANTINE, ROLLBACKS)  # files that a checkpoint contains, because later steps depend on them
COLLECT_EVERY_STEPS = 100  # on all ranks in the same step, because garbage collection delays the other ranks


class StepOutcome(NamedTuple):
    """The results of a step on this rank."""

    drawn: list[Drawn]
    """The micro-batches of the step; none if the step is skipped."""
    learning_rate: float
    grad_norm: float
    """The norm of the global gradient, before clipping."""
    has_updated: bool
    """Whether the weights have changed, on all ranks."""


class Agreed(NamedTuple):
    """The results of a step that all ranks share."""

    loss: float
    """Mean over the global batch."""
    exit_code: int
    """The requested exit code; 0 means continue."""
    has_bad_files: bool
    is_writing: bool
    """Whether a rank still writes its files of a checkpoint."""


class Supervisor:
    """The supervisor of one run on one rank. All ranks call the same methods in the same order."""

    quarantine: Quarantine
    """Set by `load_quarantine`."""

    # Set by `resume`, at the start and after each roll-back.
    rollbacks: list[dict]
    guard: Guard
    metrics: Metrics
    save_pending: bool
    """Whether a checkpoint is due but delayed."""
    updates: int
    """Steps since the resume that were not skipped."""

    def __init__(self, data: RunData, facts: dict, ranks: dist.Ranks, check_directory: Callable[[], None]) -> None:
        """`facts` are stored in every checkpoint. `check_directory` raises UserError if the run directory is another
        one. From now on, a signal asks the run to stop after a step."""
        self._check_directory = check_directory
        self.data, self.config, self.facts, self.ranks = data, data.config, facts, ranks
        self.run_dir, train = self.config.run_dir, self.config.train
        self.stop = StopRequests()
        patience_s = train.collective_timeout_s
        is_compiled = self.config.model.compiled and ranks.device.type == "cuda"
        least_s = least_limit_s(patience_s, is_remote=data.is_remote, is_compiled=is_compiled)
        self.watchdog = Watchdog(
            self.run_dir, ranks, limit_s=train.hang_timeout_s, patience_s=patience_s, least_s=least_s
        )
        self.ledger = dist.same_errors_on_all(lambda: Ledger(self.run_dir, ranks.is_rank_zero))
        keep = RetentionPolicy(train.keep_checkpoints, train.keep_every, train.keep_best, train.best_metric)
        self.copies = RunCopies(
            self.config, facts, ranks, keep,
            watchdog=self.watchdog, ledger=self.ledger, stop=self.stop, say=self.say,
        )  # fmt: skip
        self.saver = Saver(self.run_dir, ranks, keep, history=HISTORY, in_use=lambda: self.copies.copying)

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Record the error that ended the run, if any, and close everything."""
        if isinstance(error, dist.AgreedError):
            with suppress(OSError, UserError):  # if another start trains here, this is not the end of the run
                self._check_directory()
                if self.ranks.is_rank_zero:
                    note_end(self.run_dir, error.exit_code, str(error))
        elif isinstance(error, UserError):
            note_end(self.run_dir, error.exit_code, f"rank {self.ranks.rank}: {error}")
        # The rank whose connection was lost does not know the reason; the rank that failed notes it.
        elif isinstance(error, Exception) and not (isinstance(error, RuntimeError) and dist.lost_connection(error)):
            note_end(self.run_dir, EXIT_CRASHED, f"rank {self.ranks.rank}: {type(error).__name__}: {error}")
        self.watchdog.close()
        self.saver.close(self.say)
        self.copies.close()
        self.ledger.close()
        self.stop.close()

    def load_quarantine(self) -> None:
        """Read the bad samples of earlier starts; collective. Raises AgreedError if there are too many."""
        self.quarantine = Quarantine.load(self.run_dir, self.ranks, self.data.check_unchanged)
        self.quarantine.check(self.data.training.sizes, self.config.data.max_bad_share)

    def save_first(self, engine: Engine) -> None:
        """Save step 0, so that the run can always roll back and an unusable disk is found early; collective."""
        where = "step 0: waiting for the checkpoint's files"
        self.saver.start(engine, {"step": 0, "updates": 0, "metrics": None, "guard": None, **self.facts})
        self.saver.finish(wait=lambda: self.watchdog.beat(where))

    def resume(self, manifest: dict, notes: list[str]) -> None:
        """Continue from a checkpoint that the engine has loaded, and print `notes`; collective."""
        step = manifest["step"]
        self.ledger.resumed(step)
        self._restore(manifest)
        self.save_pending, self.updates = False, 0
        self._report_start(step, notes)
        self.copies.offer()  # for checkpoints that an earlier start could not copy

    def _restore(self, manifest: dict) -> None:
        """Give guard and metrics the state of a checkpoint; collective."""
        training = self.data.training
        self.rollbacks = dist.on_rank0(lambda: read_rollbacks(self.run_dir), self.ranks)
        self.guard = Guard(self.config.train, self.rollbacks)
        if manifest.get("guard"):
            smoothing = manifest["config"].get("optim", {}).get("label_smoothing", Optim.label_smoothing)
            is_same_loss = smoothing == self.config.optim.label_smoothing
            self.guard.load_state_dict(manifest["guard"], is_same_loss=is_same_loss)
        self.metrics = Metrics(
            self.config, self.ranks, training.names, len(training.classes),
            ledger=self.ledger, first_step=manifest["step"], skipped_steps=self.guard.skipped_steps,
        )  # fmt: skip
        if manifest["metrics"]:
            self.metrics.load_state_dict(manifest["metrics"])

    def _report_start(self, step: int, notes: list[str]) -> None:
        training, metrics = self.data.training, self.metrics
        skipped = sorted(later for later in self.guard.skipped_steps if later > step)
        said = [
            *([f"continuing {self.run_dir} after step {step}"] if step else []),
            *([f"skipping steps {ranges_of(skipped)} ({ROLLBACKS})"] if skipped else []),
            *notes,
        ]
        if metrics.last_evaluated not in (None, self.data.evaluated):
            said.append(
                f"the evaluation files are not those of step {metrics.last_evaluation}: earlier scores are not "
                "comparable, and do not decide which checkpoints are kept after the next evaluation"
            )
        for note in said:
            metrics.say(note)
        metrics.show("start", step, "; ".join(said))
        metrics.show_lengths({source.name: source.split.samples["length"] for source in training.opened})

    def fetch(self, batches: Iterator[ByteBatch], step: int) -> ByteBatch:
        """Return the next micro-batch of step number `step` + 1, and count the wait for it."""
        self.watchdog.beat(f"step {step + 1}: fetch")
        with self.metrics.waiting_for_data():
            return next(batches)

    def agree(self, drawn: list[Drawn]) -> Agreed:
        """Exchange the step's only control message; collective. Losses are summed in the order of the ranks, and flags
        are combined by their maximum. Raises AgreedError if rank 0 cannot write metrics."""
        loss = torch.stack([micro_batch.loss.double() for micro_batch in drawn]).sum().item() if drawn else 0.0
        problem_code = self.metrics.problem_code
        flags = self.stop.exit_code, self.quarantine.news > 0, self.saver.is_writing(), problem_code
        gathered = dist.gather_numbers([loss, *flags])  # [ranks, 5]
        exit_code, has_bad_files, is_writing, problem_code = gathered[:, 1:].amax(0).int().tolist()
        if problem_code:
            raise dist.AgreedError(dist.broadcast_from_rank0(self.metrics.problem), exit_code=problem_code)
        mean_loss = gathered[:, 0].sum().item() / self.config.data.batch_samples
        return Agreed(mean_loss, exit_code, bool(has_bad_files), bool(is_writing))

    def judge(self, step: int, outcome: StepOutcome, agreed: Agreed) -> None:
        """Decide whether the step was bad, and report it; collective."""
        problem = ""
        if outcome.drawn:  # a skipped step is neither good nor bad
            problem = self.guard.judge(agreed.loss, outcome.grad_norm)
            self.guard.record(step, problem, samples_of(outcome.drawn, self.data.training) if problem else [])
        if agreed.has_bad_files:
            self.report_bad_files(self.data.training)
        self.metrics.end_step(
            step, outcome.learning_rate, outcome.grad_norm, self.quarantine.count_until(step),
            is_skipped=not outcome.has_updated,
        )  # fmt: skip
        if problem:
            samples = self.guard.bad_in_a_row[-1]["samples"]
            self.metrics.event(BAD_STEP, step, {"problem": problem, "samples": samples})
            what = "its update stays" if outcome.has_updated else "its update is skipped"
            self.metrics.say(f"step {step} · bad step: {problem}; {what}, and metrics.jsonl lists its samples")

    def report_bad_files(self, sources: Sources) -> None:
        """Report the files that could not be read, and stop if there are too many; collective."""
        for bad in self.quarantine.share(self.ranks, sources.sizes, self.config.data.max_bad_share):
            self.metrics.say(f"bad file, see {self.quarantine.path}: {bad.describe()}")
            self.metrics.show("bad_file", bad.step, bad.describe())

    def save_if_due(self, engine: Engine, step: int, agreed: Agreed) -> None:
        """Commit a checkpoint whose files are written, and start the next one if it is due; collective."""
        train = self.config.train
        self.save_pending = self.save_pending or step % train.save_every == 0
        is_over = bool(agreed.exit_code) or step == train.steps
        # After a bad step the run may have to roll back, and weights after a spike are not worth keeping.
        is_due = is_over or (self.save_pending and not self.guard.bad_in_a_row)
        if self.saver.under_way and (is_due or not agreed.is_writing):
            self.finish_save(step)
        if is_due:
            self._start_save(engine, step)
            self.save_pending = False
        if is_over:
            self.finish_save(step)

    def _start_save(self, engine: Engine, step: int) -> None:
        dist.on_rank0(self._check_places, self.ranks)
        self.ledger.record_progress(step)
        with self.watchdog.patient(f"step {step}: copy for the checkpoint"), self.ledger.stalled():
            progress = {"step": step, "updates": engine.updates}
            states = {"metrics": self.metrics.state_dict(), "guard": self.guard.state_dict()}
            self.saver.start(engine, {**progress, **states, **self.facts})

    def _check_places(self) -> None:
        self.data.check_unchanged()
        self._check_directory()
        self.metrics.restore_lines()

    def finish_save(self, step: int) -> None:
        """Wait for the save in progress, and commit it; collective."""
        where = f"step {step}: waiting for the checkpoint's files"
        with self.watchdog.patient(where), self.ledger.stalled():
            try:
                path = self.saver.finish(wait=lambda: self.watchdog.beat(where))
            except dist.AgreedError:
                dist.on_rank0(self._check_directory, self.ranks)  # its error is the cause, if it has one
                raise
        self.metrics.say(f"saved {path}")
        self.copies.offer()

    def end_step(self, step: int, outcome: StepOutcome) -> None:
        """Do the periodic work between two steps."""
        self.copies.attend(step, self.metrics)
        self.updates += bool(outcome.drawn)
        if self.updates == WARMUP_STEPS:
            self.watchdog.times_are_known()
        if step % COLLECT_EVERY_STEPS == 0:
            gc.collect()

    def end_steps(self, step: int, updates: int, exit_code: int) -> int:
        """End the run after `step` steps, `updates` of which changed the weights. `exit_code` is 0 if it is finished.
        Returns the run's exit code. Raises AgreedError if a finished run has never changed its weights."""
        if exit_code:
            self.metrics.show("stop", step, "stopped on request")
            self.metrics.say(f"stopped on request after step {step}; the same command continues from there")
        else:
            steps = counted(step, "step") + (f", {step - updates} of which were skipped" if updates < step else "")
            self.metrics.say(f"finished: {steps}; checkpoints, TensorBoard logs and metrics are in {self.run_dir}")
        self.metrics.restore_lines()
        try:
            (problem_code,) = dist.agree_on_max(self.metrics.problem_code)  # of the last step and its evaluation
            if problem_code:
                raise dist.AgreedError(dist.broadcast_from_rank0(self.metrics.problem), exit_code=problem_code)
            if not updates and not exit_code:
                raise dist.AgreedError(
                    f"{self.run_dir}: all {step} steps were skipped, so the weights are still the initial ones; "
                    f"{METRICS} has the reasons",
                    exit_code=EXIT_DIVERGED,
                )
            exit_code = self.copies.finish(step, exit_code, self.metrics)
            self.saver.prune()
            return exit_code
        finally:
            self.ledger.record_progress(step)
            self.metrics.close()

    def roll_back(self, step: int) -> None:
        """Make the checkpoint before the bad steps the newest; collective. `step` is the last bad step.

        Raises AgreedError after too many roll-backs.
        """
        if self.saver.under_way:
            self.finish_save(step)
        self.copies.close()  # the checkpoint that is being copied may be removed
        bad = self.guard.bad_in_a_row
        self.metrics.show("rollback", step, "; ".join(f"step {one['step']}: {one['problem']}" for one in bad))
        self.metrics.close()
        self.metrics.say(
            dist.on_rank0(lambda: return_to_good_checkpoint(self.run_dir, self.rollbacks, bad), self.ranks)
        )
        self.ledger.record_progress(step)

    def say(self, text: str) -> None:
        """Print a line on standard error, from rank 0."""
        if self.ranks.is_rank_zero:
            print(text, file=sys.stderr, flush=True)

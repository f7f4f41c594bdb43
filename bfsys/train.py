"""The training loop: plan, fetch, forward, step, save, evaluate.

    deepspeed bfsys/train.py CONFIG [section.key=value …]      one process per GPU (or --num_accelerators 2)
    python bfsys/train.py CONFIG --dry-run                     check everything, train nothing

A second start with the same command goes on from the newest whole checkpoint of the run directory.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # launchers put this file's folder first, where its modules would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import gc
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bfsys import console, dist
from bfsys.batch import ByteBatch
from bfsys.checkpoint.files import Keep
from bfsys.checkpoint.loading import resume, set_weights
from bfsys.checkpoint.saving import Saver
from bfsys.config import Config, load_config
from bfsys.data.datasets import Sources
from bfsys.data.loader import training_batches
from bfsys.data.quarantine import Quarantine
from bfsys.data.run_data import RunData, open_run_data
from bfsys.dryrun import dry_run
from bfsys.engine import Engine
from bfsys.errors import EXIT_CRASHED, UserError, exit_code_of, summary_of
from bfsys.evaluate import evaluate
from bfsys.faults import StopRequests, note_end
from bfsys.goodput import Ledger
from bfsys.guard import FILE as ROLLBACKS
from bfsys.guard import Drawn, Guard, go_back, ranges_of, read_rollbacks, samples_of
from bfsys.initial import initial_weights
from bfsys.loss import loss_and_sums
from bfsys.metrics import Metrics
from bfsys.micro_batches import agree_on_micro_batches
from bfsys.model.byteformer import ByteFormer
from bfsys.optim import ema_decay, learning_rate
from bfsys.rehearsal import rehearse
from bfsys.run import prepare_run_dir, run_facts
from bfsys.watchdog import LEAST_S, Watchdog

ROLLED_BACK = -1  # instead of an exit code: go on from the checkpoint that is now the newest
UNKNOWN_STEPS = 3  # of a start, in which programs may still be compiled
COLLECT_EVERY_STEPS = 100  # garbage, on all ranks in the same step: ranks that do so at any time hold up each other


@dataclass(frozen=True)
class Run:
    """What stays the same from the start of the processes to their end."""

    config: Config
    ranks: dist.Ranks
    data: RunData
    facts: dict
    engine: Engine
    quarantine: Quarantine
    saver: Saver
    stop: StopRequests
    watchdog: Watchdog
    ledger: Ledger


def train(config: Config, ranks: dist.Ranks) -> int:
    """Train to the last step, or until a stop is requested; returns the exit code. Called on every rank."""
    data = dist.same_errors_on_all(lambda: open_run_data(config, ranks))
    facts = run_facts(data)
    directory = prepare_run_dir(config, facts, ranks)
    stop = StopRequests()  # before, a signal ends the process: there is nothing to save, and waits may be long
    of_train, patience_s = config.train, config.train.collective_timeout_s
    # A shard may take its time to come from elsewhere, and its server may be away for a while.
    least_s = patience_s if data.is_remote else LEAST_S
    watchdog = Watchdog(config.run_dir, ranks, limit_s=of_train.hang_timeout_s, patience_s=patience_s, least_s=least_s)
    ledger = dist.same_errors_on_all(lambda: Ledger(config.run_dir, ranks.is_first))
    keep = Keep(of_train.keep_checkpoints, of_train.keep_every, of_train.keep_best, of_train.best_metric)
    saver = Saver(config.run_dir, ranks, keep)
    try:
        quarantine = Quarantine.load(config.run_dir, ranks)
        quarantine.check(data.training.sizes, config.data.max_bad_share)
        torch.manual_seed(config.train.seed)
        model = ByteFormer(
            config.model.architecture(),
            len(data.training.classes),
            config.model.mode,
            config.model.activation_checkpointing,
            compiled=config.model.compiled and ranks.device.type == "cuda",
        )
        weights: dict[str, Tensor] = {}
        micro_batches, note = agree_on_micro_batches(data, ranks)
        notes = [*directory.notes, *(data.notes if ranks.is_first else ()), note]
        if directory.is_new:
            weights, taken_over = initial_weights(model, config, data.training.classes, ranks)
            notes += taken_over
        engine = Engine(model, config, ranks, micro_batches)
        dist.bound_all_groups(of_train.collective_timeout_s)
        run = Run(config, ranks, data, facts, engine, quarantine, saver, stop, watchdog, ledger)
        if ranks.device.type == "cuda":
            dist.same_errors_on_all(lambda: rehearse(engine, data, ranks))
        gc.freeze()  # what the start has made stays
        gc.disable()
        # Step 0 is a checkpoint too: there is always one to go back to, and the disk is known to take it.
        if directory.is_new:
            if weights:  # in float32, where the engine has rounded the model to its precision
                set_weights(engine, weights)
            saver.start(engine, {"step": 0, "updates": 0, "metrics": None, "guard": None, **facts})
            saver.finish()
        exit_code = ROLLED_BACK
        while exit_code == ROLLED_BACK:
            watchdog.be_patient("resuming")
            _, manifest = resume(engine, config.run_dir, ranks, say=lambda text: say(run, text))
            exit_code = make_steps(run, manifest, notes)
            notes = []
        return exit_code
    except dist.AgreedError as error:
        if ranks.is_first:
            note_end(config.run_dir, error.exit_code, str(error))
        raise
    except Exception as error:
        if not (isinstance(error, RuntimeError) and dist.lost_connection(error)):  # the rank that failed says why
            note_end(config.run_dir, EXIT_CRASHED, f"rank {ranks.rank}: {type(error).__name__}: {error}")
        raise
    finally:
        gc.enable()
        watchdog.close()
        saver.close()
        ledger.close()
        stop.close()
        if directory.hold:
            directory.hold.close()


class StepOutcome(NamedTuple):
    """What this rank computed in a step."""

    drawn: list[Drawn]
    """Its micro-batches; none of a step that is skipped."""
    learning_rate: float
    grad_norm: float
    """The norm of the global gradient, before clipping."""
    has_updated: bool
    """The weights have changed, on all ranks."""


class Agreed(NamedTuple):
    """What all ranks know after a step."""

    loss: float
    """Mean over the global batch."""
    exit_code: int
    """What a rank was asked for (0: to go on)."""
    has_bad_files: bool
    is_writing: bool
    """A rank still writes its files of a checkpoint."""


def make_steps(run: Run, manifest: dict, notes: list[str]) -> int:
    """Train on from a checkpoint that the engine has loaded, to the end, a stop, or a roll-back (ROLLED_BACK)."""
    total, step = run.config.train.steps, manifest["step"]
    run.ledger.resumed(step)
    metrics = Metrics(
        run.config, run.ranks, run.data.training.names, len(run.data.training.classes),
        ledger=run.ledger, first_step=step, carried=manifest["metrics"],
    )  # fmt: skip
    rollbacks = dist.on_rank0(lambda: read_rollbacks(run.config.run_dir), run.ranks)
    guard = Guard(run.config.train, manifest.get("guard"), rollbacks)
    for note in (*notes_on_resuming(run, guard, step), *notes):
        metrics.say(note)
    batches = training_batches(
        run.config, run.data.training, run.data.plan, run.ranks,
        first_step=step, micro_batches=run.engine.micro_batches, quarantine=run.quarantine,
    )  # fmt: skip
    run.ledger.begins()
    # A stop may have come between a checkpoint and its evaluation.
    evaluate_if_due(run, metrics, step)
    run.saver.is_owed = False
    exit_code = updates = 0
    while step < total and not exit_code:
        outcome = train_step(run, batches, metrics, step, is_skipped=step + 1 in guard.passed_over)
        step, updates = step + 1, updates + bool(outcome.drawn)
        agreed = agree(run, metrics, outcome.drawn)
        problem = guard.judge(agreed.loss, outcome.grad_norm) if outcome.drawn else ""
        guard.note(step, problem, samples_of(outcome.drawn, run.data.training) if problem else [])
        report(run, metrics, guard, step, outcome, agreed)
        if guard.wants_rollback:
            roll_back(run, guard, rollbacks, metrics)
            exit_code = ROLLED_BACK
            break
        exit_code = agreed.exit_code
        save_if_due(run, metrics, guard, step, agreed)
        if not exit_code:
            evaluate_if_due(run, metrics, step)
        if updates == UNKNOWN_STEPS:
            run.watchdog.times_are_known()
        if step % COLLECT_EVERY_STEPS == 0:
            gc.collect()
    batches.close()
    if exit_code > 0:
        metrics.say(f"stopped on request after step {step}; the same command continues from there")
    elif not exit_code:
        metrics.say(f"finished: {step} steps; checkpoints, TensorBoard logs and metrics are in {run.config.run_dir}")
    run.ledger.note(step)
    metrics.close()
    return exit_code


def train_step(run: Run, batches: Iterator[ByteBatch], metrics: Metrics, step: int, *, is_skipped: bool) -> StepOutcome:
    """The step after `step` steps: fetch, forward and backward for each of the rank's micro-batches, then one update.

    The data of a step that `is_skipped` are drawn and dropped, so that all other steps keep theirs.
    """
    optim, engine, beat = run.config.optim, run.engine, run.watchdog.beat
    metrics.begin_step()
    drawn: list[Drawn] = []
    for _ in range(engine.micro_batches):
        beat(f"step {step + 1}: fetch")
        with metrics.waiting_for_data():
            batch = next(batches)
        if is_skipped:
            continue
        beat(f"step {step + 1}: forward and backward")
        sources, samples, batch = batch.sources, batch.samples, batch.to(run.ranks.device)
        logits = engine.forward(batch)
        loss, sums = loss_and_sums(logits, batch, len(run.data.training.splits), optim.label_smoothing)
        engine.backward(loss)
        metrics.count(batch, sums)
        drawn.append(Drawn(sources, samples, loss.detach()))
    rate = learning_rate(step, run.config.train.steps, optim)
    if is_skipped:
        return StepOutcome(drawn, rate, 0.0, has_updated=False)
    beat(f"step {step + 1}: update")
    before = engine.updates
    grad_norm = engine.step(rate, ema_decay(step, optim))
    return StepOutcome(drawn, rate, grad_norm, has_updated=engine.updates > before)


def agree(run: Run, metrics: Metrics, drawn: list[Drawn]) -> Agreed:
    """The step's only control message: losses are added up in the order of the ranks, of flags the largest counts;
    collective. Raises AgreedError if rank 0 cannot write metrics."""
    loss = torch.stack([micro_batch.loss.double() for micro_batch in drawn]).sum().item() if drawn else 0.0
    flags = run.stop.exit_code, run.quarantine.news > 0, run.saver.is_writing(), metrics.problem_code
    everyones = dist.gather_numbers([loss, *flags])  # [ranks, 5]
    exit_code, has_bad_files, is_writing, problem_code = everyones[:, 1:].amax(0).int().tolist()
    if problem_code:
        raise dist.AgreedError(dist.from_first_rank(metrics.problem), exit_code=problem_code)
    mean_loss = everyones[:, 0].sum().item() / run.config.data.batch_samples
    return Agreed(mean_loss, exit_code, bool(has_bad_files), bool(is_writing))


def notes_on_resuming(run: Run, guard: Guard, step: int) -> list[str]:
    skipped = sorted(later for later in guard.passed_over if later > step)
    notes = [f"continuing {run.config.run_dir} after step {step}"] if step else []
    return notes + ([f"skipping steps {ranges_of(skipped)} ({ROLLBACKS})"] if skipped else [])


def report(run: Run, metrics: Metrics, guard: Guard, step: int, outcome: StepOutcome, agreed: Agreed) -> None:
    """Tell of a step what there is to tell; collective."""
    if agreed.has_bad_files:
        report_bad_files(run, run.data.training, metrics)
    metrics.end_step(
        step, outcome.learning_rate, outcome.grad_norm, run.quarantine.count_until(step),
        is_skipped=not outcome.has_updated,
    )  # fmt: skip
    if guard.in_a_row and guard.in_a_row[-1]["step"] == step:
        bad = guard.in_a_row[-1]
        metrics.event("bad_step", step, {"problem": bad["problem"], "samples": bad["samples"]})
        what = "its update stays" if outcome.has_updated else "its update is skipped"
        metrics.say(f"step {step} · bad: {bad['problem']}; {what}, its samples are in metrics.jsonl")


def save_if_due(run: Run, metrics: Metrics, guard: Guard, step: int, agreed: Agreed) -> None:
    """Let a checkpoint count whose files are written, and start the next one where it is due; collective."""
    train, saver = run.config.train, run.saver
    is_over = bool(agreed.exit_code) or step == train.steps
    saver.is_owed = saver.is_owed or step % train.save_every == 0
    # Not while it goes badly: it may have to go back, and weights that spike are not worth keeping.
    is_due = is_over or (saver.is_owed and not guard.in_a_row)
    if saver.under_way and (is_due or not agreed.is_writing):
        finish_save(run, metrics, step)
    if is_due:
        start_save(run, metrics, guard, step)
        saver.is_owed = False
    if is_over:
        finish_save(run, metrics, step)


def start_save(run: Run, metrics: Metrics, guard: Guard, step: int) -> None:
    """Take the copy of which the checkpoint is written; collective."""
    run.ledger.note(step)
    with run.watchdog.patient(f"step {step}: copy for the checkpoint"), run.ledger.stalled():
        progress = {"step": step, "updates": run.engine.updates, "metrics": metrics.carry(), "guard": guard.carry()}
        run.saver.start(run.engine, {**progress, **run.facts})


def finish_save(run: Run, metrics: Metrics, step: int) -> None:
    """Wait for the save that is under way, if it is not done yet, and let it count; collective."""
    where = f"step {step}: waiting for the checkpoint's files"
    with run.watchdog.patient(where), run.ledger.stalled():
        path = run.saver.finish(wait=lambda: run.watchdog.beat(where))
    metrics.say(f"saved {path}")


def roll_back(run: Run, guard: Guard, rollbacks: list[dict], metrics: Metrics) -> None:
    """Go back to the checkpoint before the bad steps; collective. Raises AgreedError if that was tried enough."""
    if run.saver.under_way:
        finish_save(run, metrics, guard.in_a_row[-1]["step"])
    metrics.close()
    metrics.say(dist.on_rank0(lambda: go_back(run.config.run_dir, rollbacks, guard.in_a_row), run.ranks))


def evaluate_if_due(run: Run, metrics: Metrics, step: int) -> None:
    """Evaluate after `step` steps if the config asks for it there, or the run is at its end; once."""
    every = run.config.train.eval_every
    due = step >= run.config.train.steps or (every and step and step % every == 0)
    if not run.data.validation.splits or not due or metrics.last_evaluation == step:
        return
    if run.saver.under_way:  # so that it counts if the evaluation fails, or is all that a stop leaves time for
        finish_save(run, metrics, step)
    where = f"step {step}: evaluation"
    began = time.perf_counter()
    with run.watchdog.patient(where):
        run.engine.module.eval()
        with run.engine.averaged():  # what predict uses, and what `keep_best` is to judge
            result = evaluate(
                run.engine.forward, run.config, run.data.validation, run.ranks, run.quarantine, step,
                progress=lambda *_: run.watchdog.beat(where),
            )  # fmt: skip
        run.engine.module.train()
    metrics.evaluation(step, result, time.perf_counter() - began)
    report_bad_files(run, run.data.validation, metrics)


def report_bad_files(run: Run, sources: Sources, metrics: Metrics) -> None:
    """Name the files that could not be read, and stop if they are too many; collective."""
    for bad in run.quarantine.share(run.ranks, sources.sizes, run.config.data.max_bad_share):
        metrics.say(f"bad file, see {run.quarantine.path}: {bad.describe()}")


def say(run: Run, text: str) -> None:
    if run.ranks.is_first:
        print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bfsys/train.py", description=summary_of(__doc__))
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example optim.lr=3e-4")
    parser.add_argument("--dry-run", action="store_true", help="check config and data, show the arithmetic, stop")
    parser.add_argument("--no-data", action="store_true", help="with --dry-run: leave the data alone")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_intermixed_args(arguments)
    if args.no_data and not args.dry_run:
        parser.error("--no-data goes with --dry-run")
    if not args.dry_run:
        console.go_on_without()
    ranks = dist.Ranks()
    try:
        ranks = dist.ranks_from_environment()
        config = dist.same_errors_on_all(lambda: load_config(args.config, args.overrides))
        if args.dry_run:
            if ranks.is_first:
                dry_run(config, ranks.world_size, with_data=not args.no_data)
            return 0
        console.go_on_without(config.run_dir / "log" / f"rank-{ranks.rank}.log")
        if not config.model.compiled:  # otherwise DeepSpeed has its Muon compiled while it starts, which takes 2 s
            os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        # Every ragged batch wants blocks of other sizes, and fixed blocks would leave gaps that none of them fits.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        dist.start(ranks, config.train.collective_timeout_s)
        exit_code = train(config, ranks)
        if ranks.is_first:
            note_end(config.run_dir, exit_code, "stopped on request" if exit_code else "finished")
        dist.stop()
        return exit_code
    except dist.AgreedError as error:
        dist.stop()
        if ranks.local_rank == 0:  # once per node is enough
            raise
        return error.exit_code
    except UserError as error:  # of this rank alone
        who = f"rank {ranks.rank}: " if ranks.world_size > 1 else ""
        for problem in error.problems:
            print(f"error: {who}{problem}", file=sys.stderr, flush=True)
        return error.exit_code
    except RuntimeError as error:
        if not (lost := dist.lost_connection(error)):
            raise
        print(
            f"error: rank {ranks.rank}: the connection to another rank was lost ({lost}); the first error in the other "
            "ranks' logs says why",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_CRASHED
    finally:
        # While other ranks wait for this one, NCCL cannot be taken down: that would wait for them.
        if ranks.world_size == 1:
            dist.stop()


if __name__ == "__main__":
    dist.leave(exit_code_of(main))

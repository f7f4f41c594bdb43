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
from dataclasses import dataclass

import torch

from bfsys import console, dist
from bfsys.checkpoint.files import Keep
from bfsys.checkpoint.loading import resume, set_weights
from bfsys.checkpoint.saving import Saver
from bfsys.config import Config, load_config
from bfsys.data.datasets import (
    Sources,
    any_remote,
    long_files,
)
from bfsys.data.loader import training_batches
from bfsys.data.plan import Plan
from bfsys.data.quarantine import Quarantine
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
from bfsys.model.byteformer import ByteFormer
from bfsys.optim import ema_decay, learning_rate
from bfsys.rehearsal import rehearse
from bfsys.run import open_data, prepare_run_dir, run_facts
from bfsys.watchdog import LEAST_S, Watchdog

ROLLED_BACK = -1  # instead of an exit code: go on from the checkpoint that is now the newest
UNKNOWN_STEPS = 3  # of a start, in which programs may still be compiled
COLLECT_EVERY_STEPS = 100  # garbage, on all ranks in the same step: ranks that do so at any time hold up each other


@dataclass(frozen=True)
class Run:
    """What stays the same from the start of the processes to their end."""

    config: Config
    ranks: dist.Ranks
    training: Sources
    validation: Sources | None
    plan: Plan
    facts: dict
    engine: Engine
    quarantine: Quarantine
    saver: Saver
    stop: StopRequests
    watchdog: Watchdog
    ledger: Ledger


def train(config: Config, ranks: dist.Ranks) -> int:
    """Train to the last step, or until a stop is requested; returns the exit code. Called on every rank."""
    stop = StopRequests()
    training, validation, plan = dist.same_errors_on_all(lambda: open_data(config, ranks))
    facts = run_facts(config, training, plan)
    directory = prepare_run_dir(config, facts, ranks)
    of_train, patience_s = config.train, config.train.collective_timeout_s
    # A shard may take its time to come from elsewhere, and its server may be away for a while.
    least_s = patience_s if any_remote(training) else LEAST_S
    watchdog = Watchdog(config.run_dir, ranks, limit_s=of_train.hang_timeout_s, patience_s=patience_s, least_s=least_s)
    ledger = dist.same_errors_on_all(lambda: Ledger(config.run_dir, ranks.is_first))
    keep = Keep(of_train.keep_checkpoints, of_train.keep_every, of_train.keep_best, of_train.best_metric)
    saver = Saver(config.run_dir, ranks, keep)
    try:
        quarantine = Quarantine.load(config.run_dir, ranks)
        quarantine.check(training.sizes, config.data.max_bad_share)
        torch.manual_seed(config.train.seed)
        model = ByteFormer(
            config.model.architecture(),
            len(training.classes),
            config.model.mode,
            config.model.activation_checkpointing,
            compiled=config.model.compiled and ranks.device.type == "cuda",
        )
        weights, notes = initial_weights(model, config, training.classes, ranks) if directory.is_new else ({}, [])
        notes = [*directory.notes, *notes, *long_files(config, training)]
        engine = Engine(model, config, ranks)
        dist.bound_all_groups(of_train.collective_timeout_s)
        run = Run(config, ranks, training, validation, plan, facts, engine, quarantine, saver, stop, watchdog, ledger)
        if ranks.device.type == "cuda":
            dist.same_errors_on_all(lambda: rehearse(engine, config, training, plan, ranks))
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


def make_steps(run: Run, manifest: dict, notes: list[str]) -> int:
    """Train on from a checkpoint that the engine has loaded, to the end, a stop, or a roll-back (ROLLED_BACK)."""
    config, ranks, engine, saver, watchdog = run.config, run.ranks, run.engine, run.saver, run.watchdog
    step = first_step = manifest["step"]
    run.ledger.resumed(step)
    metrics = Metrics(
        config, ranks, run.training.names, len(run.training.classes),
        ledger=run.ledger, first_step=first_step, carried=manifest["metrics"],
    )  # fmt: skip
    read = dist.same_errors_on_all(lambda: read_rollbacks(config.run_dir) if ranks.is_first else None)
    rollbacks = dist.from_first_rank(read)
    guard = Guard(config.train, manifest.get("guard"), rollbacks)
    skipped = sorted(step_ for step_ in guard.passed_over if step_ > step)
    for note in (
        *([f"continuing {config.run_dir} after step {step}"] if step else []),
        *([f"skipping steps {ranges_of(skipped)} ({ROLLBACKS})"] if skipped else []),
        *notes,
    ):
        metrics.say(note)
    batches = training_batches(config, run.training, run.plan, ranks, first_step=step, quarantine=run.quarantine)
    exit_code = made = 0  # steps that were not passed over
    is_owed = False  # a checkpoint
    run.ledger.begins()
    # A stop may have come between a checkpoint and its evaluation.
    evaluate_if_due(run, metrics, step)
    while step < config.train.steps and not exit_code:
        metrics.begin_step()
        is_passed_over = step + 1 in guard.passed_over
        drawn: list[Drawn] = []
        for _ in range(engine.micro_batches):
            watchdog.beat(f"step {step + 1}: fetch")
            with metrics.waiting_for_data():
                batch = next(batches)
            if is_passed_over:
                continue
            watchdog.beat(f"step {step + 1}: forward and backward")
            sources, samples, batch = batch.sources, batch.samples, batch.to(ranks.device)
            logits = engine.forward(batch)
            loss, sums = loss_and_sums(logits, batch, len(run.training.splits), config.optim.label_smoothing)
            engine.backward(loss)
            metrics.count(batch, sums)
            drawn.append(Drawn(sources, samples, loss.detach()))
        rate, grad_norm, problem = learning_rate(step, config.train.steps, config.optim), 0.0, ""
        if not is_passed_over:
            watchdog.beat(f"step {step + 1}: update")
            updates = engine.updates
            grad_norm = engine.step(rate, ema_decay(step, config.optim))
            problem = guard.judge(mean_loss(drawn, config), grad_norm)
        is_skipped = is_passed_over or engine.updates == updates
        step, made = step + 1, made + (not is_passed_over)
        guard.note(step, problem, samples_of(drawn, run.training) if problem else [])
        exit_code, bad_files, is_writing, problem_code = dist.agree_on_max(
            run.stop.exit_code, run.quarantine.news, saver.is_writing(), metrics.problem_code
        )
        if problem_code:
            raise dist.AgreedError(dist.from_first_rank(metrics.problem), exit_code=problem_code)
        if bad_files:
            report_bad_files(run, run.training, metrics)
        metrics.end_step(step, rate, grad_norm, run.quarantine.count_until(step), is_skipped=is_skipped)
        if problem:
            report_bad_step(guard.in_a_row[-1], is_skipped, metrics)
        if guard.wants_rollback:
            roll_back(run, guard, rollbacks, metrics)
            exit_code = ROLLED_BACK
            break
        is_over = exit_code or step == config.train.steps
        is_owed = is_owed or step % config.train.save_every == 0
        # Not while it goes badly: it may have to go back, and weights that spike are not worth keeping.
        is_due = is_over or (is_owed and not guard.in_a_row)
        if saver.under_way and (is_due or not is_writing):
            finish_save(run, metrics, step)
        if is_due:
            start_save(run, metrics, guard, step)
            is_owed = False
        if is_over:
            finish_save(run, metrics, step)
        if not exit_code:
            evaluate_if_due(run, metrics, step)
        if made == UNKNOWN_STEPS:
            watchdog.times_are_known()
        if step % COLLECT_EVERY_STEPS == 0:
            gc.collect()
    batches.close()
    if exit_code > 0:
        metrics.say(f"stopped on request after step {step}; the same command continues from there")
    elif not exit_code:
        metrics.say(f"finished: {step} steps; checkpoints, TensorBoard logs and metrics are in {config.run_dir}")
    run.ledger.note(step)
    metrics.close()
    return exit_code


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


def mean_loss(drawn: list[Drawn], config: Config) -> float:
    """Of a step, over all ranks; collective."""
    mine = torch.stack([micro_batch.loss.double() for micro_batch in drawn]).sum().cpu()
    return float(dist.sum_over_ranks(mine)) / config.data.batch_samples


def report_bad_step(bad: dict, is_skipped: bool, metrics: Metrics) -> None:
    metrics.event("bad_step", bad["step"], {"problem": bad["problem"], "samples": bad["samples"]})
    what = "its update is skipped" if is_skipped else "its update stays"
    metrics.say(f"step {bad['step']} · bad: {bad['problem']}; {what}, its samples are in metrics.jsonl")


def roll_back(run: Run, guard: Guard, rollbacks: list[dict], metrics: Metrics) -> None:
    """Go back to the checkpoint before the bad steps; collective. Raises AgreedError if that was tried enough."""
    if run.saver.under_way:
        finish_save(run, metrics, guard.in_a_row[-1]["step"])
    metrics.close()
    metrics.say(
        dist.same_errors_on_all(
            lambda: go_back(run.config.run_dir, rollbacks, guard.in_a_row) if run.ranks.is_first else ""
        )
    )


def evaluate_if_due(run: Run, metrics: Metrics, step: int) -> None:
    """Evaluate after `step` steps if the config asks for it there, or the run is at its end; once."""
    every = run.config.train.eval_every
    due = step >= run.config.train.steps or (every and step and step % every == 0)
    if run.validation is None or not due or metrics.last_evaluation == step:
        return
    if run.saver.under_way:  # so that it counts if the evaluation fails, or is all that a stop leaves time for
        finish_save(run, metrics, step)
    where = f"step {step}: evaluation"
    began = time.perf_counter()
    with run.watchdog.patient(where):
        run.engine.module.eval()
        with run.engine.averaged():  # what predict uses, and what `keep_best` is to judge
            result = evaluate(
                run.engine.forward, run.config, run.validation, run.ranks, run.quarantine, step,
                progress=lambda *_: run.watchdog.beat(where),
            )  # fmt: skip
        run.engine.module.train()
    metrics.evaluation(step, result, time.perf_counter() - began)
    report_bad_files(run, run.validation, metrics)


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

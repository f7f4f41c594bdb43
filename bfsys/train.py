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
import math
import time
from importlib.metadata import version

import torch

from bfsys import checkpoint, dist, typed_yaml
from bfsys.config import Config, load_config
from bfsys.data.datasets import (
    Sources,
    content_facts,
    index_problems,
    long_files,
    make_plan,
    open_evaluation,
    open_training,
)
from bfsys.data.loader import training_batches
from bfsys.data.plan import Plan, lanes_of_rank
from bfsys.data.quarantine import Quarantine
from bfsys.dryrun import dry_run
from bfsys.engine import Engine
from bfsys.errors import EXIT_USER_ERROR, UserError, run_command
from bfsys.evaluate import evaluate, short_files
from bfsys.faults import StopRequests
from bfsys.initial import initial_weights
from bfsys.loss import loss_and_sums
from bfsys.metrics import Metrics
from bfsys.model.byteformer import ByteFormer
from bfsys.optim import ema_decay, learning_rate


def train(config: Config, ranks: dist.Ranks) -> int:
    """Train to the last step, or until a stop is requested; returns the exit code. Called on every rank."""
    stop = StopRequests()
    training, validation, plan = dist.same_errors_on_all(lambda: open_data(config, ranks))
    start = find_start(config, training, plan, ranks)
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
    given, notes = initial_weights(model, config, training.classes, ranks) if not start else ({}, [])
    engine = Engine(model, config, ranks)
    if given:  # in float32, where the engine has rounded the model to its precision
        checkpoint.set_weights(engine, given)
        given.clear()
    manifest = checkpoint.load(engine, start) if start else {"step": 0, "metrics": None}
    step = first_step = manifest["step"]
    metrics = Metrics(
        config, ranks, training.names, len(training.classes), first_step=first_step, carried=manifest["metrics"]
    )
    if start:
        metrics.say(f"continuing {config.run_dir} after step {first_step}")
    for note in notes + long_files(config, training):
        metrics.say(note)
    batches = training_batches(config, training, plan, ranks, first_step=first_step, quarantine=quarantine)
    exit_code = 0
    # A stop may have come between a checkpoint and its evaluation.
    evaluate_if_due(engine, config, validation, ranks, metrics, quarantine, step)
    while step < config.train.steps and not exit_code:
        metrics.begin_step()
        for _ in range(engine.micro_batches):
            with metrics.waiting_for_data():
                batch = next(batches).to(ranks.device)
            loss, sums = loss_and_sums(engine.forward(batch), batch, len(training.splits), config.optim.label_smoothing)
            engine.backward(loss)
            metrics.count(batch, sums)
        rate = learning_rate(step, config.train.steps, config.optim)
        grad_norm = engine.step(rate, ema_decay(step, config.optim))
        check_finite(grad_norm, step, config)
        step += 1
        exit_code, bad_files = dist.agree_on_max(stop.exit_code, quarantine.news)
        if bad_files:
            report_bad_files(quarantine, training, config, ranks, metrics)
        metrics.end_step(step, rate, grad_norm, len(quarantine.until(step)))
        if exit_code or step == config.train.steps or step % config.train.save_every == 0:
            facts = {"step": step, "metrics": metrics.carry(), **run_facts(config, training, plan)}
            path = checkpoint.save(engine, config.run_dir, facts, ranks=ranks, keep=config.train.keep_checkpoints)
            metrics.say(f"step {step} · saved {path}")
        if not exit_code:
            evaluate_if_due(engine, config, validation, ranks, metrics, quarantine, step)
    if exit_code:
        metrics.say(f"stopped on request after step {step}; the same command continues from there")
    else:
        metrics.say(f"finished: {step} steps; checkpoints, TensorBoard logs and metrics are in {config.run_dir}")
    stop.close()
    metrics.close()
    return exit_code


def evaluate_if_due(
    engine: Engine,
    config: Config,
    validation: Sources | None,
    ranks: dist.Ranks,
    metrics: Metrics,
    quarantine: Quarantine,
    step: int,
) -> None:
    """Evaluate after `step` steps if the config asks for it there, or the run is at its end; once."""
    every = config.train.eval_every
    due = step >= config.train.steps or (every and step and step % every == 0)
    if validation is None or not due or metrics.last_evaluation == step:
        return
    began = time.perf_counter()
    engine.module.eval()
    result = evaluate(engine.forward, config, validation, ranks, quarantine, step)
    engine.module.train()
    metrics.evaluation(step, result, time.perf_counter() - began)
    report_bad_files(quarantine, validation, config, ranks, metrics)


def report_bad_files(
    quarantine: Quarantine, sources: Sources, config: Config, ranks: dist.Ranks, metrics: Metrics
) -> None:
    """Name the files that could not be read, and stop if they are too many; collective."""
    for bad in quarantine.share(ranks, sources.sizes, config.data.max_bad_share):
        metrics.say(f"bad file, see {quarantine.path}: {bad.describe()}")


def check_finite(grad_norm: float, step: int, config: Config) -> None:
    """Stop before weights that are no longer numbers replace good checkpoints. All ranks see the same norm."""
    if not math.isfinite(grad_norm):
        raise dist.AgreedError(
            f"step {step + 1}: the norm of the gradient is {grad_norm}; training cannot go on from here. The "
            f"checkpoints in {config.run_dir} are from before; try a lower optim.lr, or optim.clip_norm=1"
        )


def open_data(config: Config, ranks: dist.Ranks) -> tuple[Sources, Sources | None, Plan]:
    """Training sources, validation sources (None if no source has that split) and the plan."""
    training = open_training(config)
    validation = open_evaluation(config, config.data.eval_split, training.classes)
    lanes_of_rank(config.data.lanes, ranks.rank, ranks.world_size)
    problems = [p for part in (training, validation) for p in short_files(config, part)]
    problems += [p for part in (training, validation) for p in index_problems(part, ranks.rank, ranks.world_size)]
    if problems:
        raise UserError(*problems)
    return training, validation if validation.splits else None, make_plan(config, training)


def run_facts(config: Config, training: Sources, plan: Plan) -> dict:
    """What makes a checkpoint self-contained, and what a resume must agree with."""
    return {
        "classes": list(training.classes),
        "plan": {**plan.facts, **content_facts(config, training)},
        "config": typed_yaml.to_tree(config),
        "versions": {name: version(name) for name in ("bfsys", "torch", "deepspeed")},
    }


def find_start(config: Config, training: Sources, plan: Plan, ranks: dist.Ranks) -> Path | None:
    """The checkpoint to continue from, decided by rank 0; raises UserError if it is of another run.

    Writes the run directory's config.yaml.
    """

    def look() -> Path | None:
        if not ranks.is_first:
            return None
        path, problems = checkpoint.find_newest(config.run_dir)
        for problem in problems:
            print(f"skipped a damaged checkpoint: {problem}", file=sys.stderr)
        if path is None and problems:
            raise UserError(
                f"{config.run_dir}: no checkpoint is whole, see above; to begin anew, give another name=… "
                f"or move the directory away"
            )
        if path:
            checkpoint.check_same_run(path, run_facts(config, training, plan))
        try:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            (config.run_dir / "config.yaml").write_text(typed_yaml.dump(config))
        except OSError as error:
            raise UserError(f"run directory {config.run_dir}: cannot be written: {error.strerror}") from None
        return path

    return dist.from_first_rank(dist.same_errors_on_all(look))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bfsys/train.py", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example optim.lr=3e-4")
    parser.add_argument("--dry-run", action="store_true", help="check config and data, show the arithmetic, stop")
    parser.add_argument("--no-data", action="store_true", help="with --dry-run: leave the data alone")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_intermixed_args(arguments)
    if args.no_data and not args.dry_run:
        parser.error("--no-data goes with --dry-run")
    ranks = dist.ranks_from_environment()
    try:
        config = dist.same_errors_on_all(lambda: load_config(args.config, args.overrides))
        if args.dry_run:
            if ranks.is_first:
                dry_run(config, ranks.world_size, with_data=not args.no_data)
            return 0
        dist.start(ranks, config.train.collective_timeout_s)
        return train(config, ranks)
    except dist.AgreedError:
        if ranks.local_rank == 0:  # once per node is enough
            raise
        return EXIT_USER_ERROR
    except UserError as error:  # of this rank alone
        for problem in error.problems:
            print(f"error: rank {ranks.rank}: {problem}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except RuntimeError as error:
        if not dist.is_lost_connection(error):
            raise
        print(f"error: rank {ranks.rank}: lost the other ranks; the one that failed says why", file=sys.stderr)
        return 1
    finally:
        dist.stop()


if __name__ == "__main__":
    try:
        run_command(main)
    except SystemExit as end:
        dist.leave(end.code)

"""The training loop: plan, fetch, forward, step, save, evaluate.

`deepspeed bfsys/train.py CONFIG` starts one process per GPU, and each process runs the command `train`. A second start
resumes from the newest intact checkpoint of the run directory.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # launchers put this file's folder first in sys.path; its modules would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from bfsys.start import main

    main("train", "bfsys/train.py")

import faulthandler
import gc
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bfsys import console, dist
from bfsys.batch import ByteBatch
from bfsys.checkpoint.loading import resume, set_weights
from bfsys.config import Config
from bfsys.confusion import Answers
from bfsys.data.streaming.datasets import fetch_descriptions
from bfsys.data.streaming.loader import LoaderCrashed, training_batches
from bfsys.data.streaming.run_data import RunData, open_run_data
from bfsys.engine import Engine
from bfsys.errors import EXIT_CRASHED, UserError, is_out_of_memory
from bfsys.evaluate import evaluate
from bfsys.init_from import initial_weights
from bfsys.loss import LOSS, training_loss
from bfsys.micro_batches import agree_on_micro_batches
from bfsys.model.byteformer import ByteFormer
from bfsys.optim import ema_decay, learning_rate
from bfsys.rehearsal import TO_NEED_LESS, rehearse
from bfsys.run_dir import noting_failed_start, prepare_run_dir, run_facts
from bfsys.supervision.guard import Drawn
from bfsys.supervision.run_end import note_end
from bfsys.supervision.supervisor import StepOutcome, Supervisor

ROLLED_BACK = -1  # instead of an exit code: continue from the checkpoint that is now the newest


def train(config: Config, ranks: dist.Ranks) -> int:
    """Train to the last step, or until a stop is requested; returns the exit code. Collective."""
    with noting_failed_start(config, ranks):
        descriptions = dist.on_rank0(lambda: fetch_descriptions(config), ranks)  # so that all ranks have the same
        data = dist.same_errors_on_all(lambda: open_run_data(config, ranks, descriptions))
        facts = dist.on_rank0(lambda: run_facts(data), ranks)  # runs git
        directory = prepare_run_dir(config, facts, ranks)
    # Before the supervisor exists, a signal ends the process at once: there is nothing to save, and waits may be long.
    with directory, Supervisor(data, facts, ranks, directory.check_same) as supervisor:
        supervisor.load_quarantine()
        micro_batches, note = agree_on_micro_batches(data, ranks)
        notes = [*directory.notes, *(data.notes if ranks.is_rank_zero else ()), note]
        torch.manual_seed(config.train.seed)
        model = ByteFormer(
            config.model.architecture(),
            len(data.training.classes),
            config.model.mode,
            config.model.activation_checkpointing,
            compiled=config.model.compiled and ranks.device.type == "cuda",
            init=config.model.init,
            with_content=config.content_weight > 0,
        )
        weights: dict[str, Tensor] = {}
        if directory.is_new:
            weights, taken_over = initial_weights(model, config, data.training.classes, ranks)
            notes += taken_over
        engine = Engine(model, config, ranks, micro_batches)
        dist.leave_hangs_to_the_watchdog()
        if ranks.device.type == "cuda":
            dist.same_errors_on_all(lambda: rehearse(engine, data, ranks))
        if weights:  # set in float32, since the engine has rounded the model to its precision
            set_weights(engine, weights)
        if directory.is_new:
            references = dist.on_rank0(data.read_reference_files, ranks)
            facts["reference_files"] = references.to_tree() if references else None
            supervisor.save_first(engine)
        with collecting_garbage_by_hand():
            exit_code = ROLLED_BACK
            while exit_code == ROLLED_BACK:
                supervisor.watchdog.be_patient("resuming")
                manifest = resume(
                    engine, config.run_dir, ranks, say=supervisor.say, replace_damaged=supervisor.copies.replace_damaged
                )
                facts["reference_files"] = manifest.get("reference_files")
                # The origin of the weights, for model cards: after the first start, train.init_from has no effect.
                facts["config"]["train"]["init_from"] = manifest["config"]["train"].get("init_from")
                supervisor.resume(manifest, notes)
                exit_code = run_steps(data, engine, supervisor, manifest["step"])
                notes = []
        return exit_code


def run_steps(data: RunData, engine: Engine, supervisor: Supervisor, step: int) -> int:
    """Continue after `step` steps. Returns 0 at the end of the run, the exit code of a stop, or ROLLED_BACK."""
    config, ranks = data.config, supervisor.ranks
    batches = training_batches(
        config, data.training, data.plan, ranks,
        first_step=step, micro_batches=engine.micro_batches, quarantine=supervisor.quarantine,
    )  # fmt: skip
    supervisor.ledger.first_step_begins()
    evaluate_if_due(data, engine, supervisor, step)  # a stop may have been between a checkpoint and its evaluation
    exit_code = 0
    while step < config.train.steps and not exit_code:
        outcome = train_step(data, engine, supervisor, batches, step)
        step += 1
        agreed = supervisor.agree(outcome.drawn)
        supervisor.judge(step, outcome, agreed)
        if supervisor.guard.wants_rollback:
            supervisor.watchdog.be_patient("rolling back")
            batches.close()
            supervisor.roll_back(step)
            return ROLLED_BACK
        exit_code = agreed.exit_code
        supervisor.save_if_due(engine, step, agreed)
        if not exit_code:
            evaluate_if_due(data, engine, supervisor, step)
        supervisor.end_step(step, outcome)
    batches.close()
    return supervisor.end_steps(step, engine.updates, exit_code)


def train_step(
    data: RunData, engine: Engine, supervisor: Supervisor, batches: Iterator[ByteBatch], step: int
) -> StepOutcome:
    """Make the step after `step` steps: forward and backward for each of the rank's micro-batches, then one update.

    The data of a skipped step are drawn and dropped, so the data of other steps do not change.
    """
    config, beat, drawn = data.config, supervisor.watchdog.beat, []
    rate = learning_rate(step, config.train.steps, config.optim)
    supervisor.metrics.begin_step()
    for _ in range(engine.micro_batches):
        batch = supervisor.fetch(batches, step)
        if step + 1 in supervisor.guard.skipped_steps:
            continue
        beat(f"step {step + 1}: forward and backward")
        sources, samples, batch = batch.sources, batch.samples, batch.to(engine.device)
        outputs = engine.forward(batch)
        loss, sums = training_loss(outputs, batch, len(data.training.splits), config)
        engine.backward(loss)
        supervisor.metrics.count(batch, sums)
        drawn.append(Drawn(sources, samples, sums[:, LOSS].sum()))
    if not drawn:
        return StepOutcome(drawn, rate, math.nan, has_updated=False)
    beat(f"step {step + 1}: update")
    before = engine.updates
    grad_norm = engine.step(rate, ema_decay(step, config.optim))
    return StepOutcome(drawn, rate, grad_norm, has_updated=engine.updates > before)


def evaluate_if_due(data: RunData, engine: Engine, supervisor: Supervisor, step: int) -> None:
    """Evaluate if an evaluation is due after `step` steps or at the end of the run; at most once per step."""
    config, ranks, metrics = data.config, supervisor.ranks, supervisor.metrics
    every = config.train.eval_every
    due = step >= config.train.steps or (every and step and step % every == 0)
    if not data.validation.splits or not due or metrics.last_evaluation == step:
        return
    if supervisor.saver.under_way:  # commit the checkpoint first, in case the evaluation fails or is interrupted
        supervisor.finish_save(step)
    where = f"step {step}: evaluation"
    began = time.perf_counter()
    answers = Answers(len(data.training.classes))
    with supervisor.watchdog.patient(where):
        engine.module.eval()
        with engine.averaged():  # predict uses the average, and `keep_best` judges it
            result = evaluate(
                engine.forward, config, data.validation, ranks, supervisor.quarantine, step,
                progress=lambda *_: supervisor.watchdog.beat(where), answers=answers,
            )  # fmt: skip
            embedding = engine.module.get_parameter("stem.embedding").detach().clone()
        engine.module.train()
    seconds = time.perf_counter() - began
    metrics.show_answers(step, data.training.classes, answers, data.validation.key_of, embedding)
    metrics.evaluation(step, result, seconds, data.evaluated)
    supervisor.report_bad_files(data.validation)


@contextmanager
def collecting_garbage_by_hand() -> Iterator[None]:
    """Disable automatic garbage collection. The supervisor collects garbage, on all ranks at the same step. Existing
    objects are excluded."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def train_rank(config: Config, ranks: dist.Ranks) -> int:
    """Run one rank from its config to its end. Returns the exit code.

    Raises AgreedError only on the first rank of each node, so that the error is printed once per node.
    """
    console.go_on_without(config.run_dir / "log" / f"rank-{ranks.rank}.log")
    # Without this, a rank that SIGBUS ends prints nothing. An index that is truncated while it is mapped causes SIGBUS.
    faulthandler.enable(2, all_threads=False)
    try:
        # Every ragged batch needs blocks of other sizes, and blocks of fixed size would fragment the memory. PyTorch
        # ignores PYTORCH_ALLOC_CONF if the variable with the older name is set, too.
        if "PYTORCH_ALLOC_CONF" not in os.environ:
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        dist.start(ranks, config.train.collective_timeout_s)
        exit_code = train(config, ranks)
        if ranks.is_rank_zero:
            note_end(config.run_dir, exit_code, "stopped on request" if exit_code else "finished")
        dist.stop()
        return exit_code
    except dist.AgreedError as error:
        dist.stop()
        if ranks.local_rank == 0:  # once per node is enough
            raise
        return error.exit_code
    except UserError as error:  # an error of this rank alone
        who = f"rank {ranks.rank}: " if ranks.world_size > 1 else ""
        raise UserError(*(who + problem for problem in error.problems), exit_code=error.exit_code) from None
    except LoaderCrashed as error:
        raise UserError(f"rank {ranks.rank}: {error}", exit_code=EXIT_CRASHED) from None
    except RuntimeError as error:
        is_of_loader = str(error).startswith("Caught ")  # in a loader process; the text has its traceback
        if is_out_of_memory(error) and not is_of_loader:
            # Another process may have filled the GPU, so a restart may help.
            what = str(error).splitlines()[0].rstrip(".")
            problem = f"not enough memory on {ranks.device}: {what}. {TO_NEED_LESS}"
            raise UserError(f"rank {ranks.rank}: {problem}", exit_code=EXIT_CRASHED) from None
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
        # With other ranks, NCCL cannot be shut down here: that would wait for ranks that wait for this one.
        if ranks.world_size == 1:
            dist.stop()

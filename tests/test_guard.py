"""Steps that are no numbers leave no trace; steps that stay bad are gone around."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch

from bfsys.checkpoint.files import all_checkpoints, checkpoint_name, read_manifest
from bfsys.config import Train, load_config
from bfsys.data.datasets import make_plan, open_training
from bfsys.errors import EXIT_DIVERGED
from bfsys.faults import how_it_ended
from bfsys.guard import LEAST_STEPS, Guard, read_rollbacks
from tests.chaos.ranks import Ranks
from tests.test_train import lines, losses, newest, tensors

STATES = ("weight", "exp_avg", "exp_avg_sq", "ema")


def samples_of_step(config_file: Path, step: int) -> list[tuple[int, int]]:
    """(source, sample) of the `step`-th step, from 1; of its first micro-batch."""
    config = load_config(config_file)
    micro_batch = make_plan(config, open_training(config)).micro_batch(step - 1, 0)
    return [(int(s), int(i)) for s, i in zip(micro_batch.source, micro_batch.sample, strict=True)]


def run_poisoned(
    config_file: Path, folder: Path, name: str, kind: str, samples: list, *more: str
) -> tuple[Path, Ranks]:
    overrides = [f"name={name}", "train.save_every=1", "train.keep_checkpoints=100", *more]
    return config_file.parent / "runs" / name, Ranks(
        2, config_file, overrides, folder, {"kind": kind, "samples": samples}
    )


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_no_number_changes_nothing(
    config_file: Path, tmp_path: Path, stage: int, precision: str, kind: str
) -> None:
    if kind == "inf" and precision == "bf16":
        pytest.skip("as nan")
    poison = samples_of_step(config_file, 5)
    more = [f"train.zero_stage={stage}", f"train.precision={precision}", "train.steps=7"]
    run, ranks = run_poisoned(config_file, tmp_path / "log", "poisoned", kind, poison, *more)
    assert ranks.end() == [0, 0], ranks.said()
    before, after, later = (run / "checkpoints" / checkpoint_name(step) for step in (4, 7, 7))
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4, 6, 7]  # there is no loss to tell of step 5
    assert all(math.isfinite(loss) for loss in losses(run))
    (bad,) = lines(run, "bad_step")
    assert bad["step"] == 5
    keys = {f"{('a', 'b')[s]}/{open_training(load_config(config_file)).splits[s].key(i)}" for s, i in poison}
    assert keys <= set(bad["samples"])
    assert (len(bad["samples"]) == 2) == (kind != "gradient")  # a micro-batch, or the whole step
    # Nothing is saved while it goes badly: 6 is the first after 4. It made one update on what 4 left.
    assert not (run / "checkpoints" / checkpoint_name(5)).exists()
    assert read_manifest(after)["updates"] == 6
    for state in STATES:
        assert all(tensor.isfinite().all() for tensor in tensors(later, state).values())
        assert tensors(before, state).keys() == tensors(after, state).keys()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_after_it_weights_moments_and_average_are_those_before(
    config_file: Path, tmp_path: Path, stage: int, precision: str
) -> None:
    """The bad step is the last one, and saved."""
    poison = samples_of_step(config_file, 5)
    more = [f"train.zero_stage={stage}", f"train.precision={precision}", "train.steps=5"]
    run, ranks = run_poisoned(config_file, tmp_path / "log", "poisoned", "nan", poison, *more)
    assert ranks.end() == [0, 0], ranks.said()
    for state in STATES:
        before, after = (tensors(run / "checkpoints" / checkpoint_name(step), state) for step in (4, 5))
        assert before
        assert all(torch.equal(before[name], after[name]) for name in before), state
    assert read_manifest(newest(run))["updates"] == 4


def test_a_resume_after_a_skipped_step_equals_the_whole_run(config_file: Path, tmp_path: Path) -> None:
    poison = samples_of_step(config_file, 3)
    run, ranks = run_poisoned(config_file, tmp_path / "log", "poisoned", "nan", poison)
    assert ranks.end() == [0, 0], ranks.said()
    again = run.with_name("again")
    shutil.copytree(run, again)
    for path in all_checkpoints(again)[-4:]:
        shutil.rmtree(path)
    ranks = Ranks(2, config_file, ["name=again", "train.save_every=1", "train.keep_checkpoints=100"], tmp_path / "log2")
    assert ranks.end() == [0, 0], ranks.said()
    assert losses(again) == losses(run)
    for state in STATES:
        one, other = tensors(newest(run), state), tensors(newest(again), state)
        assert all(torch.equal(one[name], other[name]) for name in one), state


def test_bad_steps_in_a_row_are_gone_around(config_file: Path, tmp_path: Path) -> None:
    poison = [pair for step in (5, 6, 7) for pair in samples_of_step(config_file, step)]
    run, ranks = run_poisoned(config_file, tmp_path / "log", "around", "nan", poison, "train.save_every=2")
    assert ranks.end() == [0, 0], ranks.said()
    (rollback,) = read_rollbacks(run)
    assert (rollback["from"], rollback["to"], rollback["steps"]) == (7, 4, [5, 6, 7])
    assert all(bad["samples"] for bad in rollback["bad"])
    assert "rolled back from step 7 to 4" in ranks.said()
    assert read_manifest(newest(run))["updates"] == 7
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4, 8, 9, 10]


def test_a_run_that_stays_bad_ends_with_its_samples(config_file: Path, tmp_path: Path) -> None:
    """From step 5 on every step is bad: back to 4 three times, passing over three steps each, and then it ends."""
    poison = [pair for step in range(5, 41) for pair in samples_of_step(config_file, step)]
    first = {tuple(pair) for step in range(1, 5) for pair in samples_of_step(config_file, step)}
    poison = [pair for pair in poison if pair not in first]
    run, ranks = run_poisoned(config_file, tmp_path / "log", "bad", "nan", poison, "train.steps=40")
    codes = ranks.end()
    assert codes == [EXIT_DIVERGED] * 2, ranks.said()
    assert len(read_rollbacks(run)) == 3
    assert "Traceback" not in ranks.said()
    reason = how_it_ended(run)["reason"]
    assert "bad steps again after 3 roll-backs" in reason
    assert lines(run, "bad_step")[-1]["samples"][0] in reason


def test_spikes_of_the_loss_are_bad_steps() -> None:
    rng = random.Random(0)
    guard = Guard(Train(), None, [])
    for _ in range(200):
        assert not guard.judge(2.0 * math.exp(rng.gauss(0, 0.1)), 1.0)
    assert "spike" in guard.judge(10.0, 1.0)
    assert not guard.judge(2.3, 1.0)
    assert not Guard(Train(spike_zscore=0.0), guard.carry(), []).judge(1e9, 1.0)
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)):
        assert guard.judge(loss, norm)


def test_a_young_run_has_no_spikes() -> None:
    guard = Guard(Train(), None, [])
    assert not any(guard.judge(10.0**i, 1.0) for i in range(LEAST_STEPS))


def test_no_false_alarm_on_losses_as_they_are() -> None:
    """Falling, noisy, with heavy tails (log-normal of sigma 0.7 around a curve that falls hundredfold)."""
    rng = random.Random(1)
    guard = Guard(Train(), None, [])
    verdicts = [guard.judge(3 * 100 ** (-i / 5000) * math.exp(rng.gauss(0, 0.7)), 1.0) for i in range(5000)]
    assert not any(verdicts)


def test_what_a_checkpoint_carries_gives_the_same_verdicts() -> None:
    rng = random.Random(2)
    whole, parts = Guard(Train(), None, []), Guard(Train(), None, [])
    for i in range(300):
        loss = math.exp(rng.gauss(0, 0.3)) * (40 if i % 50 == 49 else 1)
        assert whole.judge(loss, 1.0) == parts.judge(loss, 1.0)
        parts = Guard(Train(), json.loads(json.dumps(parts.carry())), [])

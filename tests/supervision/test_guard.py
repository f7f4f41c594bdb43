"""Non-finite steps change nothing, and a run rolls back and skips steps that stay bad."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from bfsys.checkpoint.files import all_checkpoints, checkpoint_name, commit, read_manifest, step_of
from bfsys.checkpoint.rollbacks import read_rollbacks
from bfsys.config import Train, load_config
from bfsys.data.streaming.datasets import make_plan, open_training
from bfsys.errors import EXIT_DIVERGED, UserError
from bfsys.launch.restart_policy import newest_step
from bfsys.supervision.guard import LEAST_STEPS, Guard, ranges_of, return_to_good_checkpoint
from bfsys.supervision.run_end import how_it_ended
from bfsys.supervision.supervisor import Agreed, Supervisor
from tests.chaos.ranks import Ranks, train_several
from tests.conftest import parameters_of_tests_with, tiny_config
from tests.forked import start_ranks
from tests.test_train import lines, losses, newest, tensors

STATES = ("weight", "exp_avg", "exp_avg_sq", "ema")


def samples_of_step(config_file: Path, step: int, lane: int = 0) -> list[tuple[int, int]]:
    """(source, sample) of a micro-batch of step number `step`, from 1."""
    config = load_config(config_file)
    micro_batch = make_plan(config, open_training(config)).micro_batch(step - 1, lane)
    return [(int(s), int(i)) for s, i in zip(micro_batch.source, micro_batch.sample, strict=True)]


def run_poisoned(
    config_file: Path, folder: Path, name: str, kind: str, samples: list, *more: str
) -> tuple[Path, Ranks]:
    overrides = [f"name={name}", "train.save_every=1", "train.keep_checkpoints=100", *more]
    return config_file.parent / "runs" / name, Ranks(
        2, config_file, overrides, folder, {"kind": kind, "samples": samples}
    )


# In each run every second step is bad, one of each kind. The state around the last one is compared bit for bit.
KINDS = {"fp32": ("nan", "loss", "gradient"), "bf16": ("nan", "gradient")}
COMBINATIONS = [(stage, precision, kind) for stage in (0, 1, 2, 3) for precision in KINDS for kind in KINDS[precision]]
# These cover all pairs of stage and precision, and of precision and kind. The other combinations are slow.
FAST = [c for c in COMBINATIONS if c[2] == KINDS[c[1]][(c[0] + (c[1] == "bf16")) % len(KINDS[c[1]])]]


def bad_steps(precision: str, last: str) -> dict[int, str]:
    """The kinds of the bad steps of a run, by step."""
    kinds = KINDS[precision]
    order = [kinds[(kinds.index(last) + 1 + i) % len(kinds)] for i in range(len(kinds))]
    return {2 * (i + 1): kind for i, kind in enumerate(order)}


def name_of(stage: int, precision: str, kind: str) -> str:
    return f"s{stage}-{precision}-{kind}"


@pytest.fixture(scope="module")
def poisoned_runs(
    request: pytest.FixtureRequest, datasets: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """(config file, folder of runs): the combinations whose tests were selected, on two ranks."""
    folder = tmp_path_factory.mktemp("poisoned")
    config_file = folder / "tiny.yaml"
    config_file.write_text(yaml.safe_dump(tiny_config(datasets, folder)))
    runs = []
    for parameters in parameters_of_tests_with("poisoned_runs", request):
        stage, precision, last = parameters["combination"]
        kinds = bad_steps(precision, last)
        steps = max(kinds)
        overrides = [f"name={name_of(stage, precision, last)}", f"train.zero_stage={stage}", f"train.steps={steps}",
                     f"train.precision={precision}", f"train.save_every={steps - 2}",
                     "train.keep_checkpoints=100"]  # fmt: skip
        poisons = [{"kind": kind, "samples": samples_of_step(config_file, step)} for step, kind in kinds.items()]
        runs.append((overrides, poisons))
    processes = start_ranks(2, train_several, (str(config_file), runs))
    try:
        for process in processes:
            said = process.communicate(900)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
    return config_file, folder / "runs"


@pytest.mark.parametrize(
    "combination",
    [pytest.param(c, id=name_of(*c), marks=() if c in FAST else pytest.mark.slow) for c in COMBINATIONS],
)
def test_a_non_finite_step_changes_nothing(combination: tuple[int, str, str], poisoned_runs: tuple[Path, Path]) -> None:
    config_file, runs = poisoned_runs
    run, kinds = runs / name_of(*combination), bad_steps(*combination[1:])
    steps = max(kinds)
    good = [step for step in range(1, steps + 1) if step not in kinds]
    saved = {step: run / "checkpoints" / checkpoint_name(step) for step in range(steps + 1)}
    # Nothing is saved after a bad step, unless the run ends there.
    assert [step for step, path in saved.items() if path.exists()] == [0, steps - 1, steps]
    assert [read_manifest(saved[step])["updates"] for step in (steps - 1, steps)] == [len(good)] * 2
    for state in STATES:
        before, after = tensors(saved[steps - 1], state), tensors(saved[steps], state)
        assert before
        assert all(torch.equal(before[name], after[name]) for name in before), state
        assert all(tensor.isfinite().all() for tensor in after.values())
    assert [line["step"] for line in lines(run)] == good  # the others have no loss
    assert all(math.isfinite(loss) for loss in losses(run))
    bad = lines(run, "bad_step")
    assert [line["step"] for line in bad] == list(kinds)
    splits = open_training(load_config(config_file)).splits
    for line in bad:
        assert {f"{'ab'[s]}/{splits[s].key(i)}" for s, i in samples_of_step(config_file, line["step"])} <= set(
            line["samples"]
        )
        # the whole step, or a micro-batch
        assert len(line["samples"]) == (8 if kinds[line["step"]] == "gradient" else 2)


def test_a_resume_after_a_skipped_step_equals_the_whole_run(config_file: Path, tmp_path: Path) -> None:
    poison = samples_of_step(config_file, 3)
    run, ranks = run_poisoned(config_file, tmp_path / "log", "poisoned", "nan", poison, "train.steps=6")
    assert ranks.end() == [0, 0], ranks.said()
    again = run.with_name("again")
    shutil.copytree(run, again)
    for path in all_checkpoints(again)[-2:]:
        shutil.rmtree(path)
    overrides = ["name=again", "train.steps=6", "train.save_every=1", "train.keep_checkpoints=100"]
    ranks = Ranks(2, config_file, overrides, tmp_path / "log2")
    assert ranks.end() == [0, 0], ranks.said()
    assert losses(again) == losses(run)
    for state in STATES:
        one, other = tensors(newest(run), state), tensors(newest(again), state)
        assert all(torch.equal(one[name], other[name]) for name in one), state


def test_a_skipped_step_does_not_end_a_row_of_bad_ones() -> None:
    guard = Guard(Train(), [])
    guard.record(1, "a spike", [])
    supervisor = SimpleNamespace(
        guard=guard, metrics=SimpleNamespace(end_step=lambda *_, **__: None), data=None,
        quarantine=SimpleNamespace(count_until=lambda step: 0),
    )  # fmt: skip
    skipped = SimpleNamespace(drawn=[], grad_norm=0.0, learning_rate=0.0, has_updated=False)
    Supervisor.judge(supervisor, 2, skipped, Agreed(0.0, 0, False, False))  # type: ignore[arg-type]
    assert [bad["step"] for bad in guard.bad_in_a_row] == [1]


def test_launchers_are_told_of_the_checkpoint_that_a_run_rolled_back_to(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        final = tmp_path / "checkpoints" / checkpoint_name(step)
        (work := final.with_name(".work")).mkdir(parents=True)
        commit(work, final, {"step": step, "updates": step}, {})
    assert newest_step(tmp_path) == 6
    return_to_good_checkpoint(tmp_path, [], [{"step": 4, "problem": "a spike", "samples": []}])
    assert newest_step(tmp_path) == 2


def test_bad_steps_in_a_row_are_rolled_back_and_skipped(config_file: Path, tmp_path: Path) -> None:
    poison = [pair for step in (5, 6, 7) for pair in samples_of_step(config_file, step)]
    run, ranks = run_poisoned(config_file, tmp_path / "log", "around", "nan", poison, "train.save_every=2")
    assert ranks.end() == [0, 0], ranks.said()
    (rollback,) = read_rollbacks(run)
    assert (rollback["from"], rollback["to"], rollback["steps"]) == (7, 4, [5, 6, 7])
    assert all(bad["samples"] for bad in rollback["bad"])
    assert "rolled back from step 7 to 4; skipping steps 5-7" in ranks.said()
    assert "skipping steps 5-7 (rollbacks.json)" in ranks.said()  # the next start prints it too
    assert "grad nan" not in ranks.said().partition("rolled back")[2]
    assert read_manifest(newest(run))["updates"] == 7
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4, 8, 9, 10]
    bad = lines(run, "bad_step")
    assert [line["step"] for line in bad] == [5, 6, 7]
    assert [line["samples"] for line in bad] == [step["samples"] for step in rollback["bad"]]


@pytest.mark.parametrize("stage", [*(pytest.param(s, marks=pytest.mark.slow) for s in (0, 1, 2)), 3])
def test_a_spike_of_the_loss_is_rolled_back_and_skipped_and_a_kill_changes_nothing(
    config_file: Path, tmp_path: Path, stage: int
) -> None:
    """The losses and updates of three steps are far too large. A second start must skip them like the first."""
    good, config = LEAST_STEPS + 1, yaml.safe_load(config_file.read_text())
    # Each rank has one micro-batch and one block in a step, because many steps take long.
    config["data"]["lanes"], config["model"]["layers"] = 2, 1
    config_file.write_text(yaml.safe_dump(config))
    poison = [pair for step in range(good + 1, good + 4) for pair in samples_of_step(config_file, step)]
    more = [f"train.steps={good + 5}", f"train.zero_stage={stage}", f"train.save_every={good // 3}"]
    run, ranks = run_poisoned(config_file, tmp_path / "log", "spike", "spike", poison, *more)
    assert ranks.end() == [0, 0], ranks.said()
    (rollback,) = read_rollbacks(run)
    assert (rollback["to"], rollback["steps"]) == (good, [good + 1, good + 2, good + 3])
    assert all("a spike" in bad["problem"] for bad in rollback["bad"])
    assert [line["step"] for line in lines(run)][-3:] == [good, good + 4, good + 5]

    again = run.with_name("again")  # like after a kill just after the roll-back; its samples are good now
    shutil.copytree(run, again)
    for path in all_checkpoints(again):
        if step_of(path) > good:
            shutil.rmtree(path)
    ranks = Ranks(2, config_file, ["name=again", *more[:2]], tmp_path / "log2")
    assert ranks.end() == [0, 0], ranks.said()
    assert [line["step"] for line in lines(again)][-3:] == [good, good + 4, good + 5]
    assert losses(again) == losses(run)
    for state in STATES:
        one, other = tensors(newest(run), state), tensors(newest(again), state)
        assert all(torch.equal(one[name], other[name]) for name in one), state


def test_a_run_that_stays_bad_ends_with_its_samples(config_file: Path, tmp_path: Path) -> None:
    """Every step from 5 on is bad. The run rolls back to 4 three times, skips three steps each time, and then ends."""
    good = {pair for step in range(1, 5) for lane in range(4) for pair in samples_of_step(config_file, step, lane)}
    poison = [(source, i) for source, size in ((0, 120), (1, 80)) for i in range(size) if (source, i) not in good]
    run, ranks = run_poisoned(config_file, tmp_path / "log", "bad", "nan", poison, "train.steps=20", "model.layers=1")
    codes = ranks.end()
    assert codes == [EXIT_DIVERGED] * 2, ranks.said()
    assert len(read_rollbacks(run)) == 3
    assert "Traceback" not in ranks.said()
    reason = how_it_ended(run)["reason"]
    assert "bad steps again after 3 roll-backs" in reason
    last = lines(run, "bad_step")[-1]
    assert f"\nsample of step {last['step']}: {last['samples'][0]}\n" in reason


def test_a_run_that_skips_all_steps_has_failed(config_file: Path, tmp_path: Path) -> None:
    """There are too few bad steps for a roll-back."""
    poison = [pair for step in (1, 2) for pair in samples_of_step(config_file, step)]
    run, ranks = run_poisoned(config_file, tmp_path / "log", "short", "nan", poison, "train.steps=2", "model.layers=1")
    assert ranks.end() == [EXIT_DIVERGED] * 2, ranks.said()
    assert "finished: 2 steps, 2 of which were skipped" in ranks.said()
    assert "all 2 steps were skipped, so the weights are still the initial ones" in how_it_ended(run)["reason"]


def test_steps_are_shown_as_ranges() -> None:
    assert ranges_of([3, 4, 5, 9, 11, 12]) == "3-5, 9, 11-12"
    assert ranges_of([7]) == "7"


@pytest.mark.parametrize("content", ["", "{", "[{}]", '[{"to": 9, "steps": [5], "updates": 3}]', "7"])
def test_a_file_of_rollbacks_that_contradicts_itself_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "rollbacks.json").write_text(content)
    with pytest.raises(UserError, match=r"rollbacks\.json: cannot be read .*/checkpoints/step_…/rollbacks\.json"):
        read_rollbacks(tmp_path)


def restored(guard: Guard, train: Train) -> Guard:
    """Return a new guard with the state that `guard` stores in a checkpoint."""
    new = Guard(train, [])
    new.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    return new


def test_spikes_of_the_loss_are_bad_steps() -> None:
    rng = random.Random(0)
    guard = Guard(Train(), [])
    for _ in range(200):
        assert not guard.judge(2.0 * math.exp(rng.gauss(0, 0.1)), 1.0)
    assert "spike" in guard.judge(10.0, 1.0)
    assert not guard.judge(2.3, 1.0)
    assert not restored(guard, Train(spike_zscore=0.0)).judge(1e9, 1.0)
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)):
        assert guard.judge(loss, norm)


def test_a_young_run_has_no_spikes() -> None:
    guard = Guard(Train(), [])
    assert not any(guard.judge(10.0**i, 1.0) for i in range(LEAST_STEPS))


def test_no_false_alarm_on_losses_as_they_are() -> None:
    """The losses fall by a factor of 100, with log-normal noise of sigma 0.7."""
    rng = random.Random(1)
    guard = Guard(Train(), [])
    verdicts = [guard.judge(3 * 100 ** (-i / 5000) * math.exp(rng.gauss(0, 0.7)), 1.0) for i in range(5000)]
    assert not any(verdicts)


def test_a_restored_guard_gives_the_same_verdicts() -> None:
    rng = random.Random(2)
    whole, parts = Guard(Train(), []), Guard(Train(), [])
    for i in range(300):
        loss = math.exp(rng.gauss(0, 0.3)) * (40 if i % 50 == 49 else 1)
        assert whole.judge(loss, 1.0) == parts.judge(loss, 1.0)
        parts = restored(parts, Train())


def test_losses_of_another_loss_function_are_not_compared() -> None:
    """A resume may change optim.label_smoothing, which raises all losses."""
    guard = Guard(Train(), [])
    for _ in range(300):
        assert not guard.judge(0.02, 1.0)
    state = guard.state_dict()
    same, other = Guard(Train(), []), Guard(Train(), [])
    same.load_state_dict(state)
    other.load_state_dict(state, is_same_loss=False)
    assert same.judge(0.47, 1.0)
    assert not other.judge(0.47, 1.0)


def test_a_guards_state_does_not_change_after_it_was_taken() -> None:
    guard = Guard(Train(), [])
    state = guard.state_dict()  # written while training continues
    guard.record(7, "loss is nan", [])
    assert state["in_a_row"] == []
    assert guard.state_dict()["in_a_row"][0]["step"] == 7

"""Nothing is lost by SIGKILLs of any rank at any moment: losses, samples, weights, moments and average are those of the
run that nobody disturbed, to the bit. With other numbers of ranks in between: the same samples, and nearly the same."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests.chaos.ranks import Ranks, draws, kill_again_and_again
from tests.test_train import lines, newest, tensors

ADAMW = ("weight", "exp_avg", "exp_avg_sq", "ema")
MUON = (*ADAMW, "momentum_buffer")  # Muon runs use AdamW for the other parameters


def undisturbed(config: Path, folder: Path, overrides: list[str]) -> Path:
    ranks = Ranks(2, config, [*overrides, "name=whole"], folder / "whole")
    assert ranks.end() == [0, 0], ranks.said()
    return config.parent / "runs" / "whole"


def assert_equal_runs(one: Path, other: Path, states: tuple[str, ...] = ADAMW) -> None:
    for key in ("step", "loss", "grad_norm", "top1", "samples"):
        assert [line[key] for line in lines(one)] == [line[key] for line in lines(other)]
    for state in states:
        ours, theirs = tensors(newest(one), state), tensors(newest(other), state)
        assert ours.keys() == theirs.keys()
        assert ours
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), state


def assert_each_sample_once(drawn: dict, run: Path) -> None:
    """Assert that an epoch has each sample once, and that every step drew its whole batch."""
    last = lines(run)[-1]["step"]
    assert sorted(drawn) == [(step, lane) for step in range(last) for lane in range(4)]
    counts: dict[tuple, int] = {}
    for step in range(last):
        pairs = [tuple(pair) for lane in range(4) for pair in drawn[step, lane]]
        assert len(pairs) == 8
        for pair in pairs:
            counts[pair] = counts.get(pair, 0) + 1
    for source in {source for source, _ in counts}:
        of_source = [count for (s, _), count in counts.items() if s == source]
        assert max(of_source) - min(of_source) <= 1


def check_kills(config: Path, folder: Path, stage: int, optimizer: str, kills: int, steps: int) -> dict[str, int]:
    overrides = [f"optim.name={optimizer}", f"train.zero_stage={stage}", f"train.steps={steps}", "train.save_every=5",
                 "train.keep_best=0"]  # fmt: skip
    whole = undisturbed(config, folder, overrides)
    run = config.parent / "runs" / "killed"
    moments = kill_again_and_again(
        config, run, folder / "killed", [*overrides, "name=killed"], kills, stage, itertools.repeat(2)
    )
    assert_equal_runs(whole, run, MUON if optimizer == "muon" else ADAMW)
    drawn = draws(folder / "killed")
    assert drawn == draws(folder / "whole")
    assert_each_sample_once(drawn, run)
    return moments


def test_a_few_kills_change_nothing(config_file: Path, tmp_path: Path) -> None:
    check_kills(config_file, tmp_path / "log", stage=2, optimizer="muon", kills=2, steps=40)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_25_kills_at_each_stage_change_nothing(config_file: Path, tmp_path: Path, stage: int, optimizer: str) -> None:
    moments = check_kills(config_file, tmp_path / "log", stage, optimizer, kills=25, steps=500)
    print(f"stage {stage}, {optimizer}: {moments}")
    assert min(moments.values()) >= 5


def check_other_world_sizes(config: Path, folder: Path, kills: int, steps: int) -> None:
    overrides = [f"train.steps={steps}", "train.save_every=5", "train.keep_best=0"]
    whole = undisturbed(config, folder, overrides)
    run = config.parent / "runs" / "killed"
    sizes = itertools.cycle([1, 2, 4])
    kill_again_and_again(config, run, folder / "killed", [*overrides, "name=killed"], kills, 1, sizes)
    assert draws(folder / "killed") == draws(folder / "whole")
    assert [line["loss"] for line in lines(run)] == pytest.approx([line["loss"] for line in lines(whole)], rel=2e-4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_and_other_numbers_of_ranks_change_next_to_nothing(config_file: Path, tmp_path: Path) -> None:
    check_other_world_sizes(config_file, tmp_path / "log", kills=9, steps=200)

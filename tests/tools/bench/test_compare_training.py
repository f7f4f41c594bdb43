"""bfsys against the published implementation: 200 steps of training, loss by loss."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bfsys.batch import ByteBatch, Sample
from bfsys.config import load_config
from bfsys.errors import UserError
from tools.bench import compare_training

MODEL = [
    "model.dim=32", "model.layers=4", "model.merge_after=[0,1,3]", "model.window=16", "model.shift=8",
    "optim.clip_norm=0", "optim.warmup_steps=20", "data.lanes=2", "train.save_every=1000",
]  # fmt: skip


@pytest.mark.parametrize("steps", [80, pytest.param(200, marks=pytest.mark.slow)])
def test_all_steps_are_the_published_ones(steps: int, config_file: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--steps", str(steps), f"train.steps={steps + 20}", "train.zero_stage=2"]
    assert compare_training.main([str(config_file), *MODEL, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(lines[i].split()[1]) for i in (1, -2))
    assert last < 0.75 * first, "they agree on nothing: nothing was learned"
    assert lines[-1].startswith(f"largest relative difference of {steps} steps")


def test_a_different_optimizer_is_detected(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The comparison must detect another optimizer."""
    few = [*MODEL, "train.steps=30"]
    other = list(compare_training.published_losses(load_config(config_file, [*few, "optim.beta2=0.99"])))
    monkeypatch.setattr(compare_training, "bfsys_losses", lambda *arguments: other)
    assert compare_training.main([str(config_file), *few, "--steps", "30", "--control"]) == 1
    assert 0 < float(capsys.readouterr().out.split()[-1]) < 1e-4  # the published implementation with nudged weights


def test_a_loss_that_is_not_finite_or_missing_is_a_difference(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [str(config_file), *MODEL, "train.steps=22", "--steps", "3"]
    losses = list(compare_training.published_losses(load_config(config_file, few[1:-2])))[:3]
    for last in (losses[2], math.nan):
        monkeypatch.setattr(compare_training, "bfsys_losses", lambda *_, last=last: [*losses[:2], last])
        assert compare_training.main(few) == int(math.isnan(last))
    lines = [{"kind": "train", "step": 1, "loss": 0.5}, {"kind": "train", "step": 3, "loss": 0.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare_training.losses_in(tmp_path / "metrics.jsonl") == {1: 0.5, 3: 0.25}


def test_each_of_a_few_steps_is_shown_once(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for function in ("bfsys_losses", "published_losses"):
        monkeypatch.setattr(compare_training, function, lambda *arguments: [3.0, 2.0, 1.0])
    assert compare_training.main([str(config_file), *MODEL, "train.steps=30", "--steps", "3"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:4]] == [
        ["1", "3.00000000"], ["2", "2.00000000"], ["3", "1.00000000"],
    ]  # fmt: skip


def test_files_beyond_the_positions_are_refused(config_file: Path) -> None:
    config = load_config(config_file, [*MODEL, "model.max_tokens=4", "train.steps=20"])
    with pytest.raises(UserError, match="positions repeat"):
        next(itertools.islice(compare_training.published_losses(config), 1))


def test_another_optimizer_is_refused(config_file: Path) -> None:
    with pytest.raises(UserError, match="add recipe=published"):
        compare_training.main([str(config_file), "optim.name=muon"])


def test_too_many_steps(config_file: Path) -> None:
    with pytest.raises(UserError, match=r"--steps: got 200, the run has train\.steps 10"):
        compare_training.main([str(config_file)])


def test_mixed_sounds_have_mixed_targets() -> None:
    batch = ByteBatch.from_samples([Sample("", np.zeros(3, np.uint8), label=n) for n in (0, 2)])
    assert compare_training.targets_of(batch, 3).tolist() == [[1, 0, 0], [0, 0, 1]]
    mixed = replace(batch, second_labels=torch.tensor([1, 2]), second_share=torch.tensor([0.25, 0.5]))
    assert compare_training.targets_of(mixed, 3).tolist() == [[0.75, 0.25, 0], [0, 0, 1]]

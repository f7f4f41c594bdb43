"""The estimated needs of a run, compared with its real needs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bfsys import plan_run
from bfsys.batch import ByteBatch, Sample
from bfsys.cli import call
from bfsys.config import Config, Data, Model, Train, load_config
from bfsys.data.streaming.run_data import open_run_data
from bfsys.dist import Ranks
from bfsys.errors import UserError
from bfsys.model.byteformer import ByteFormer, parameter_count
from bfsys.model.content_head import ContentHead
from bfsys.model.flops import flops_per_step
from bfsys.model.peaks import PEAKS


def config_of(checkpointing: bool = False, **train: object) -> Config:
    model = Model(kernel=8, max_tokens=4000, activation_checkpointing=checkpointing)
    return Config(data=Data(sources=()), model=model, train=Train(**train))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(checkpointing: bool) -> None:
    """The comparison is in float32, without the memory of the backward itself."""
    config = config_of(checkpointing, precision="fp32")
    architecture = config.model.architecture()
    model = ByteFormer(architecture, 10, activation_checkpointing=checkpointing)
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rng = np.random.default_rng(0)
    batch = ByteBatch.from_samples([Sample("", rng.integers(0, 256, 4 * 2048, dtype=np.uint8), 0) for _ in range(2)])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch).sum()
    tokens = 2 * 2048
    told = plan_run._activation_bytes(config, tokens)
    widest = plan_run.KEPT_PER_TOKEN * tokens * 4 * architecture.dim
    # The estimate also contains the memory of the backward, and with checkpointing that of the recomputed block.
    told -= widest // 2 + (widest if checkpointing else 0)
    assert sum(kept.values()) == pytest.approx(told, rel=0.1)


@pytest.mark.parametrize(
    ("stage", "precision", "bytes_each"),
    [
        (0, "fp32", 20), (0, "bf16", 20), (1, "fp32", 8 + 12 / 4), (1, "bf16", 2 + 2 + 4 + 16 / 4),
        (2, "bf16", 2 + (2 + 4 + 16) / 4), (3, "bf16", 24 / 4), (3, "fp32", 20 / 4),
    ],
)  # fmt: skip
def test_state_is_shared_by_stage(stage: int, precision: str, bytes_each: float) -> None:
    config = config_of(zero_stage=stage, precision=precision)
    assert plan_run._state_bytes(config, 10**6, 2 * 10**6, 4) == pytest.approx(bytes_each * 10**6)


def test_an_estimate_counts_what_training_plans(config_file: Path) -> None:
    config = load_config(config_file)
    data = open_run_data(config, Ranks())
    one, four = (plan_run.estimate(data, ranks, on_gpu=False) for ranks in (1, 4))
    assert one.parameters == parameter_count(config.model.architecture(), 5)
    assert one.step_flops == four.step_flops > 0
    assert (one.busiest, four.step_bytes) == (1.0, one.step_bytes)
    assert four.busiest > 1
    assert four.step_s(1e9) == pytest.approx(one.step_s(1e9) / 4)
    with pytest.raises(UserError, match="world sizes that fit"):
        plan_run.estimate(data, 3, on_gpu=False)


def test_operations_are_those_of_the_micro_batches_that_training_makes(config_file: Path) -> None:
    """A micro-batch computes the stem's table once, however many lanes it joins."""
    config = load_config(config_file)
    data, architecture = open_run_data(config, Ranks()), config.model.architecture()
    apart, joined = (plan_run.estimate(data, 1, on_gpu=on_gpu) for on_gpu in (False, True))
    assert (apart.micro_batches, joined.micro_batches) == (config.data.lanes, 1)
    table = flops_per_step(np.zeros(0, np.int64), architecture, 5).stem
    assert apart.step_flops - joined.step_flops == pytest.approx((config.data.lanes - 1) * table)
    assert joined.busiest == 1


def test_muon_keeps_one_moment_of_its_matrices(config_file: Path) -> None:
    adamw, muon = (
        plan_run.estimate(open_run_data(load_config(config_file, [f"optim.name={name}"]), Ranks()), 1, on_gpu=False)
        for name in ("adamw", "muon")
    )
    stacks = ByteFormer(load_config(config_file).model.architecture(), 5).stacks()
    spared = 4 * sum(int(np.prod(stack)) for stack in stacks.values())
    assert adamw.state_bytes - muon.state_bytes == adamw.checkpoint_bytes - muon.checkpoint_bytes == spared


def test_the_average_and_the_content_head_count_if_the_run_has_them(config_file: Path) -> None:
    usual, without_average, with_content = (
        plan_run.estimate(open_run_data(load_config(config_file, changes), Ranks()), 1, on_gpu=False)
        for changes in ([], ["optim.ema_decay=0"], ["optim.content_loss=1"])
    )
    average = 4 * usual.parameters
    assert usual.state_bytes - without_average.state_bytes == average
    assert usual.checkpoint_bytes - without_average.checkpoint_bytes == average
    head = sum(p.numel() for p in ContentHead(load_config(config_file).model.architecture().dim).parameters())
    assert with_content.checkpoint_bytes - usual.checkpoint_bytes == (4 + 4 + 8) * head
    assert with_content.state_bytes - usual.state_bytes == (4 + 4 + 4 + 8) * head
    assert with_content.parameters == usual.parameters


def test_measurements_of_a_run_are_used(config_file: Path, finished_run: Path, capsys: pytest.CaptureFixture) -> None:
    rates = [json.loads(line)["model_tflop_per_s"] for line in (finished_run / "metrics.jsonl").read_text().splitlines()
             if '"train"' in line]  # fmt: skip
    like = plan_run.measured(finished_run)
    assert like.flops_per_s * like.ranks == pytest.approx(1e12 * np.median(rates))
    assert like.restart_s > 0
    assert like.save_s > 0
    assert call("plan", [str(config_file), "--ranks", "2", "--like", str(finished_run)]) == 0
    assert f"as in {finished_run}" in capsys.readouterr().out
    assert call("plan", [str(config_file), "--gpu", "h200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step_s"] > 0
    assert call("plan", [str(config_file), "optim.name=muon", "--like", str(finished_run)]) == 0
    assert "note: optim.name is muon, and was adamw" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"it has no config\.yaml"):
        plan_run.measured(config_file.parent)
    with pytest.raises(UserError, match="there is no such folder"):
        plan_run.measured(config_file.parent / "nothing")


def test_the_peak_of_a_gpu_is_that_of_the_precision(config_file: Path, capsys: pytest.CaptureFixture) -> None:
    def step_s(precision: str) -> float:
        assert call("plan", [str(config_file), f"train.precision={precision}", "--gpu", "h200", "--json"]) == 0
        return json.loads(capsys.readouterr().out)["step_s"]

    assert step_s("fp32") / step_s("bf16") == pytest.approx(PEAKS["H200"].bf16 / PEAKS["H200"].fp32)


def test_a_larger_model_saves_and_evaluates_for_longer(config_file: Path, finished_run: Path) -> None:
    like = plan_run.measured(finished_run)
    config = load_config(config_file, ["train.eval_every=5"])
    wider = load_config(config_file, ["train.eval_every=5", "model.dim=64"])
    one, other = (
        plan_run.run_time(plan_run.estimate(open_run_data(c, Ranks()), 1, on_gpu=False), c, like, step_s=1.0)
        for c in (config, wider)
    )
    assert other.save_s > 2 * one.save_s
    assert other.evaluations_s > 2 * one.evaluations_s > 0
    at_the_end = replace(config, train=replace(config.train, eval_every=0))
    plan = plan_run.estimate(open_run_data(config, Ranks()), 1, on_gpu=False)
    evaluations = -(-config.train.steps // 5)
    assert plan_run.run_time(plan, at_the_end, like, step_s=1.0).evaluations_s == pytest.approx(
        one.evaluations_s / evaluations
    )


@pytest.mark.parametrize("lost", ["metrics.jsonl", "goodput.jsonl", "checkpoints"])
def test_a_run_without_measurements_is_refused(finished_run: Path, tmp_path: Path, lost: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / lost) if lost == "checkpoints" else (run / lost).write_text("torn")
    with pytest.raises(UserError, match="the run has no"):
        plan_run.measured(run)


def test_a_network_failures_and_a_price_are_counted(
    config_file: Path, finished_run: Path, capsys: pytest.CaptureFixture
) -> None:
    def told(*more: str) -> dict:
        assert call("plan", [str(config_file), "--ranks", "4", "--like", str(finished_run), "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    plain, slow = told(), told("--network", "0.001")
    assert slow["step_s"] - plain["step_s"] == pytest.approx(plain["sent_bytes"] / 1e6)
    failing = told("--mtbf-days", "0.01", "--ranks-per-node", "1", "--price", "2")
    assert failing["expected_s"] > plain["expected_s"]
    assert failing["price"] == pytest.approx(2 * 4 * failing["expected_s"] / 3600)
    assert failing["goodput"] < plain["goodput"] <= 1
    arguments = [str(config_file), "--ranks", "4", "--like", str(finished_run), "--mtbf-days", "1", "--price", "3"]
    assert call("plan", arguments) == 0
    assert "best train.save_every" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mtbf-days", "3"], "--mtbf-days needs --like"),
        (["--gpu", "h200", "--network", "-1"], "--network: got -1"),
        (["--gpu", "h200", "--price", "nan"], "--price: got nan"),
        (["--gpu", "h200", "--utilisation", "1e-9"], "--utilisation: got 1e-09"),
        (["--ranks-per-node", "0"], "--ranks-per-node: got 0"),
        (["--price", "3"], "--price needs --like or --gpu"),
        (["--utilisation", "0.5"], "--utilisation needs --gpu"),
        (["--gpu", "h200", "--like", "runs/x"], "give one of them"),
    ],
)
def test_options_without_effect_are_refused(config_file: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        call("plan", [str(config_file), *arguments])

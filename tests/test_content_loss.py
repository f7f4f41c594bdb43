"""Runs with the content loss: at every stage, resumed, and used afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from bfsys.checkpoint.files import CONTENT_HEAD
from bfsys.checkpoint.loading import load_model
from bfsys.cli import call
from bfsys.compare import read_run
from bfsys.config import load_config
from bfsys.errors import UserError
from bfsys.predict import load
from tests.conftest import _run_ranks, tiny_config
from tests.plain_training import train_plainly
from tests.test_augmented import write_files
from tests.test_train import assert_near, assert_success, cut_short, lines, losses, newest, tensors
from tools.bench import compare_training

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(config file, folder of runs): every stage on two ranks, resumed runs of stages 1 and 3, and fine-tuned runs."""
    folder = tmp_path_factory.mktemp("content")
    write_files(folder / "files")
    for kind in ("image", "audio"):
        call("pack", [str(folder / "files"), str(folder), "--subdir", kind, "--workers", "1", "--name", kind])
    config = tiny_config(folder, folder)
    config["data"]["sources"] = [{"path": str(folder / "image"), "jitter": {}}, {"path": str(folder / "audio")}]
    config["optim"]["content_loss"] = 0.5
    config["train"] |= {"steps": 4, "save_every": 2}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    whole = [f"name=s{stage} train.zero_stage={stage}" for stage in STAGES]
    assert_success(_run_ranks(2, ["tests/worker.py", str(path), *whole, "name=bf16 train.precision=bf16"]))
    for stage in (1, 3):
        cut_short(folder / "runs" / f"s{stage}", folder / "runs" / f"s{stage}-resumed", step=2)
    resumed = [f"name=s{stage}-resumed train.zero_stage={stage} data.workers=1" for stage in (1, 3)]
    start = f"train.init_from={folder}/runs/s1 train.steps=2"
    tuned = [f"name=tuned {start}", f"name=tuned-without {start} optim.content_loss=0"]
    # The weight may change at a resume; the loss that is checked for spikes does not change.
    shutil.copytree(folder / "runs" / "s0", folder / "runs" / "heavier")
    heavier = "name=heavier train.zero_stage=0 train.steps=12 optim.content_loss=1000 optim.lr=1e-6 optim.final_lr=0"
    longer = "name=longer train.zero_stage=0 train.steps=40 optim.lr=1e-2 optim.content_loss=5"
    moved = "name=moved train.steps=2 data.byte_transforms=[reverse]"
    assert_success(
        _run_ranks(2, ["tests/worker.py", "--rehearse", str(path), *resumed, *tuned, heavier, longer, moved])
    )
    return path, folder / "runs"


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_as_plain_pytorch(stage: int, runs: tuple[Path, Path]) -> None:
    path, folder = runs
    expected, norms, weights, average = train_plainly(load_config(path))
    run = folder / f"s{stage}"
    assert losses(run) == pytest.approx(expected, rel=2e-6)
    assert [line["grad_norm"] for line in lines(run)] == pytest.approx(norms, rel=1e-4)
    assert_near(run, weights, average, rtol=1e-4, atol=5e-5)


def test_the_loss_that_is_logged_falls_and_is_apart_from_the_other(runs: tuple[Path, Path]) -> None:
    logged = [line["content_loss"] for line in lines(runs[1] / "s1")]
    longer = [line["content_loss"] for line in lines(runs[1] / "longer")]
    assert 0 < np.mean(longer[-10:]) < 0.9 * np.mean(longer[:10])
    assert [line["content_loss"] for line in lines(runs[1] / "bf16")] == pytest.approx(logged, rel=2e-2)
    assert "content_loss" not in lines(runs[1] / "tuned-without")[0]
    assert "content_loss" not in lines(runs[1] / "s1", "eval")[0]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_resumes_to_the_bit_with_other_workers(stage: int, runs: tuple[Path, Path]) -> None:
    whole, resumed = (runs[1] / name for name in (f"s{stage}", f"s{stage}-resumed"))
    assert losses(resumed) == losses(whole)
    assert [line["content_loss"] for line in lines(resumed)] == [line["content_loss"] for line in lines(whole)]
    for state in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        one, other = tensors(newest(whole), state), tensors(newest(resumed), state)
        assert any(name.startswith(CONTENT_HEAD) for name in one)
        assert all(torch.equal(one[name], other[name]) for name in one), state


@pytest.mark.filterwarnings("ignore:.*out-of-distribution score")
def test_the_model_that_answers_has_no_content_head(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = runs[1] / "s1"
    model, _, _ = load_model(run)
    assert not any(name.startswith(CONTENT_HEAD) for name in model.state_dict())
    call("export", [str(run), str(tmp_path / "model")])
    files = [np.arange(200, dtype=np.uint8).tobytes(), b"another file"]
    expected = load(str(run)).probabilities(files)
    assert np.array_equal(load(str(tmp_path / "model")).probabilities(files), expected)


def test_weights_are_taken_over_with_the_head_or_without_it(runs: tuple[Path, Path]) -> None:
    origin = tensors(newest(runs[1] / "s1"), "ema")
    names = {name: set(tensors(newest(runs[1] / name), "weight")) for name in ("tuned", "tuned-without")}
    assert names["tuned"] == set(origin)
    assert names["tuned-without"] == {name for name in origin if not name.startswith(CONTENT_HEAD)}


def test_a_larger_weight_at_a_resume_is_not_a_spike(runs: tuple[Path, Path]) -> None:
    assert [line["step"] for line in lines(runs[1] / "heavier")] == list(range(1, 13))
    assert not lines(runs[1] / "heavier", "bad_step")


def test_bytes_that_are_moved_have_no_content_loss(runs: tuple[Path, Path]) -> None:
    assert "content_loss" not in lines(runs[1] / "moved")[0]
    assert not any(name.startswith(CONTENT_HEAD) for name in tensors(newest(runs[1] / "moved"), "weight"))


def test_compare_counts_the_parameters_of_the_model_that_answers(runs: tuple[Path, Path]) -> None:
    run = runs[1] / "s1"
    model, _, _ = load_model(run)
    assert read_run(run).parameters == sum(p.numel() for p in model.parameters())


def test_compare_training_refuses_a_content_loss(runs: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"optim\.content_loss: got 0\.5; .* add optim\.content_loss=0"):
        compare_training.main([str(runs[0]), "--steps", "1"])


def test_a_run_cannot_resume_without_its_content_loss(runs: tuple[Path, Path], run_ranks) -> None:
    path, _ = runs
    (result,) = run_ranks(1, ["bfsys/train.py", str(path), "name=s1", "optim.content_loss=0"])
    assert result.returncode == 2
    assert "optim: content_loss was 'on', is now 'off'" in result.stderr
    assert "to resume it, add optim.content_loss=0.5\n" in result.stderr
    assert "Traceback" not in result.stderr

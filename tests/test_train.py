"""Whole runs on real ranks: ZeRO 0 to 3 against plain PyTorch, and resumed against uninterrupted."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bfsys.checkpoint.loading import load_model
from bfsys.cli import call
from bfsys.config import load_config
from bfsys.data.streaming.datasets import open_evaluation
from bfsys.data.streaming.quarantine import Quarantine
from bfsys.data.streaming.run_data import open_run_data
from bfsys.errors import UserError
from bfsys.evaluate import evaluate
from tests.forked import run_python, start_ranks
from tests.plain_training import ALONE, train_plainly

STAGES = (0, 1, 2, 3)
STEPS, HALF = 4, 2
TOGETHER = "train.micro_batch_tokens=1000"


def lines(run: Path, kind: str = "train") -> list[dict]:
    """The lines of metrics.jsonl of a kind, without one that is being written."""
    written = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    return [line for line in map(json.loads, written) if line["kind"] == kind]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run)]


def tensors(checkpoint: Path, state: str) -> dict[str, Tensor]:
    """Whole tensors by parameter name, joined from the pieces of all ranks."""
    shapes = json.loads((checkpoint / "manifest.json").read_text())["shapes"]
    pieces: dict[str, dict[int, Tensor]] = {}
    for file in checkpoint.glob(f"{state}-*.safetensors"):
        for piece, value in load_file(file).items():
            name, _, span = piece.partition("[")
            pieces.setdefault(name, {})[int(span.partition(":")[0] or 0)] = value.flatten()
    return {n: torch.cat([p[first] for first in sorted(p)]).view(shapes[n]) for n, p in pieces.items()}


def newest(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


@pytest.fixture(scope="module")
def stage_runs(
    request: pytest.FixtureRequest, datasets: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """(config file, folder of runs): every stage and precision on two ranks, then every stage resumed.

    `s1-fp32` is an uninterrupted run. `s1-fp32-resumed` resumes from its checkpoint of step 2, tries its largest
    micro-batch first, like on a GPU, and also evaluates after step 3. `3-from-1` resumes a run of stage 1 at stage 3.
    The ranks of `s1-together` compute their two lanes of a step as one micro-batch; `s1-then-together` does so from
    step 2 on. Only runs that the tests need are resumed.
    """
    import yaml

    from tests.conftest import _run_ranks, parameters_of_tests_with, tiny_config

    folder = tmp_path_factory.mktemp("stages")
    config = folder / "tiny.yaml"
    content = tiny_config(datasets, folder)
    content["train"] |= {"steps": STEPS, "save_every": HALF}
    config.write_text(yaml.safe_dump(content))
    runs = [f"name=s{s}-{p} train.zero_stage={s} train.precision={p}" for s in STAGES for p in ("fp32", "bf16")]
    runs += [f"name=s{s}-together train.zero_stage={s} {TOGETHER}" for s in STAGES]
    assert_success(_run_ranks(2, ["tests/worker.py", str(config), *runs]))
    resumed = []
    wanted = parameters_of_tests_with("stage_runs", request)
    kinds = dict.fromkeys((p["stage"], p["precision"]) for p in wanted if "precision" in p)
    again = [(f"s{s}-{p}-resumed", s, p, f"s{s}-{p}") for s, p in kinds]
    for name, stage, precision, source in [
        *again,
        ("3-from-1", 3, "fp32", "s1-fp32"),
        ("1-from-3", 1, "fp32", "s3-fp32"),
    ]:
        cut_short(folder / "runs" / source, folder / "runs" / name, step=HALF)
        resumed.append(f"name={name} train.zero_stage={stage} train.precision={precision} train.eval_every={HALF + 1}")
    ways = {
        "together-resumed": ("together", TOGETHER),
        "then-together": ("fp32", TOGETHER),
        "no-longer-together": ("together", "train.micro_batch_tokens=1"),
    }
    for parameters in wanted:
        if parameters.get("how") in ways:
            stage, (source, option) = parameters["stage"], ways[parameters["how"]]
            name = f"s{stage}-{parameters['how']}"
            cut_short(folder / "runs" / f"s{stage}-{source}", folder / "runs" / name, step=HALF)
            resumed.append(f"name={name} train.zero_stage={stage} {option}")
    assert_success(_run_ranks(2, ["tests/worker.py", "--rehearse", str(config), *resumed]))
    return config, folder / "runs"


def assert_success(ranks: list[subprocess.CompletedProcess]) -> None:
    for rank in ranks:
        assert rank.returncode == 0, rank.stdout + rank.stderr
        assert "Warning" not in rank.stderr, rank.stderr  # such as PyTorch's warnings about names that DeepSpeed uses


def cut_short(run: Path, copy: Path, step: int) -> None:
    """Copy a run in the state of a kill after `step`."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_as_plain_pytorch(stage: int, stage_runs: tuple[Path, Path]) -> None:
    config_file, runs = stage_runs
    expected_losses, expected_norms, weights, average = train_plainly(load_config(config_file))
    run = runs / f"s{stage}-fp32"
    assert losses(run) == pytest.approx(expected_losses, rel=2e-6)
    assert [line["grad_norm"] for line in lines(run)] == pytest.approx(expected_norms, rel=1e-4)
    assert_near(run, weights, average, rtol=1e-4, atol=5e-5)
    assert max(expected_losses) - min(expected_losses) > 0.1, "nothing was learned: the comparison says little"


def assert_near(run: Path, weights: dict[str, Tensor], average: dict[str, Tensor], *, rtol: float, atol: float) -> None:
    """Assert that the weights of a run's newest checkpoint and their average are equal to these up to rounding."""
    for state, expected in (("weight", weights), ("ema", average)):
        stored = tensors(newest(run), state)
        assert stored.keys() == expected.keys()
        for name, value in expected.items():
            here, there = stored[name].clone(), value.clone()
            if name.endswith("qkv.bias"):  # keys' biases have only rounding errors as gradients, which Adam amplifies
                here.view(3, -1)[1] = there.view(3, -1)[1] = 0
            torch.testing.assert_close(here, there, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_stays_near_fp32(stage: int, stage_runs: tuple[Path, Path]) -> None:
    _, runs = stage_runs
    assert losses(runs / f"s{stage}-bf16") == pytest.approx(losses(runs / f"s{stage}-fp32"), rel=2e-2)
    assert losses(runs / f"s{stage}-bf16") != losses(runs / f"s{stage}-fp32")


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        # For the reason in test_muon.py, stage 0 in bf16 is not resumed before stage 3 in bf16.
        *((1, "fp32"), (3, "bf16"), (0, "bf16"), (2, "fp32"), (3, "fp32")),
        *(pytest.param(*kind, marks=pytest.mark.slow) for kind in ((0, "fp32"), (1, "bf16"), (2, "bf16"))),
    ],
)
def test_resumed_equals_uninterrupted(stage: int, precision: str, stage_runs: tuple[Path, Path]) -> None:
    _, runs = stage_runs
    whole, resumed = runs / f"s{stage}-{precision}", runs / f"s{stage}-{precision}-resumed"
    assert losses(resumed) == losses(whole)
    assert [line["step"] for line in lines(resumed, "eval")] == [HALF + 1, STEPS]
    assert [line["step"] for line in lines(resumed)] == list(range(1, STEPS + 1))
    for state in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        one, other = tensors(newest(whole), state), tensors(newest(resumed), state)
        assert one
        assert one.keys() == other.keys()
        assert all(torch.equal(one[n], other[n]) for n in one), state


def slow_unless(how: str, stages: tuple[int, ...]) -> list:
    """(stage, how) for all stages."""
    return [pytest.param(stage, how, marks=() if stage in stages else pytest.mark.slow) for stage in STAGES]


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        *slow_unless("together", STAGES),
        *slow_unless("then-together", (0, 3)),
        *slow_unless("no-longer-together", (1, 2)),
    ],
)
def test_lanes_computed_together_make_the_same_steps(stage: int, how: str, stage_runs: tuple[Path, Path]) -> None:
    _, runs = stage_runs
    apart, together = runs / f"s{stage}-fp32", runs / f"s{stage}-{how}"
    assert losses(together) == pytest.approx(losses(apart), rel=2e-6)
    norms = ([line["grad_norm"] for line in lines(run)] for run in (together, apart))
    assert next(norms) == pytest.approx(next(norms), rel=1e-4)
    assert losses(together) != losses(apart), "no rounding differs, so the micro-batches were the same"


@pytest.mark.parametrize(("stage", "how"), slow_unless("together-resumed", (1, 3)))
def test_lanes_computed_together_resume_to_the_bit(stage: int, how: str, stage_runs: tuple[Path, Path]) -> None:
    whole, resumed = (stage_runs[1] / f"s{stage}-{name}" for name in ("together", how))
    assert losses(resumed) == losses(whole)
    for state in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        one, other = tensors(newest(whole), state), tensors(newest(resumed), state)
        assert all(torch.equal(one[n], other[n]) for n in one), state


@pytest.mark.parametrize("stage", STAGES)
def test_evaluations_judge_the_averaged_weights(stage: int, stage_runs: tuple[Path, Path]) -> None:
    """predict uses them, and `train.keep_best` must refer to them."""
    run = stage_runs[1] / f"s{stage}-fp32"
    (own,) = lines(run, "eval")
    for average in (True, False):
        model, config, manifest = load_model(run, average=average)
        validation = open_evaluation(config, "val", manifest["classes"])
        again = evaluate(model, config, validation, ALONE, Quarantine(), manifest["step"])
        assert (own["loss"] == pytest.approx(again["loss"], rel=1e-5)) == average


@pytest.mark.parametrize(("name", "source"), [("3-from-1", 1), ("1-from-3", 3)])
def test_a_checkpoint_resumes_at_another_stage(name: str, source: int, stage_runs: tuple[Path, Path]) -> None:
    _, runs = stage_runs
    assert losses(runs / name) == pytest.approx(losses(runs / f"s{source}-fp32"), rel=1e-6)


def test_a_checkpoint_resumes_on_another_number_of_ranks(stage_runs: tuple[Path, Path], run_ranks) -> None:
    config_file, runs = stage_runs
    cut_short(runs / "s1-fp32", runs / "alone", step=HALF)
    assert_success(run_ranks(1, ["bfsys/train.py", str(config_file), "name=alone"]))
    assert losses(runs / "alone") == pytest.approx(losses(runs / "s1-fp32"), rel=2e-6)
    manifest = json.loads((newest(runs / "alone") / "manifest.json").read_text())
    assert manifest["step"] == STEPS
    assert all(name.endswith("-0-of-1.safetensors") for name in manifest["files"] if name != "metrics.jsonl")


def test_the_run_directory_holds_the_documented_files(stage_runs: tuple[Path, Path]) -> None:
    _, runs = stage_runs
    run = runs / "s1-fp32"
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "checkpoints", "tb", "metrics.jsonl"}
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "latest", "step_00000000", "step_00000002", "step_00000004",
    ]  # fmt: skip
    last = lines(run)[-1]
    for key in ("top1", "samples_per_s", "bytes_per_s", "tokens_per_s", "matmul_share", "model_tflop_per_s",
                "padding_share", "data_wait_share", "peak_memory_mib", "learning_rate", "grad_norm"):  # fmt: skip
        assert last[key] >= 0
    assert last["mfu"] is None  # CPUs have no data sheet peak
    assert set(last["sources"]) == {"a", "b"}
    (evaluation,) = lines(run, "eval")
    assert evaluation["samples"] == 5 * 7
    assert [scores["samples"] for scores in evaluation["classes"].values()] == [7] * 5  # over both ranks


def test_a_signal_to_one_rank_stops_all_after_the_same_step(config_file: Path, tmp_path: Path) -> None:
    """SIGUSR2 to rank 1: both save and exit with EXIT_REQUEUE; the next start resumes."""
    overrides = ["train.steps=100000", "train.save_every=100000", "optim.warmup_steps=2", "train.zero_stage=2"]
    processes = start_ranks(2, run_python, ["bfsys/train.py", str(config_file), "name=signal", *overrides])
    run = tmp_path / "runs" / "signal"
    try:
        deadline = time.monotonic() + 900
        while not (run / "metrics.jsonl").exists() or len(losses(run)) < 3:
            assert time.monotonic() < deadline
            assert all(p.poll() is None for p in processes)
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGUSR2)
        outputs = [p.communicate(timeout=900) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [75, 75], outputs
    step = lines(run)[-1]["step"]
    assert newest(run).name == f"step_{step:08d}"
    assert f"stopped on request after step {step}" in outputs[0][0]


def test_bad_input_ends_with_code_2_and_says_all_once(config_file: Path, tmp_path: Path, run_ranks) -> None:
    change = ["data.sources.0.path=/nowhere/a", "data.sources.1.path=/nowhere/b"]
    results = run_ranks(2, ["bfsys/train.py", str(config_file), *change])
    assert [r.returncode for r in results] == [2, 2]
    assert "/nowhere/a" in results[0].stderr
    assert "/nowhere/b" in results[0].stderr
    assert results[1].stderr.count("error:") == 0
    assert "Traceback" not in results[0].stderr + results[1].stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["model.dim=32"], "model: dim was 16, is now 32"),
        (["data.batch_samples=16"], "data plan: batch_samples was 8, is now 16"),
        (["train.seed=1"], "data plan: seed was 0, is now 1"),
    ],
)
def test_another_run_in_the_same_directory_is_refused(
    change: list[str], message: str, stage_runs: tuple[Path, Path]
) -> None:
    from bfsys.checkpoint.files import find_newest
    from bfsys.errors import UserError
    from bfsys.run_dir import prepare_run_dir, run_facts

    config_file, runs = stage_runs
    before = sorted(p.name for p in (runs / "s1-fp32").rglob("*"))
    config = load_config(config_file, ["name=s1-fp32", *change])
    with pytest.raises(UserError, match=message):
        prepare_run_dir(config, run_facts(open_run_data(config, ALONE)), ALONE)
    assert sorted(p.name for p in (runs / "s1-fp32").rglob("*")) == before
    assert find_newest(runs / "s1-fp32")[0] is not None


def test_dry_run_shows_config_arithmetic_and_data(config_file: Path, run_ranks) -> None:
    (result,) = run_ranks(1, ["bfsys/train.py", str(config_file), "--dry-run"])
    assert result.returncode == 0, result.stderr
    for text in ("batch_samples: 8", "parameters", "with 5 classes", "micro-batch", "a: 120 files", "b: 14 files"):
        assert text in result.stdout
    assert not (config_file.parent / "runs").exists()


@pytest.mark.parametrize("key", ["path", "eval_path"])
def test_a_dry_run_checks_the_tries_of_the_run(config_file: Path, datasets: Path, key: str) -> None:
    """It makes fewer tries itself."""
    remote = f"data.sources.0.{key}=pipe:cat {datasets}/a/{{file}}"
    settings = [str(config_file), remote, f"data.cache_dir={config_file.parent / 'cache'}", "--dry-run"]
    with pytest.raises(UserError, match=r"data\.fetch_tries: 9 tries to fetch a file may take") as error:
        call("train", [*settings, "train.collective_timeout_s=60"])
    assert len(error.value.problems) == 1
    call("train", [*settings, "train.collective_timeout_s=100", "data.fetch_tries=2"])


def test_a_dry_run_looks_at_the_run_directory(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(finished_run / "config.yaml")
    assert call("train", [config, "--dry-run"]) == 0
    assert f"checkpoint  {newest(finished_run)}: a start resumes from it" in capsys.readouterr().out
    assert call("train", [config, "--dry-run", "train.init_from=runs/other", "train.steps=2"]) == 0
    said = capsys.readouterr().out
    assert "train.init_from: runs/other has no effect" in said
    assert "has made 120 steps, and train.steps is 2: nothing is left to train" in said
    with pytest.raises(UserError, match="model: dim was 16, is now 32"):
        call("train", [config, "--dry-run", "model.dim=32"])
    with pytest.raises(UserError, match="name too long"):
        call("train", [config, "--dry-run", f"name={'n' * 300}"])


def test_a_dry_run_without_data_says_what_is_missing(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        call("train", [str(config_file), "--dry-run", f"data.sources.0.path={tmp_path / 'nothing'}"])

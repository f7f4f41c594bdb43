"""Muon: its direction, how ranks share the work, and whole runs at every ZeRO stage against plain PyTorch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bfsys.checkpoint.files import checkpoint_name, read_manifest
from bfsys.config import load_config
from bfsys.muon import Stack, assign, orthogonalise, step_scale
from tests.chaos.ranks import train_several
from tests.conftest import _run_ranks, parameters_of_tests_with, tiny_config
from tests.forked import start_ranks
from tests.plain_training import train_plainly
from tests.supervision.test_guard import samples_of_step
from tests.test_train import (
    HALF,
    STAGES,
    STEPS,
    assert_near,
    assert_success,
    cut_short,
    losses,
    newest,
    tensors,
)

MUON = "optim.name=muon model.init=smooth"


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 24, 60), (2, 60, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directions_are_those_of_the_matrix_with_singular_values_near_one(shape: tuple, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.tensor([1e-6, 1.0, 1e4])[: shape[0], None, None]
    result = orthogonalise(matrices.to(dtype)).float()
    for matrix, direction in zip(matrices, result, strict=True):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        inside = u.T @ direction @ v.T  # it is diagonal if the singular vectors are the same
        kept = torch.diagonal(inside)[s > 0.1 * s[0]]
        assert ((kept > 0.6) & (kept < 1.3)).all()
        assert (inside - torch.diag(torch.diagonal(inside))).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)


def test_a_matrix_without_a_gradient_stays() -> None:
    assert not orthogonalise(torch.zeros(2, 8, 8)).any()


def test_the_step_is_longer_for_tall_matrices() -> None:
    assert [step_scale(shape) for shape in ((16, 16), (64, 16), (48, 16), (16, 64), (16, 16, 4))] == [
        1, 2, pytest.approx(3**0.5), 1, 1,
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 64), st.integers(1, 64)), max_size=20), st.integers(1, 9))
def test_no_rank_has_much_more_to_do_than_the_others(shapes: list[tuple[int, int, int]], ranks: int) -> None:
    stacks = {str(i): Stack(*shape) for i, shape in enumerate(shapes)}
    owners = assign(stacks, ranks)
    assert owners.keys() == stacks.keys()
    load = [sum(stacks[name].flops for name, owner in owners.items() if owner == rank) for rank in range(ranks)]
    largest = max((stack.flops for stack in stacks.values()), default=0)
    assert max(load) <= sum(load) / ranks + largest


PIECES = """
import random, torch
from bfsys import dist, muon
from bfsys.muon import Orthogonaliser, Span, Stack
from bfsys.ranks import ranks_from_environment

ranks = ranks_from_environment()
dist.start(ranks, timeout_s=900)
stacks = {"a": Stack(3, 8, 8), "b": Stack(1, 8, 20), "c": Stack(1, 20, 8), "d": Stack(1, 6, 5), "e": Stack(2, 1, 1)}
torch.manual_seed(0)
whole = {name: torch.randn(stack.elements) for name, stack in stacks.items()}
orthogonalise, counted, exchanged = muon.orthogonalise, [], []
muon.orthogonalise = lambda x: counted.append(x.numel()) or orthogonalise(x)
all_to_all = dist.all_to_all
dist.all_to_all = lambda values, *counts: exchanged.append(len(values)) or all_to_all(values, *counts)
for trial in range(40):
    rng = random.Random(trial)
    spans = []  # of this rank
    for name, stack in stacks.items():
        cuts = sorted(rng.choices(range(stack.elements + 1), k=ranks.world_size - 1))
        if trial % 4 == 0:  # only the last rank has something
            cuts = [0] * (ranks.world_size - 1)
        first, end = ([0, *cuts][ranks.rank], [*cuts, stack.elements][ranks.rank])
        if trial % 4 == 1:  # all ranks have everything
            first, end = 0, stack.elements
        if end > first:
            spans.append(Span(name, first, end))
    for dtype in (torch.float32, torch.bfloat16):
        counted.clear(), exchanged.clear()
        results = Orthogonaliser(stacks, spans, ranks, dtype)([whole[s.name][s.first : s.end] for s in spans])
        total = int(dist.gather_numbers([sum(counted)]).sum())
        for span, result in zip(spans, results, strict=True):
            stack = stacks[span.name]
            expected = orthogonalise(whole[span.name].to(dtype).view(stack)).flatten()[span.first : span.end]
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 0.05)
        assert total == sum(stack.elements for stack in stacks.values()), "a matrix was orthogonalised twice"
        assert trial % 4 != 1 or not exchanged, "all ranks had all pieces"
print("all equal")
dist.stop()
"""


@pytest.mark.parametrize("world_size", [1, 3])
def test_pieces_on_any_ranks_make_the_same_directions(world_size: int, run_ranks) -> None:
    for rank in run_ranks(world_size, ["-c", PIECES]):
        assert rank.stdout == "all equal\n", rank.stdout + rank.stderr


@pytest.fixture(scope="module")
def muon_runs(
    request: pytest.FixtureRequest, datasets: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """(config file, folder of runs): every stage and precision on two ranks, and the resumed runs that the tests need.
    They resume from step 2. `3-from-1` and `1-from-3` change the stage there."""
    folder = tmp_path_factory.mktemp("muon")
    config = folder / "tiny.yaml"
    content = tiny_config(datasets, folder)
    content["train"] |= {"steps": STEPS, "save_every": HALF}
    config.write_text(yaml.safe_dump(content))
    kinds = [(stage, precision) for stage in STAGES for precision in ("fp32", "bf16")]
    runs = [f"{MUON} name=s{s}-{p} train.zero_stage={s} train.precision={p}" for s, p in kinds]
    assert_success(_run_ranks(2, ["tests/worker.py", str(config), *runs]))
    resumed = []
    wanted = [(p["stage"], p["precision"]) for p in parameters_of_tests_with("muon_runs", request) if "precision" in p]
    again = [(f"s{s}-{p}-resumed", s, p, f"s{s}-{p}") for s, p in kinds if (s, p) in wanted]
    changed = [("3-from-1", 3, "fp32", "s1-fp32"), ("1-from-3", 1, "fp32", "s3-fp32")]
    for name, stage, precision, source in (*again, *changed):
        cut_short(folder / "runs" / source, folder / "runs" / name, step=HALF)
        resumed.append(f"{MUON} name={name} train.zero_stage={stage} train.precision={precision}")
    assert_success(_run_ranks(2, ["tests/worker.py", str(config), *resumed]))
    return config, folder / "runs"


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_as_plain_pytorch(stage: int, muon_runs: tuple[Path, Path]) -> None:
    config_file, runs = muon_runs
    expected_losses, _, weights, average = train_plainly(load_config(config_file, MUON.split()))
    run = runs / f"s{stage}-fp32"
    assert losses(run) == pytest.approx(expected_losses, rel=1e-5)
    assert_near(run, weights, average, rtol=1e-3, atol=1e-4)
    assert max(expected_losses) - min(expected_losses) > 0.1, "nothing was learned: the comparison says little"


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_stays_near_fp32(stage: int, muon_runs: tuple[Path, Path]) -> None:
    _, runs = muon_runs
    assert losses(runs / f"s{stage}-bf16") == pytest.approx(losses(runs / f"s{stage}-fp32"), rel=5e-2)
    assert losses(runs / f"s{stage}-bf16") != losses(runs / f"s{stage}-fp32")


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        # Stage 0 in bf16 is not resumed before stage 3 in bf16, because DeepSpeed keeps state of the first one in the
        # process, which must not reach the second one.
        *((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")),
        *(pytest.param(*kind, marks=pytest.mark.slow) for kind in ((0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"))),
    ],
)
def test_resumed_equals_uninterrupted(stage: int, precision: str, muon_runs: tuple[Path, Path]) -> None:
    _, runs = muon_runs
    whole, resumed = runs / f"s{stage}-{precision}", runs / f"s{stage}-{precision}-resumed"
    assert losses(resumed) == losses(whole)
    for state in ("weight", "exp_avg", "exp_avg_sq", "momentum_buffer", "ema"):
        one, other = tensors(newest(whole), state), tensors(newest(resumed), state)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[n], other[n]) for n in one), state
    of_muon, of_adamw = (tensors(newest(whole), state) for state in ("momentum_buffer", "exp_avg"))
    assert of_muon
    assert of_muon.keys() | of_adamw.keys() == tensors(newest(whole), "weight").keys()
    assert not of_muon.keys() & of_adamw.keys()


@pytest.mark.parametrize(("name", "source"), [("3-from-1", 1), ("1-from-3", 3)])
def test_a_checkpoint_resumes_at_another_stage(name: str, source: int, muon_runs: tuple[Path, Path]) -> None:
    _, runs = muon_runs
    assert losses(runs / name) == pytest.approx(losses(runs / f"s{source}-fp32"), rel=1e-5)


@pytest.mark.parametrize(("stage", "world_size"), [(1, 1), (3, 4)])
def test_a_checkpoint_resumes_on_another_number_of_ranks(
    stage: int, world_size: int, muon_runs: tuple[Path, Path], run_ranks
) -> None:
    config_file, runs = muon_runs
    name = f"s{stage}-on-{world_size}"
    cut_short(runs / f"s{stage}-fp32", runs / name, step=HALF)
    options = f"{MUON} name={name} train.zero_stage={stage}".split()
    assert_success(run_ranks(world_size, ["bfsys/train.py", str(config_file), *options]))
    assert losses(runs / name) == pytest.approx(losses(runs / f"s{stage}-fp32"), rel=1e-5)


def test_another_optimizer_in_the_same_directory_is_refused(muon_runs: tuple[Path, Path], run_ranks) -> None:
    config_file, runs = muon_runs
    shutil.copytree(runs / "s1-fp32", runs / "other")
    options = ["name=other", f"train.steps={STEPS + 2}", "model.init=smooth"]
    (result,) = run_ranks(1, ["bfsys/train.py", str(config_file), *options])
    assert result.returncode == 2
    assert "optim: name was 'muon', is now 'adamw'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_step_with_gradients_that_are_not_finite_changes_nothing(datasets: Path, tmp_path: Path) -> None:
    config_file = tmp_path / "tiny.yaml"
    config_file.write_text(yaml.safe_dump(tiny_config(datasets, tmp_path)))
    poison = {"kind": "gradient", "samples": [pair for step in (2, 4) for pair in samples_of_step(config_file, step)]}
    kinds = [*((stage, "fp32") for stage in STAGES), (1, "bf16")]  # DeepSpeed uses another optimizer for the last one
    runs = [
        ([*MUON.split(), f"name=s{stage}-{precision}", f"train.zero_stage={stage}", f"train.precision={precision}",
          "train.steps=4", "train.save_every=2", "train.keep_checkpoints=100"], [poison])
        for stage, precision in kinds
    ]  # fmt: skip
    for process in start_ranks(2, train_several, (str(config_file), runs)):
        said = process.communicate(900)
        assert process.returncode == 0, said
    for stage, precision in kinds:
        run = tmp_path / "runs" / f"s{stage}-{precision}"
        before, after = (run / "checkpoints" / checkpoint_name(step) for step in (3, 4))
        assert [read_manifest(path)["updates"] for path in (before, after)] == [2, 2]
        for state in ("weight", "exp_avg", "momentum_buffer", "ema"):
            one, other = tensors(before, state), tensors(after, state)
            assert one
            assert all(torch.equal(one[name], other[name]) for name in one), state
            assert all(tensor.isfinite().all() for tensor in other.values())


SUB_GROUPS = """
import sys
import torch
from bfsys import dist, engine
from bfsys.batch import ByteBatch
from bfsys.config import load_config
from bfsys.model.byteformer import ByteFormer
from bfsys.ranks import ranks_from_environment

ranks = ranks_from_environment()
dist.start(ranks, timeout_s=900)
config = load_config(sys.argv[1], sys.argv[2:])
make_json, weights, groups = engine.deepspeed_config, [], []
for size in (10**9, 1500):
    def smaller(*arguments):
        result = make_json(*arguments)
        result["zero_optimization"]["sub_group_size"] = size
        return result
    engine.deepspeed_config = smaller
    torch.manual_seed(0)
    trained = engine.Engine(ByteFormer(config.model.architecture(), 5), config, ranks)
    for step in range(3):
        for _ in range(trained.micro_batches):
            trained.backward(trained.forward(ByteBatch.of_zeros(40 + step)).float().square().sum())
        trained.step(1e-3, 0.9)
    weights.append({name: (first, piece.clone()) for name, first, piece in trained.read_pieces("weight")})
    groups.append(len(trained.optimizer._orthogonalisers))
assert groups[0] == 1 and groups[1] > 1, groups
assert weights[0].keys() == weights[1].keys()
for name, (first, piece) in weights[0].items():
    torch.testing.assert_close(weights[1][name][1], piece, rtol=1e-4, atol=1e-6)
print("all equal")
dist.hard_exit(0)
"""


def test_parts_of_a_group_that_are_updated_apart_make_the_same_step(config_file: Path, run_ranks) -> None:
    """DeepSpeed splits a group of more than 1e9 numbers at stage 3."""
    options = [*MUON.split(), "train.zero_stage=3", "train.precision=fp32"]
    for rank in run_ranks(2, ["-c", SUB_GROUPS, str(config_file), *options]):
        assert rank.stdout.endswith("all equal\n"), rank.stdout + rank.stderr

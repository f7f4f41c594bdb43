"""Runs that start from another run's weights."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from bfsys.checkpoint import files, loading
from bfsys.config import Config, load_config
from bfsys.dist import Ranks
from bfsys.dryrun import dry_run
from bfsys.errors import UserError
from bfsys.init_from import initial_weights
from bfsys.model.byteformer import ByteFormer
from tests.conftest import _run_ranks, tiny_config
from tests.test_train import newest, tensors

CLASSES = ("a0", "a1", "a2", "b0", "b1")
STAGES = ((1, "bf16"), (3, "bf16"))


@pytest.fixture
def config(config_file: Path, finished_run: Path) -> Config:
    return load_config(config_file, [f"train.init_from={finished_run}"])


def start(config: Config, classes: Sequence[str] = CLASSES) -> tuple[dict[str, Tensor], str]:
    """Return the initial weights of a run with these classes, and the note about them."""
    torch.manual_seed(1)
    weights, notes = initial_weights(own(config, classes), config, classes, Ranks())
    return weights, "\n".join(notes)


def own(config: Config, classes: Sequence[str] = CLASSES) -> ByteFormer:
    torch.manual_seed(1)
    return ByteFormer(config.model.architecture(), len(classes))


def with_model(config: Config, **changes: object) -> Config:
    return replace(config, model=replace(config.model, **changes))


@pytest.fixture(scope="module")
def started(
    datasets: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[subprocess.CompletedProcess]]:
    """(folder of runs, ranks): runs of one tiny step at several stages; one run is started twice."""
    folder = tmp_path_factory.mktemp("init_from")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_config(datasets, folder)))
    still = "train.steps=1 optim.lr=1e-12 optim.final_lr=0 optim.warmup_steps=0 optim.weight_decay=0"
    runs = [
        f"name=s{stage} train.zero_stage={stage} train.precision={precision} train.init_from={finished_run} {still}"
        for stage, precision in STAGES
    ]
    again = f"name=s1 train.zero_stage=1 train.init_from=/nowhere {still} train.steps=2"
    ranks = _run_ranks(2, ["tests/worker.py", str(config), *runs, again])
    for rank in ranks:
        assert rank.returncode == 0, rank.stdout + rank.stderr
    return folder / "runs", ranks


@pytest.mark.parametrize("stage", [stage for stage, _ in STAGES])
def test_weights_and_average_are_the_others_average(
    stage: int, started: tuple[Path, list[subprocess.CompletedProcess]], finished_run: Path
) -> None:
    want = tensors(newest(finished_run), "ema")
    for state in ("weight", "ema"):
        got = tensors(newest(started[0] / f"s{stage}"), state)
        assert got.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_copied_weights_are_reported_once_and_a_resumed_run_ignores_the_setting(
    started: tuple[Path, list[subprocess.CompletedProcess]], finished_run: Path
) -> None:
    first, second = (rank.stdout for rank in started[1])
    assert first.count(f"starting from the averaged weights of {newest(finished_run)}") == len(STAGES)
    assert "the head is copied: the 5 classes are the same" in first
    assert "continuing" in first.split("s3")[-1]
    assert "starting from" not in second


def test_a_resumed_run_keeps_the_origin_of_its_weights(
    started: tuple[Path, list[subprocess.CompletedProcess]], finished_run: Path
) -> None:
    manifest = files.read_manifest(newest(started[0] / "s1"))
    assert (manifest["step"], manifest["config"]["train"]["init_from"]) == (2, str(finished_run))


def test_other_classes_have_a_new_head(config: Config, finished_run: Path) -> None:
    theirs = loading.load_model(finished_run)[0].state_dict()
    for classes, said in (
        (("a0", "a1", "x"), "the head starts from new weights: 3 classes here, 5 there"),
        (CLASSES[::-1], "5 classes here, 5 there, of other names or in another order"),
    ):
        weights, notes = start(config, classes)
        assert said in notes
        assert torch.equal(weights["head.weight"], own(config, classes).head.weight)
        assert torch.equal(weights["blocks.0.qkv.weight"], theirs["blocks.0.qkv.weight"])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (80, "64 of 64 positions are copied; the other 16 start from new weights"),
        (50, "50 of 64 positions are copied; the others are left out"),
    ],
)
def test_positions_of_another_length_are_taken_over_as_far_as_they_go(
    rows: int, said: str, config: Config, finished_run: Path
) -> None:
    config = with_model(config, max_tokens=rows)
    weights, notes = start(config)
    assert said in notes
    theirs, ours = loading.load_model(finished_run)[0].stem.positions, own(config).stem.positions
    both = min(64, rows)
    assert torch.equal(weights["stem.positions"], torch.cat([theirs[:both], ours[both:]]))


def test_attention_pooling_starts_from_the_mean(config: Config) -> None:
    weights, notes = start(with_model(config, pool="attention"))
    assert not weights["pool.query"].any()
    assert "the query of model.pool starts at zero" in notes


def test_another_mode_is_noted(config: Config) -> None:
    assert "model.mode was masked there and is as_released here" in start(with_model(config, mode="as_released"))[1]


def test_other_byte_transforms_are_noted(config: Config) -> None:
    config = replace(config, data=replace(config.data, byte_transforms=("head:20",)))
    assert "data.byte_transforms were none there and are head:20 here" in start(config)[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 32}, "dim is 16 there and 32 here"),
        ({"kernel": 4}, "kernel is 8 there and 4 here"),
        ({"shift": 2}, r"shifts is \[0, 4, 0\] there and \[0, 2, 0\] here"),
        ({"merge_after": (0,)}, r"merge_after is \[0, 1\] there and \[0\] here"),
    ],
)
def test_another_architecture_is_refused(change: dict, message: str, config: Config) -> None:
    with pytest.raises(UserError, match=message):
        start(with_model(config, **change))


def test_missing_runs_are_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.init_from: .*no such directory"):
        start(replace(config, train=replace(config.train, init_from=str(tmp_path / "none"))))


def test_an_export_is_named_as_such(config: Config, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(UserError, match=r"train\.init_from: .*is an export; give the run from which it was exported"):
        start(replace(config, train=replace(config.train, init_from=str(tmp_path))))


def test_a_run_without_an_average_gives_its_last_weights(config: Config, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    path = newest(tmp_path / "run")
    manifest = files.read_manifest(path)
    manifest["config"]["optim"]["ema_decay"] = 0.0
    manifest["sha256"] = files.fingerprint(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    weights, notes = start(replace(config, train=replace(config.train, init_from=str(tmp_path / "run"))))
    assert "starting from the weights of" in notes
    assert torch.equal(weights["head.weight"], tensors(path, "weight")["head.weight"])


def test_the_dry_run_lists_the_weights_that_would_be_copied(config: Config, capsys) -> None:
    dry_run(with_model(config, max_tokens=70), 1, with_data=True)
    printed = capsys.readouterr().out
    assert "64 of 64 positions are copied; the other 6 start from new weights" in printed
    assert "the head is copied" in printed
    with pytest.raises(UserError, match="dim is 16 there and 32 here"):
        dry_run(with_model(config, dim=32), 1, with_data=True)

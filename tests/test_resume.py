"""The lines, evaluations and checkpoints of a run that resumes after stops and damage."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from bfsys import run_dir
from bfsys.checkpoint import files
from bfsys.errors import EXIT_DIVERGED, EXIT_STORAGE, UserError
from tests.conftest import _run_ranks, tiny_config
from tests.test_train import assert_success, cut_short, lines, losses, tensors


@pytest.fixture(scope="module")
def runs(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on one rank, and resumed runs: see the tests."""
    folder = tmp_path_factory.mktemp("resumes")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_config(datasets, folder)))
    runs = folder / "runs"
    changed = {
        "lines": "train.log_every=3",
        "workers": "data.workers=1",
        "evaluated": "train.eval_every=2",
    }
    assert_success(_run_ranks(1, ["tests/worker.py", str(config), *(f"name={n} {o}" for n, o in changed.items())]))

    cut_short(runs / "lines", runs / "lines-resumed", step=4)
    cut_short(runs / "evaluated", runs / "evaluated-resumed", step=4)
    drop_evaluation(runs / "evaluated-resumed", step=4)
    shutil.copytree(runs / "evaluated", runs / "shortened")
    shutil.copytree(runs / "workers", runs / "damaged")
    for step in (8, 10):
        (runs / "damaged" / "checkpoints" / f"step_{step:08d}" / "ema-0-of-1.safetensors").write_bytes(b"")
    (runs / "damaged" / "checkpoints" / ".step_00000007.part").mkdir()
    continued = [
        "name=lines-resumed train.log_every=3",
        "name=evaluated-resumed train.eval_every=2",
        "name=shortened train.steps=6",
        "name=damaged train.steps=5 train.keep_checkpoints=2",
    ]
    assert_success(_run_ranks(1, ["tests/worker.py", str(config), *continued]))
    return runs


def drop_evaluation(run: Path, step: int) -> None:
    """Drop the last evaluation, as if the run had been stopped between its checkpoint and its evaluation."""
    kept = [
        x for x in (run / "metrics.jsonl").read_text().splitlines() if '"eval"' not in x or f'"step": {step},' not in x
    ]
    (run / "metrics.jsonl").write_text("".join(f"{x}\n" for x in kept))


def test_a_line_across_a_resume_is_that_of_the_whole_run(runs: Path) -> None:
    """Lines are at 3, 6, 9, 10. The checkpoint of step 4 carries the sums of step 4 into the line of step 6."""
    assert [line["step"] for line in lines(runs / "lines-resumed")] == [3, 6, 9, 10]
    for key in ("loss", "top1", "samples", "sources", "padding_share"):
        assert [x[key] for x in lines(runs / "lines-resumed")] == [x[key] for x in lines(runs / "lines")]


def test_loader_processes_change_nothing(runs: Path) -> None:
    assert losses(runs / "workers") == losses(runs / "evaluated")


def test_no_evaluation_is_lost_or_made_twice(runs: Path) -> None:
    whole, resumed = (lines(runs / name, "eval") for name in ("evaluated", "evaluated-resumed"))
    assert [x["step"] for x in whole] == [2, 4, 6, 8, 10]
    assert [(x["step"], x["loss"]) for x in resumed] == [(x["step"], x["loss"]) for x in whole]


def test_fewer_steps_than_made_is_a_finished_run(runs: Path) -> None:
    assert files.find_newest(runs / "shortened")[0].name == "step_00000010"
    assert len(lines(runs / "shortened")) == 10


def test_damaged_checkpoints_do_not_push_good_ones_out(runs: Path) -> None:
    """8 and 10 are damaged. The run resumes at 4, ends at 5 and keeps two: 4 and 5 stay, and the next start uses 5."""
    root = runs / "damaged" / "checkpoints"
    newest, problems = files.find_newest(runs / "damaged")
    assert newest.name == "step_00000005"
    assert not problems
    assert {path.name for path in root.glob("*step_*")} == {
        "step_00000004", "step_00000005", "damaged_step_00000008", "damaged_step_00000010",
    }  # fmt: skip
    assert not list(root.glob(".*"))
    assert losses(runs / "damaged")[:4] == losses(runs / "workers")[:4]


def test_a_learning_rate_that_is_too_large_ends_the_run_and_spoils_no_checkpoint(
    config_file: Path, tmp_path: Path, run_ranks
) -> None:
    """The first update is finite but ruins the weights, so every later step is bad."""
    change = ["optim.lr=1e30", "optim.warmup_steps=0", "train.steps=30", "train.save_every=1"]
    (result,) = run_ranks(1, ["bfsys/train.py", str(config_file), *change])
    assert result.returncode == EXIT_DIVERGED
    assert "Try a lower optim.lr" in result.stderr
    assert "Traceback" not in result.stderr
    run = tmp_path / "runs" / "tiny"
    assert [line["step"] for line in lines(run)] == [1]
    path, problems = files.find_newest(run)
    assert not problems
    for state in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        assert all(tensor.isfinite().all() for tensor in tensors(path, state).values())


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(
    runs: Path, config_file: Path, tmp_path: Path, run_ranks
) -> None:
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "checkpoints").write_text("in the way")
    results = run_ranks(2, ["bfsys/train.py", str(config_file), "train.save_every=1"])
    assert [r.returncode for r in results] == [EXIT_STORAGE, EXIT_STORAGE]
    assert "checkpoints" in results[0].stderr
    assert "Traceback" not in results[0].stderr + results[1].stderr
    assert (run / "checkpoints").read_text() == "in the way"


def test_a_full_disk_ends_the_run_with_its_own_code(config_file: Path, tmp_path: Path, run_ranks) -> None:
    """The code is the same whether a checkpoint, metrics or TensorBoard's files meet the full disk first."""
    small = tmp_path / "runs"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=450k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("a file system of its own cannot be mounted here")
    try:
        change = ["train.steps=5000", "train.save_every=2000", "train.keep_checkpoints=1"]
        results = run_ranks(2, ["bfsys/train.py", str(config_file), *change])
        assert [r.returncode for r in results] == [EXIT_STORAGE, EXIT_STORAGE], results[0].stderr
        assert os.strerror(errno.ENOSPC) in results[0].stderr
        assert "During handling" not in results[0].stderr  # (TensorBoard's thread prints its own traceback)
        assert files.find_newest(small / "tiny")[0] is not None
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize(("job", "wait"), [("", "LOCK_WAIT_S"), ("7", "LOCK_WAIT_IN_JOB_S")])
def test_two_starts_of_a_run_do_not_train_together(
    job: str, wait: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setattr(run_dir, wait, 0.5)
    hold = run_dir.hold_directory(tmp_path)
    with pytest.raises(UserError, match="another process is training in it"):
        run_dir.hold_directory(tmp_path)
    hold.close()
    run_dir.hold_directory(tmp_path).close()

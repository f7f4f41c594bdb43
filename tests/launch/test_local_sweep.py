"""Sweeps on this machine, with real training."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
import torch

from bfsys import train, typed_yaml
from bfsys.cli import call
from bfsys.config import load_config
from bfsys.errors import UserError
from bfsys.launch import local
from bfsys.launch.restart_policy import newest_step
from bfsys.supervision.run_end import how_it_ended
from tests.forked import Forked, run_python
from tests.launch.test_local import LAUNCHER, wait_until
from tests.test_train import lines


def start(*arguments: object, act: Callable = run_python) -> Forked:
    """The launcher's script in a process that need not import PyTorch; test_local.py starts it as a program."""
    return Forked(act, (str(LAUNCHER), *map(str, arguments)), {"DS_ACCELERATOR": "cpu"})


def run_with_slow_steps(*arguments: str) -> None:
    """Like run_python, with a pause before each training step, which is long from step 10 on."""
    train_step = train.train_step
    train.train_step = lambda *given: time.sleep(0.5 if given[-1] < 10 else 10) or train_step(*given)
    run_python(*arguments)


def problems_of(*arguments: object) -> tuple[str, ...]:
    with pytest.raises(UserError) as error:
        call("launch", [*map(str, arguments)])
    return error.value.problems


def test_runs_train_at_once_and_finished_ones_are_not_trained_again(config_file, tmp_path, capsys):
    sweep = ["--sweep", "train.seed=0,1", "--at-once", "2", "--ranks", "1", config_file]
    out, err = (process := start(*sweep)).communicate(timeout=900)
    assert process.returncode == 0, out + err
    runs = [tmp_path / "runs" / f"tiny-seed={seed}" for seed in (0, 1)]
    starts, end = out.index(f"{runs[1]}: starts"), min(out.index(f"{run}: finished") for run in runs)
    assert starts < end
    for run in runs:
        assert "step 10/10" in (run / "log" / "console.log").read_text()
        assert [line["step"] for line in lines(run)] == list(range(1, 11))
    assert "step 10/10" not in out
    assert len({line["loss"] for run in runs for line in lines(run)}) == 20  # the seeds differ
    head, row = out.splitlines()[-2:]
    assert head.split()[:2] == ["seeds", "top-1"]
    assert row.split()[0] == "2"
    assert row.endswith(f"{tmp_path}/runs/tiny-seed=*")

    before = [(run / "metrics.jsonl").stat().st_mtime_ns for run in runs]
    assert call("launch", [*map(str, sweep)]) == 0
    assert capsys.readouterr().out.splitlines() == ["sweep: 2 runs, 2 of them finished already", head, row]
    assert [(run / "metrics.jsonl").stat().st_mtime_ns for run in runs] == before


def test_a_run_that_fails_does_not_stop_the_others(config_file, tmp_path):
    sweep = ["--sweep", "optim.lr=1e25,1e-3", "--ranks", "1", config_file, "train.steps=20", "optim.clip_norm=0"]
    out, err = (process := start(*sweep)).communicate(timeout=900)
    assert process.returncode == 1, out + err
    failed, finished = (tmp_path / "runs" / f"tiny-lr={rate}" for rate in ("1e25", "1e-3"))
    assert how_it_ended(failed)["exit_code"] == 65
    assert how_it_ended(finished)["exit_code"] == 0
    assert f"{failed}: ended with code 65: bad steps again" in err
    assert f"error: 1 of 2 runs failed: {failed}\n" in err
    assert "step 20/20" in out  # runs that train one at a time print to the console
    assert out.splitlines()[-1] == (
        "not evaluated after the last step: 1 of 2 runs. Each has its own row with its latest evaluation"
    )


def test_a_stop_saves_all_runs_and_the_same_command_resumes_them(config_file, tmp_path):
    sweep = ["--sweep", "train.seed=0,1,2", "--at-once", "2", "--ranks", "1", config_file]
    sweep += ["train.steps=20", "train.save_every=2"]
    runs = [tmp_path / "runs" / f"tiny-seed={seed}" for seed in range(3)]
    process = start(*sweep, act=run_with_slow_steps)  # so that no run ends before it is stopped
    wait_until(lambda: all(newest_step(run) for run in runs[:2]), 900)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 130, out + err
    assert err.endswith("the sweep was stopped; the same command resumes it\n")
    stopped = [newest_step(run) for run in runs]
    assert all(0 < step < 20 for step in stopped[:2])
    assert [how_it_ended(run)["exit_code"] for run in runs[:2]] == [130, 130]
    assert not (runs[2] / "config.yaml").exists()

    out, err = (process := start(*sweep)).communicate(timeout=900)
    assert process.returncode == 0, out + err
    for run, step in zip(runs, stopped, strict=True):
        assert [line["step"] for line in lines(run)] == list(range(1, 21))
        assert (f"continuing {run} after step {step}\n" in (run / "log" / "console.log").read_text()) == (step > 0)


def test_other_settings_and_wrong_options_are_refused_at_once(config_file, tmp_path, capsys):
    config = load_config(config_file, ["name=tiny-seed=0", "train.log_every=5"])
    (config.run_dir / "checkpoints").mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(typed_yaml.dump(config))
    (config.run_dir / "checkpoints" / "latest").write_text("step_00000004\n")
    sweep = ["--sweep", "train.seed=0,1", config_file]
    assert call("launch", [*map(str, sweep), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"{tmp_path}/runs/tiny-seed=0: resumes after step 4 of 10",
        f"{tmp_path}/runs/tiny-seed=1: trains 10 steps",
    ]
    lanes, settings = problems_of(*sweep, "--ranks=3", "optim.lr=0.5")
    assert "world sizes that fit: 1, 2, 4" in lanes
    assert settings.startswith(
        f"run directory {config.run_dir}: was trained with other settings: optim.lr was 0.003, is"
    )
    assert problems_of(*sweep, "--at-once=0", "data.lanez=1")[0] == "--at-once: got 0; at least 1 is needed"
    assert "only a sweep" in problems_of(config_file, "--at-once=2")[0]
    assert any("no such" in problem for problem in problems_of(*sweep, "data.sources.0.path=/no/where"))


def test_runs_at_once_share_gpus_or_cores(monkeypatch):
    shares = [[local.share_of(range(8), slot, at_once) for slot in range(at_once)] for at_once in (1, 2, 3)]
    assert shares == [[[*range(8)]], [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [2, 3], [4, 5]]]
    assert [local.share_of("ab", slot, 3) for slot in range(3)] == [["a"], ["b"], ["a"]]
    monkeypatch.setattr(local, "usable_cores", lambda: 6)
    assert [local.choose_ranks(64, None, at_once) for at_once in (1, 2, 3, 12)] == [4, 2, 2, 1]
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [local.choose_ranks(64, None, at_once) for at_once in (1, 2, 8)] == [4, 2, 1]
    with pytest.raises(UserError, match="more than the 2 GPUs of each of 2 runs"):
        local.choose_ranks(64, range(4, 5), 2)

"""`bfsys compare` reads run directories and shows them as a table."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from bfsys import compare, typed_yaml
from bfsys.cli import call
from bfsys.config import Config, Data, load_config
from bfsys.errors import UserError
from tests.conftest import REPOSITORY

Scores = dict[int, float | tuple[float, ...]]


@pytest.fixture
def make_run(config_file: Path, tmp_path: Path):
    """`make_run(name, {step: top-1, or one for each source}, overrides…)` makes a run directory like that of training,
    of 10 steps by default."""

    def make(name: str, evaluations: Scores, *overrides: str) -> Path:
        config = load_config(config_file, [f"name={name}", *overrides])
        config.run_dir.mkdir(parents=True)
        (config.run_dir / "config.yaml").write_text(typed_yaml.dump(config))
        with open(config.run_dir / "metrics.jsonl", "w") as file:
            for step, top1 in evaluations.items():
                seconds = {"productive": 50.0, "lost": 500.0, "restart": 5000.0, "stall": 6.0, "data_wait": 4.0}
                file.write(json.dumps({"kind": "train", "step": step, "seconds": seconds}) + "\n")
                of_sources = top1 if isinstance(top1, tuple) else (top1,)
                sources = {name: {"top1": share} for name, share in zip("ab", of_sources, strict=False)}
                mean = sum(of_sources) / len(of_sources)
                line = {"kind": "eval", "step": step, "loss": 2 - mean, "top1": mean, "sources": sources}
                file.write(json.dumps(line) + "\n")
        return config.run_dir

    return make


def cells(capsys: pytest.CaptureFixture, *paths: Path) -> list[list[str]]:
    """The cells of each line that the command prints."""
    assert call("compare", [*map(str, paths)]) == 0
    return [line.split("  ") for line in _narrow(capsys.readouterr().out).splitlines()]


def _narrow(text: str) -> str:
    while "   " in text:
        text = text.replace("   ", "  ")
    return "\n".join(line.strip() for line in text.splitlines())


def test_seeds_form_a_row_and_unfinished_runs_stay_apart(make_run, tmp_path, capsys):
    for seed, top1 in enumerate((0.5, 0.6, 0.7)):
        make_run(f"x-lr=3e-4-seed={seed}", {5: 0.1, 10: top1}, "optim.lr=3e-4", f"train.seed={seed}")
    make_run("x-lr=3e-4-seed=3", {5: 0.9}, "optim.lr=3e-4", "train.seed=3", "train.log_every=7", "data.workers=2")
    make_run("y", {10: 0.65}, "train.eval_every=5")
    runs = tmp_path / "runs"
    (runs / "no_run").mkdir()
    assert cells(capsys, runs, runs / "y") == [
        ["lr", "seeds", "top-1 %", "loss", "steps", "min", "parameters", "run"],
        ["0.003", "1", "65.00", "1.350", "10", "1.0", "-", f"{runs}/y"],
        ["0.0003", "3", "60.00 ± 10.00", "1.400 ± 0.100", "10", "1.0", "-", f"{runs}/x-lr=3e-4-seed=*"],
        ["0.0003", "1", "90.00", "1.100", "5 of 10", "1.0", "-", f"{runs}/x-lr=3e-4-seed=3"],
        ["not evaluated after the last step: 1 of 5 runs. Each has its own row with its latest evaluation"],
    ]


def test_sources_and_keys_that_end_alike_have_columns(make_run, tmp_path, capsys):
    runs = [
        make_run("one", {10: (0.25, 0.75)}, "data.byte_transforms=[reverse]"),
        make_run("two", {20: (0.5, 1.0)}, "train.steps=20", "data.sources.0.weight=2"),
        make_run("three", {}, "data.sources.1.weight=3", "model.dim=32"),
    ]
    weights = ["data.sources.0.weight", "data.sources.1.weight"]
    scores = ["seeds", "top-1 %", "top-1 % a", "top-1 % b", "loss", "steps", "min", "parameters", "run"]
    head, *rows = cells(capsys, *runs)
    assert head == [*weights, "byte_transforms", "dim", *scores]
    assert rows[0] == ["2", "1", "[]", "16", "1", "75.00", "50.00", "100.00", "1.250", "20", "1.0", "-", str(runs[1])]
    assert rows[1][:8] == ["1", "1", '["reverse"]', "16", "1", "50.00", "25.00", "75.00"]
    assert rows[2] == ["1", "3", "[]", "32", "1", "-", "-", "-", "-", "0 of 10", "-", "-", str(runs[2])]


def test_the_same_seed_twice_is_noted(make_run, capsys):
    runs = [make_run(name, {10: 0.5}) for name in ("one", "two")]
    assert cells(capsys, *runs, runs[0])[-1] == [f"note: {runs[0]} = {runs[1]}: the same settings and the same seed"]


def with_samples(run: Path, samples: int) -> Path:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"top1"', f'"samples": {samples}, "top1"'))
    return run


def test_runs_that_were_evaluated_on_different_files_are_noted(make_run, capsys) -> None:
    runs = [
        with_samples(make_run("one", {10: 0.5}), 24),
        with_samples(make_run("two", {10: 0.5}, "train.seed=1"), 9999),
        with_samples(make_run("three", {10: 0.4}, "optim.lr=1"), 24),
    ]
    assert cells(capsys, *runs)[-1] == [
        f"note: {runs[0]} and 1 other / {runs[1]}: they were evaluated on different files, although their data "
        "settings are equal, so their scores cannot be compared"
    ]
    other = with_samples(make_run("four", {10: 0.4}, "data.sources.0.weight=2"), 7)
    assert "different files" not in cells(capsys, runs[0], runs[2], other)[-1][0]


def with_files(run: Path, files: str) -> Path:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"top1"', f'"evaluated": "{files}", "top1"', 1))
    return run


def test_the_files_of_evaluations_are_compared_if_all_runs_record_them(make_run, capsys) -> None:
    runs = [with_samples(make_run(f"{seed}", {10: 0.5}, f"train.seed={seed}"), 24) for seed in range(3)]
    with_files(runs[0], "a")
    assert "different files" not in cells(capsys, *runs)[-1][0]  # two runs are of an earlier version
    with_files(runs[1], "b")
    assert cells(capsys, *runs[:2])[-1][0].startswith(f"note: {runs[0]} / {runs[1]}: they were evaluated on different")


def test_runs_that_were_trained_on_different_files_are_noted(make_run, monkeypatch, capsys) -> None:
    runs = [make_run(f"{seed}", {10: 0.5}, f"train.seed={seed}") for seed in range(3)]
    for run in runs:
        (run / "checkpoints" / "step_00000010").mkdir(parents=True)

    def manifest(paths: list[Path]) -> dict:
        seed = int(paths[-1].parent.parent.name)
        files = 50 if seed else 40
        return {"shapes": {}, "plan": {"source 0": f"a train: {files} samples", "seed": seed}}

    monkeypatch.setattr(compare, "newest_manifest", manifest)
    (note,) = cells(capsys, *runs)[-1]
    assert note.startswith(f"note: {runs[0]} / {runs[1]} and 1 other: they were trained on different files")


def test_a_line_with_damaged_seconds_is_ignored(make_run, capsys) -> None:
    run = make_run("damaged", {10: 0.5})
    want = cells(capsys, run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 10, "seconds": {"productive": null}}\n')
    assert cells(capsys, run) == want


def test_a_run_that_was_trained(finished_run: Path) -> None:
    """The command does not import PyTorch, and prints plain text to a pipe."""
    script = f"import sys; from bfsys import cli; cli.dispatch(['compare', {str(finished_run)!r}])"
    script += "; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    head, row = _narrow(done.stdout).splitlines()
    assert head == "seeds  top-1 %  top-1 % a  top-1 % b  loss  steps  min  parameters  run"
    _, *_, steps, _, parameters, run = row.split("  ")
    assert (steps, parameters, run) == ("120", "18,229", str(finished_run))


def test_all_problems_are_named_at_once(make_run, tmp_path):
    run = make_run("young", {})
    with pytest.raises(UserError) as error:
        call("compare", [str(path) for path in (run, tmp_path / "nothing", tmp_path)])
    assert error.value.exit_code == 2
    hint = "give run directories (runs/NAME) or a folder of them (runs)"
    assert error.value.problems == (
        f"{tmp_path / 'nothing'}: no such directory; {hint}",
        f"{tmp_path}: not a run, and no folder of runs; {hint}",
        f"{run}: no evaluation yet, after 0 of 10 steps",
    )
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"young: a run without its config\.yaml, which its next start writes"):
        call("compare", [str(run)])
    (run / "config.yaml").write_text("data: {sources: []}\nmodle: {}\n")
    with pytest.raises(UserError, match="modle: no such key"):
        call("compare", [str(run)])


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_pipe_in_a_run_is_named_and_not_waited_for(make_run, name: str) -> None:
    run = make_run("young", {10: 0.5})
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(UserError, match=f"{run / name}: is not a regular file"):
        call("compare", [str(run.parent)])


def test_keys_without_influence_exist() -> None:
    keys = typed_yaml.flatten(typed_yaml.to_tree(Config(data=Data(sources=()))))
    assert keys.keys() >= compare.WITHOUT_INFLUENCE
    assert keys.keys() >= {compare.SEED, compare.STEPS}


def test_a_loss_that_is_not_finite_is_shown(make_run, capsys) -> None:
    runs = [make_run(f"x-{seed}", {10: float("nan") if seed else 0.5}, f"train.seed={seed}") for seed in (0, 1)]
    assert call("compare", [*map(str, runs)]) == 0
    assert "nan ± nan" in capsys.readouterr().out


def test_a_run_of_a_folder_that_cannot_be_read_is_named_and_the_others_are_shown(make_run, tmp_path, capsys) -> None:
    good, bad = make_run("good", {10: 0.5}), make_run("bad", {10: 0.6})
    with open(bad / "config.yaml", "a") as file:
        file.write("from_another_version: 1\n")
    assert call("compare", [str(good.parent)]) == 0
    out = capsys.readouterr().out
    assert "50.00" in out
    assert "not read: " in out
    assert "from_another_version: no such key" in out
    with pytest.raises(UserError, match="from_another_version: no such key"):
        call("compare", [str(good), str(bad)])
    odd = make_run("odd", {10: 0.7}).rename(good.parent / "odd\x1b[31m")  # a config allows no such name
    (odd / "metrics.jsonl").unlink()
    (odd / "metrics.jsonl").mkdir()
    assert call("compare", [str(good.parent)]) == 0
    out = capsys.readouterr().out
    assert "odd\\x1b[31m/metrics.jsonl: Is a directory" in out
    assert "\x1b" not in out


def test_a_run_without_permission_is_named(make_run, monkeypatch, capsys) -> None:
    good, bad = make_run("good", {10: 0.5}), make_run("bad", {10: 0.6})
    really_stat, really_open = os.stat, os.open

    def denied(act, path, *arguments, **options):
        if str(path).startswith(f"{bad}/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return act(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", partial(denied, really_stat))
    monkeypatch.setattr(os, "open", partial(denied, really_open))
    assert call("compare", [str(good.parent)]) == 0
    out = capsys.readouterr().out
    assert "50.00" in out
    assert f"not read: {bad / 'config.yaml'}: Permission denied" in out


def test_a_recipe_is_only_a_name_for_values(make_run, capsys) -> None:
    values = (
        "optim.name=muon",
        "model.pool=attention",
        "model.init=smooth",
        "optim.clip_norm=1",
        "optim.content_loss=5",
    )
    runs = [make_run("a", {10: 0.5}, *values), make_run("b", {10: 0.6}, *values, "recipe=recommended", "train.seed=1")]
    assert len(compare.rows_of(compare.find_runs(runs)[0])) == 1

"""`python -m bfsys.evaluate` on a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bfsys import evaluate
from bfsys.commands.evaluate import show_scores
from bfsys.config import load_config
from bfsys.errors import UserError


def test_evaluation_counts_each_file_once_per_source(finished_run: Path, evaluate_run) -> None:
    result = json.loads(evaluate_run(finished_run, "--json"))
    assert result["samples"] == 35
    assert result["step"] == 120
    assert {name: s["samples"] for name, s in result["sources"].items()} == {"a": 21, "b": 14}
    weighted = sum(s["top1"] * s["samples"] for s in result["sources"].values()) / 35
    assert result["top1"] == pytest.approx(weighted)
    assert result["top1"] > 0.5, "the model learned nothing: the other assertions say little"
    assert "top-1" in evaluate_run(finished_run)


def test_top_5_is_shown_only_if_it_says_something(capsys: pytest.CaptureFixture) -> None:
    result = {"samples": 7, "loss": 0.5, "top1": 0.4, "top5": 1.0, "sources": {}}
    for classes in (5, 6):
        show_scores(result, classes)
    assert ["top-5" in line for line in capsys.readouterr().out.splitlines()] == [False, True]


def test_evaluation_agrees_with_the_training_runs_own(finished_run: Path, evaluate_run) -> None:
    own = [json.loads(x) for x in (finished_run / "metrics.jsonl").read_text().splitlines()][-1]
    again = json.loads(evaluate_run(finished_run, "--json"))
    assert own["kind"] == "eval"
    for key in ("loss", "top1", "top5"):
        assert again[key] == pytest.approx(own[key], rel=1e-6)


def test_precisions_agree_about_the_scores(finished_run: Path, evaluate_run) -> None:
    exact, tf32, bf16 = (
        json.loads(evaluate_run(finished_run, "--json", "--precision", p)) for p in ("fp32", "tf32", "bf16")
    )
    assert tf32["loss"] == exact["loss"]  # on a CPU
    assert bf16["loss"] != exact["loss"]
    assert bf16["loss"] == pytest.approx(exact["loss"], abs=0.03)
    assert bf16["top1"] == pytest.approx(exact["top1"], abs=2 / 35)


def test_a_split_that_no_source_has_is_reported(finished_run: Path, evaluate_run) -> None:
    with pytest.raises(UserError, match="has a split 'test'; there are: train, val"):
        evaluate_run(finished_run, "--split", "test")


def test_datasets_that_were_moved_are_named_with_the_option_for_their_new_folders(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(config_file, ["data.sources.1.path=shards/moved"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        evaluate.with_datasets(config, [], Path("run"))
    assert error.value.problems == (
        f"shards/moved: there is no such folder in the current folder, which is {tmp_path}",
        "if the run or its datasets were moved, give the folder of each of its datasets with --data DATASET",
    )


def test_an_export_is_refused(evaluate_run, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(UserError, match="is an export; give the run from which it was exported"):
        evaluate_run(tmp_path)


def test_a_report_agrees_with_the_scores(finished_run: Path, evaluate_run, tmp_path: Path) -> None:
    result = json.loads(evaluate_run(finished_run, "--json", "--report", tmp_path / "report"))
    rows = [line.split("\t") for line in (tmp_path / "report" / "classes.tsv").read_text().splitlines()[1:]]
    assert [(row[0], int(row[1])) for row in rows] == [(name, 7) for name in ("a0", "a1", "a2", "b0", "b1")]
    assert sum(float(row[2]) * 7 for row in rows) / 35 == pytest.approx(result["top1"], abs=1e-4)
    assert "lowest top-1 of a class: " in evaluate_run(finished_run, "--report", tmp_path / "report")


def test_damage_costs_accuracy(finished_run: Path, evaluate_run) -> None:
    result = json.loads(evaluate_run(finished_run, "--json", "--robustness"))
    damaged = result["robustness"]
    assert set(damaged) == set(evaluate.DAMAGE)
    assert damaged["flip:0.1"]["loss"] > damaged["flip:0.0001"]["loss"] < 1.5 * result["loss"]
    assert damaged["skip:256"]["loss"] > 1.5 * result["loss"]  # one byte is left of each file
    assert all(scores["samples"] == 35 for scores in damaged.values())
    assert json.loads(evaluate_run(finished_run, "--json", "--robustness"))["robustness"] == damaged  # deterministic
    table = evaluate_run(finished_run, "--robustness").splitlines()
    assert table[-9].split() == [
        "undamaged",
        *(f"{100 * s['top1']:.2f}" for s in (result, *result["sources"].values())),
    ]
    assert [line.split()[0] for line in table[-8:]] == list(evaluate.DAMAGE)


def test_a_report_that_cannot_be_written_costs_no_scores(
    finished_run: Path, evaluate_run, tmp_path: Path, capsys
) -> None:
    (tmp_path / "confusion.tsv").mkdir()
    with pytest.raises(UserError, match=f"--report {tmp_path}: cannot be written"):
        evaluate_run(finished_run, "--report", tmp_path)
    assert "step 120, 35 files: loss" in capsys.readouterr().out

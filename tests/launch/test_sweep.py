"""The runs of a sweep: names, overrides, and errors in its axes."""

from __future__ import annotations

from pathlib import Path

from bfsys.launch.sweep import sweep_configs


def test_a_run_for_each_combination(config_file: Path) -> None:
    problems: list[str] = []
    sweep = ["optim.lr=1e-3,2e-3", "train.init_from=runs/a,runs/b"]
    configs = sweep_configs(str(config_file), ["train.seed=7", "name=mine"], sweep, problems)
    assert not problems
    assert [config.name for config in configs] == [
        f"mine-lr={rate}-init_from=runs_{run}" for rate in ("1e-3", "2e-3") for run in "ab"
    ]
    assert [config.optim.lr for config in configs] == [1e-3, 1e-3, 2e-3, 2e-3]
    assert [config.train.init_from for config in configs] == ["runs/a", "runs/b"] * 2
    assert {config.train.seed for config in configs} == {7}
    assert [config.name for config in sweep_configs(str(config_file), [], [], problems)] == ["tiny"]


def test_all_problems_are_named_at_once(config_file: Path) -> None:
    problems: list[str] = []
    sweep = ["optim.lr=1,x", "train.seedz=1", "train.steps=20,20"]
    assert sweep_configs(str(config_file), [], sweep, problems) == []
    for part in ("optim.lr: got 'x'", "seedz: no such key"):
        assert any(part in problem for problem in problems), part
    problems = []
    sweep = ["lr", "optim.lr=1,", "train.seed=0,1", "train.seed=2", "name=a,b", "model.merge_after=[0,1]"]
    assert sweep_configs(str(config_file), [], sweep, problems) == []
    assert len(problems) == 5
    for part in ("got 'lr'; KEY=A,B,… is expected", "an empty value", "train.seed is given twice",
                 "name does not influence the result", "lists and mappings cannot be swept"):  # fmt: skip
        assert any(problem.startswith("--sweep: ") and part in problem for problem in problems), part
    problems = []
    assert len(sweep_configs(str(config_file), [], ["train.steps=20,20"], problems)) == 2
    assert problems == ["--sweep: tiny-steps=20 and tiny-steps=20 have the same values; give each value once"]
    problems = []
    sweep_configs(str(config_file), [], ["optim.lr=1e-3, 0.001", "optim.name=adamw,muon"], problems)
    assert problems == [
        f"--sweep: tiny-lr=1e-3-optim.name={name} and tiny-lr=0.001-optim.name={name} have the same values; "
        "give each value once"
        for name in ("adamw", "muon")
    ]

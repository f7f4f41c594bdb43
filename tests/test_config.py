"""Strict typed YAML: right values load, wrong ones are all named at once."""

from __future__ import annotations

import os
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from bfsys import config as config_module
from bfsys.config import Config, load_config
from bfsys.errors import UserError
from bfsys.typed_yaml import dump, from_tree, to_tree
from tests.conftest import REPOSITORY

MINIMAL = "data: {sources: [{path: a}], lanes: 4, batch_samples: 8}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> tuple[str, ...]:
    with pytest.raises(UserError) as error:
        load_config(write(folder, text), overrides)
    return error.value.problems


def test_defaults_and_name(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.name == "some"
    assert config.run_dir == Path("runs/some")
    assert (config.optim.lr, config.optim.weight_decay, config.optim.label_smoothing) == (1e-3, 0.05, 0.1)


def test_yaml_scalars_are_those_of_version_1_2(tmp_path: Path) -> None:
    text = MINIMAL + "optim: {lr: 1e-3, eps: 1e-8, weight_decay: 0}\nname: on\ntrain: {steps: 100_000}\n"
    config = load_config(write(tmp_path, text), ["data.train_split=trueish", "data.eval_split=false_friend"])
    assert (config.data.train_split, config.data.eval_split) == ("trueish", "false_friend")
    assert config.optim.lr == 1e-3
    assert config.optim.weight_decay == 0.0
    assert config.train.steps == 100_000
    assert config.name == "on"


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    config = load_config(path, ["optim.lr=3e-4", "data.sources.0.weight=2", "model.merge_after=[0, 2]", "name=x"])
    assert config.optim.lr == 3e-4
    assert config.data.sources[0].weight == 2
    assert config.model.merge_after == (0, 2)
    assert config.name == "x"


def test_a_recipe_sets_the_values_that_are_not_given(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "optim: {lr: 2e-3}\n")
    for overrides, expected in (
        ([], ("published", "adamw", "mean", "published", 0.0, 0.0)),
        (["recipe=recommended"], ("recommended", "muon", "attention", "smooth", 1.0, 5.0)),
        (
            ["recipe=recommended", "optim.name=adamw", "optim.clip_norm=0", "model.pool=mean"],
            ("recommended", "adamw", "mean", "smooth", 0.0, 5.0),
        ),
        (["recipe=recommended", "optim.content_loss=0"], ("recommended", "muon", "attention", "smooth", 1.0, 0.0)),
    ):
        config = load_config(path, overrides)
        optim, model = config.optim, config.model
        assert (
            config.recipe, optim.name, model.pool, model.init, optim.clip_norm, optim.content_loss
        ) == expected  # fmt: skip
        assert config.optim.lr == 2e-3
    with pytest.raises(UserError, match=r"recipe: got 'recomended'; allowed: .*did you mean 'recommended'"):
        load_config(path, ["recipe=recomended"])
    with pytest.raises(UserError, match="optim: got 3"):
        load_config(path, ["recipe=recommended", "optim=3"])


def test_dump_and_load_agree(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["model.merge_after=[0]", "data.micro_batch_bytes=100"])
    assert load_config(write(tmp_path, dump(config))) == config
    assert from_tree(Config, to_tree(config), "x") == config


def test_all_problems_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "data: {sources: [{path: a, wieght: 2}], lanez: 3, workers: on}\n"
        "model: {size: tinny}\noptim: {final_lr: fast}\ntrian: {}\n",
    )
    text = "\n".join(found)
    assert len(found) == 6
    for expected in (
        "data.sources.0.wieght: no such key (did you mean 'weight'?)",
        "data.lanez: no such key (did you mean 'lanes'?)",
        "data.workers: got 'on'; it must be a valid integer",
        "model.size: got 'tinny'",
        "did you mean 'tiny'?",
        "optim.final_lr: got 'fast'; it must be a valid number",
        "trian: no such key (did you mean 'train'?)",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.steps=0", "train.steps: got 0; it must be greater than or equal to 1"),
        ("train.steps=true", "train.steps: got True"),
        ("train.steps=", "train.steps: got nothing; it must be a valid integer"),
        (
            "data.mixture=prop",
            "data.mixture: got 'prop'; allowed: 'weights', 'proportional' or 'sqrt' (did you mean 'proportional'?), or",
        ),
        ("data.mixture=0", "'sqrt', or it must be greater than or equal to 0.1"),
        ("optim..lr=3", "'optim.': no such key"),
        ("train.steps=99999999999999999999", "it must be less than or equal to"),
        ("data.batch_samples=200000000", "it must be less than or equal to"),
        ("model.kernel=99999999999999999998", "it must be less than or equal to"),
        ("name=\udcff", "which is not UTF-8"),
        ("runs_dir=/tmp/\udcff", "which is not UTF-8"),
        ("train.steps=2.5", "train.steps: got 2.5"),
        ("model.kernel=7", "model.kernel: got 7; it must be a multiple of 2"),
        ("runs_dir=s3://bucket/runs", "runs_dir: got 's3://bucket/runs'; must be a folder on this machine"),
        ("data.cache_dir=https://host/x", "data.cache_dir: got 'https://host/x'; must be a folder on this machine"),
        ("model.size=custom", "custom needs model.dim and model.layers"),
        ("model.dim=64", "'tiny' fixes dim, layers and heads"),
        ("model.merge_after=[50]", "model.merge_after"),
        ("data.lanes=9", "data.batch_samples: got 8; with 9 lanes (data.lanes) and 1 source, at least 9 are needed"),
        ("data.sources=[]", "the list is empty"),
        ("optim.warmup_steps=9999999", "the warm-up must not be longer than the run"),
        ("name=a/b", "must be a folder name"),
        ("name=a\nb", "must be a folder name in one line"),
        ("name=.hidden", "without '/' that does not begin with a dot"),
        ("optim", "expected section.key=value"),
        ("data.sources.3.path=x", "the list has entries 0 to 0"),
        ("name.deep=3", "name is a string"),
        ("optim.lr=.inf", "optim.lr: got inf"),
        ("optim.lr=1e-6", "optim.final_lr: got 2e-05; it must not exceed optim.lr"),
        ("train.seed=010", "train.seed: got '010'"),
        ("train.precision=fp16", "allowed: 'fp32' or 'bf16'"),
        (
            "train.checkpoint_copy=copies",
            "train.checkpoint_copy: got 'copies'; must be a URL such as s3://bucket/folder",
        ),
        ("train.checkpoint_copy=s3://", "an incomplete address; a bucket or a host follows the ://"),
        ("train.checkpoint_copy=file://folder", "three slashes begin the URL of a folder"),
        ("train.checkpoint_copy=s4://bucket", "fsspec does not know s4://"),
        ("train.checkpoint_copy=https://host/x", "a web server, to which bfsys cannot write"),
        ("train.checkpoint_copy=s3://bucket/x*", "have a special meaning in such a URL"),
        ("train.checkpoint_copy=S3://bucket/x", "write the scheme in small letters: s3://"),
        ("train.checkpoint_copy=s3://bucket/$USER", "variables in a URL are not expanded"),
        (f"train.checkpoint_copy=file://{Path.cwd()}/runs", "x is the run directory itself"),
        ("train.checkpoint_copy=az://box/x?sig=abc", "the az:// URL holds a password, a query or a fragment"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, change: str, message: str) -> None:
    text = "name: x\n" + MINIMAL
    assert message in "\n".join(problems(tmp_path, text, (change,)))


def test_a_secret_in_the_url_of_copies_is_not_repeated(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "name: x\n" + MINIMAL, ("train.checkpoint_copy=s3://key:hunter2@bucket/x",))
    assert "holds a password" in problem
    assert "hunter2" not in problem


def test_a_store_whose_package_is_missing_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    (problem,) = problems(tmp_path, "name: x\n" + MINIMAL, ("train.checkpoint_copy=s3://bucket/x",))
    assert "the package that opens s3:// is not installed; pip install 'bfsys[s3]'" in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data: missing"),
        ("- 1\n", "expected `key: value` lines"),
        ("data: {\n", "line 2"),
        ("name: a\nname: b\n" + MINIMAL, "'name' is given twice"),
        ("? [a]\n: b\n", "a key must be a word"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    assert message in "\n".join(problems(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_pipe_is_refused_since_ranks_and_restarts_read_a_config_again(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)  # no process ever writes to it
    with pytest.raises(UserError, match=r"pipe\.yaml: is not a regular file, but a pipe or a device"):
        load_config(pipe)


def test_every_knob_but_the_obvious_is_explained() -> None:
    """Every field has a docstring, except obvious ones."""
    source = Path(config_module.__file__).read_text()
    plain = {"train_split", "eval_split", "layers", "heads", "lr", "beta1", "beta2", "eps", "model", "optim", "train",
             "data", "precision", "size", "runs_dir"}  # fmt: skip
    for cls in vars(config_module).values():
        if is_dataclass(cls) and cls.__module__ == config_module.__name__:
            for field in fields(cls):
                has_text = re.search(rf'^    {field.name}: [^\n]*\n    """', source, re.MULTILINE)
                assert has_text or field.name in plain, f"{cls.__name__}.{field.name} has no docstring"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_load(path: Path) -> None:
    assert load_config(path).name == path.stem

"""A run resumes only with the data that it began with, and the error names what has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bfsys.checkpoint import files, loading
from bfsys.config import Augment, Config, Data, Optim, Source, Train
from bfsys.data.streaming.byte_transforms import write_key
from bfsys.data.streaming.run_data import open_run_data
from bfsys.dist import Ranks
from bfsys.errors import UserError
from bfsys.run_dir import run_facts
from tests.data.packed import Shards, pack, random_shards

SHARDS = {"a": random_shards([3, 4], np.random.default_rng(0)), "b": random_shards([5], np.random.default_rng(1))}
in_folder = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def run(tmp_path: Path) -> tuple[Config, Path]:
    """A config, and a checkpoint of its run."""
    sources = tuple(Source(str(pack(tmp_path, name, {"train": shards}))) for name, shards in SHARDS.items())
    config = Config(data=Data(sources=sources, batch_samples=8, lanes=2), train=Train(steps=10), name="run")
    return config, saved(config, tmp_path)


def saved(config: Config, folder: Path) -> Path:
    """A checkpoint without tensors."""
    final = folder / "checkpoints" / "step_00000001"
    work = folder / "part"
    work.mkdir(parents=True)
    final.parent.mkdir()
    files.commit(work, final, {"step": 1, **facts_of(config)}, {})
    return final


def facts_of(config: Config) -> dict:
    return run_facts(open_run_data(config, Ranks()))


def refusal(config: Config, path: Path) -> str:
    """The error of a resume with this config; empty if it resumes."""
    try:
        loading.check_same_run(path, files.read_manifest(path), facts_of(config))
    except UserError as error:
        return "\n".join(error.problems)
    return ""


def change_data(config: Config, **changes: object) -> Config:
    return replace(config, data=replace(config.data, **changes))


def change_source(config: Config, **changes: object) -> Config:
    first, *others = config.data.sources
    return change_data(config, sources=(replace(first, **changes), *others))


def one_sample_more(shards: list, shard: int, place: int) -> None:
    shards[shard].insert(place, (0, b"new"))


def another_label(shards: list, shard: int, place: int) -> None:
    label, content = shards[shard][place]
    shards[shard][place] = (1 - label, content)


def another_byte(shards: list, shard: int, place: int) -> None:
    label, content = shards[shard][place]
    at = place % len(content)
    shards[shard][place] = (label, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def cut_otherwise(shards: list, shard: int, place: int) -> None:
    shards[shard : shard + 1] = [shards[shard][: place + 1], shards[shard][place + 1 :]]


@in_folder
@given(
    st.sampled_from(
        [
            (one_sample_more, "8 samples, 2 shards"),
            (another_label, "7 samples, 2 shards"),
            (another_byte, "7 samples, 2 shards"),
            (cut_otherwise, "7 samples, 3 shards"),
        ]
    ),
    st.integers(0, 1),
    st.integers(0, 2),
)
def test_a_changed_dataset_is_named(
    run: tuple[Config, Path],
    tmp_path_factory: pytest.TempPathFactory,
    change: tuple[Callable, str],
    shard: int,
    place: int,
) -> None:
    config, path = run
    shards: Shards = [list(s) for s in SHARDS["a"]]
    change[0](shards, shard, place)
    changed = pack(tmp_path_factory.mktemp("changed"), "a", {"train": shards})
    said = refusal(change_source(config, path=str(changed)), path)
    assert "data plan: source 0 was 'a train: 7 samples, 2 shards" in said
    assert f"is now 'a train: {change[1]}" in said
    assert "source 1" not in said
    assert refusal(config, path) == ""


def with_seed(config: Config) -> Config:
    return replace(config, train=replace(config.train, seed=1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_seed, "data plan: seed was 0, is now 1"),
        (lambda c: change_data(c, lanes=4), "data plan: lanes was 2, is now 4"),
        (lambda c: change_data(c, batch_samples=9), "data plan: batch_samples was 8, is now 9"),
        (lambda c: change_data(c, shuffle_block=2), "data plan: shuffle_block was 4096, is now 2"),
        (lambda c: change_data(c, mixture="sqrt"), "data plan: shares was [0.5, 0.5], is now [0.54"),
        (lambda c: change_source(c, weight=3.0), "data plan: shares was [0.5, 0.5], is now [0.75, 0.25]"),
        (lambda c: change_data(c, sources=c.data.sources[::-1]), "data plan: source 0 was 'a "),
        (lambda c: change_data(c, sources=c.data.sources[:1]), "data plan: source 1 was 'b "),
        (lambda c: change_data(c, byte_transforms=("keep:0.5",)), "byte_transforms was None, is now ['keep:0.5']"),
        (
            lambda c: change_source(c, augment=Augment("wav:int16", seconds=0.5)),
            "source 0 augment.seconds was None, is now 0.5",
        ),
    ],
)
def test_a_changed_setting_is_named(run: tuple[Config, Path], change: Callable, says: str) -> None:
    config, path = run
    assert says in refusal(change(config), path)


def test_another_recipe_is_answered_with_the_settings_that_resume(run: tuple[Config, Path], tmp_path: Path) -> None:
    config, published = run
    recommended = Optim(name="muon", clip_norm=1.0, content_loss=5.0)
    now = replace(config, optim=recommended, model=replace(config.model, pool="attention", init="smooth"))
    said = refusal(now, published)
    assert "optim: name was 'adamw', is now 'muon'" in said
    assert "model: pool was 'mean', is now 'attention'" in said
    assert "optim: content_loss was 'off', is now 'on'" in said
    assert (
        "add optim.name=adamw optim.clip_norm=0.0 optim.content_loss=0.0 model.pool=mean model.init=published\n" in said
    )
    assert "to resume it, add optim.content_loss=5.0\n" in refusal(
        replace(now, optim=replace(recommended, content_loss=0)), saved(now, tmp_path / "other")
    )
    # The weight may change. With transforms that move bytes, the loss is off in any case.
    lighter = replace(now, optim=replace(recommended, content_loss=2.0))
    assert refusal(lighter, tmp_path / "other" / "checkpoints" / "step_00000001") == ""
    moved = change_data(now, byte_transforms=("reverse",))
    without = replace(moved, optim=replace(recommended, content_loss=0))
    assert refusal(without, saved(moved, tmp_path / "moved")) == ""


@pytest.mark.parametrize(
    ("field", "value"), [("seconds", 2.0), ("encoding", "mp3"), ("mixup", False), ("speeds", (0.9,))]
)
def test_a_changed_augmentation_is_named(run: tuple[Config, Path], tmp_path: Path, field: str, value: object) -> None:
    augment = Augment("wav:int16", speeds=(1.0, 1.1))
    config = change_source(run[0], augment=augment)
    path = saved(config, tmp_path / "other")
    assert refusal(config, path) == ""
    said = refusal(change_source(config, augment=replace(augment, **{field: value})), path)
    old, new = (list(v) if isinstance(v, tuple) else v for v in (asdict(augment)[field], value))
    assert f"source 0 augment.{field} was {old!r}, is now {new!r}" in said
    assert said.count("data plan") == 1


def test_recordings_are_identified_by_content_and_not_by_path(run: tuple[Config, Path], tmp_path: Path) -> None:
    for name, size in (("here", 100), ("moved", 100), ("changed", 101)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hum.wav").write_bytes(bytes(size))

    def hummed(folder: str) -> Config:
        return change_source(run[0], augment=Augment("wav:int16", background=str(tmp_path / folder)))

    path = saved(hummed("here"), tmp_path / "other")
    assert refusal(hummed("moved"), path) == ""
    assert "source 0 augment.background" in refusal(hummed("changed"), path)


def test_a_key_is_identified_by_its_content_and_is_not_stored(run: tuple[Config, Path], tmp_path: Path) -> None:
    key, moved, other = (tmp_path / name for name in ("key", "moved", "another"))
    write_key(key)
    write_key(other)
    moved.write_bytes(key.read_bytes())

    def permuted(file: Path) -> Config:
        return change_data(run[0], byte_transforms=("reverse", f"permute:{file}"))

    path = saved(permuted(key), tmp_path / "other")
    assert refusal(permuted(moved), path) == ""
    assert "byte_transforms was ['reverse', 'permute" in refusal(permuted(other), path)
    numbers = key.read_text().split()
    manifest = (path / files.MANIFEST).read_text()
    assert ", ".join(numbers[:4]) not in manifest
    assert bytes(map(int, numbers)).hex()[:16] not in manifest


def test_settings_that_do_not_change_the_data_may_change(run: tuple[Config, Path], tmp_path: Path) -> None:
    config, path = run
    moved = [str(pack(tmp_path / "moved", n, {"train": s})) for n, s in SHARDS.items()]
    elsewhere = tuple(Source(path, eval_path=moved[0]) for path in moved)
    changed = change_data(
        config,
        sources=elsewhere,
        workers=2,
        cache_dir=str(tmp_path),
        cache_gb=1.0,
        max_bad_share=0.5,
        eval_split="test",
        eval_batch_bytes=7,
        micro_batch_bytes=10**6,
    )
    assert refusal(changed, path) == ""

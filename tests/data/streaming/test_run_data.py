"""The data of a run as a whole: the splits that exist, and datasets that are replaced during the run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bfsys.cli import call
from bfsys.config import Augment, Config, Jitter, Source, load_config
from bfsys.data.storage import shards
from bfsys.data.storage.description import DESCRIPTION
from bfsys.data.streaming.run_data import open_run_data
from bfsys.dist import Ranks
from bfsys.errors import UserError
from tests.commands.packing_helpers import make_files, png_bytes
from tests.conftest import tiny_config


@pytest.fixture
def dataset(datasets: Path, tmp_path: Path) -> Path:
    return shutil.copytree(datasets / "a", tmp_path / "a")


@pytest.fixture
def config(dataset: Path, datasets: Path, tmp_path: Path) -> Config:
    tree = tiny_config(datasets, tmp_path)
    tree["data"]["sources"][0]["path"] = str(dataset)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return load_config(tmp_path / "tiny.yaml")


def test_a_dataset_that_is_packed_again_in_place_ends_the_run(dataset: Path, config: Config) -> None:
    """Its index and its shards fit each other, so every checksum is valid."""
    data = open_run_data(config, Ranks())
    data.check_unchanged()
    description = json.loads((dataset / DESCRIPTION).read_text())
    (dataset / DESCRIPTION).write_text(json.dumps(description))  # the same content in another formatting
    data.check_unchanged()
    description["splits"]["train"]["bytes"] += 1
    (dataset / DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(UserError, match="was packed again while the run trains on it"):
        data.check_unchanged()
    (dataset / DESCRIPTION).unlink()
    data.check_unchanged()  # a file server that is unavailable


def test_an_unchanged_dataset_is_not_read_at_each_save(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks wait for this check. A dataset.json with 100,000 shards has 24 MB."""
    data, read = open_run_data(config, Ranks()), []
    monkeypatch.setattr(shards, "read_description", read.append)
    data.check_unchanged()
    assert not read


def test_a_source_from_which_no_file_is_drawn_is_noted(config: Config) -> None:
    first, second = config.data.sources
    rare = replace(config.data, sources=(first, replace(second, weight=1e-9)))
    (note,) = set(open_run_data(replace(config, data=rare), Ranks()).notes) - set(open_run_data(config, Ranks()).notes)
    assert note.startswith("b: its share of the mixture is so small that no file is drawn from it in ")


@pytest.mark.parametrize(("encoding", "made"), [("wav:int16", 44 + 2 * 100), ("flac", None)])
def test_augmented_files_that_are_too_short_for_the_model_are_refused(
    encoding: str, made: int | None, config: Config
) -> None:
    first, *_ = config.data.sources
    augmented = replace(first, augment=Augment(encoding, sample_rate_hz=1000, seconds=0.1))
    model = replace(config.model, mode="as_released", kernel=1 << 16)
    long = replace(config, data=replace(config.data, sources=(augmented,)), model=model)
    with pytest.raises(UserError, match=f"augmented files of {made or '[0-9]+'} bytes.* in train are shorter than the"):
        open_run_data(long, Ranks())


def test_scores_are_of_the_evaluation_files(dataset: Path, config: Config, tmp_path: Path) -> None:
    before = open_run_data(config, Ranks()).evaluated
    moved = shutil.copytree(dataset, tmp_path / "moved")
    first, *others = config.data.sources
    source = replace(first, path=str(moved))
    assert (
        open_run_data(replace(config, data=replace(config.data, sources=(source, *others))), Ranks()).evaluated
        == before
    )
    other = replace(first, eval_path=config.data.sources[1].path)
    changed = replace(config, data=replace(config.data, sources=(other, *others)))
    assert open_run_data(changed, Ranks()).evaluated != before


@pytest.fixture
def mixed(tmp_path: Path) -> list[str]:
    """Packed datasets: PNGs with and without a validation split, the PNGs as TIFFs, and files that are not pictures."""
    files = {f"{split}/{name}/{i}": value for split in ("train", "val") for name in "xy" for i in range(4)
             for value in [40 * i + 9 * (name == "x") + (split == "val")]}  # fmt: skip
    pictures = {f"{name}.png": png_bytes(8, 8, value) for name, value in files.items()}
    others = {f"{name}.bin": bytes([value]) * 50 for name, value in files.items()}
    train_only = {name: content for name, content in pictures.items() if name.startswith("train")}
    made = {"png": (pictures, ()), "no-val": (train_only, ()), "bin": (others, ()),
            "tiff": (pictures, ("--encoding", "tiff", "--image-size", "8"))}  # fmt: skip
    for name, (contents, options) in made.items():
        make_files(tmp_path / "raw" / name, contents)
        call(
            "pack", [str(tmp_path / "raw" / name), str(tmp_path / "packed"), "--name", name, "--workers", "1", *options]
        )
    return [str(tmp_path / "packed" / name) for name in made]


def test_settings_without_effect_and_scores_of_another_format_are_noted(config: Config, mixed: list[str]) -> None:
    def notes_of(*sources: Source) -> str:
        of_sources = replace(config, data=replace(config.data, sources=sources))
        return "\n".join(open_run_data(of_sources, Ranks()).notes)

    png, no_val, other, tiff = mixed
    augment = Augment("tiff", image_size=8)
    wrong = "the files of val are not tiff of 8 × 8 pixels, as training makes them"
    assert f"{png}: {wrong}" in notes_of(Source(png, augment=augment))
    assert wrong not in notes_of(Source(png, eval_path=tiff, augment=augment)) + notes_of(Source(png))
    assert "no-val: has no split 'val', so its files are not evaluated" in notes_of(Source(png), Source(no_val))
    ineffective = "jitter changes pictures and sounds, and the first 8 files are neither"
    assert f"{other}: {ineffective}" in notes_of(Source(other, jitter=Jitter()))
    assert ineffective not in notes_of(Source(png, jitter=Jitter())) + notes_of(Source(other))


def test_a_content_loss_and_a_best_metric_without_effect_are_noted(config: Config) -> None:
    def notes_of(transforms: tuple[str, ...], metric: str) -> str:
        changed = replace(
            config,
            data=replace(config.data, byte_transforms=transforms),
            optim=replace(config.optim, content_loss=5.0),
            train=replace(config.train, keep_best=1, best_metric=metric),
        )
        return "\n".join(open_run_data(changed, Ranks()).notes)

    content, best = "optim.content_loss: has no effect", "train.best_metric: top5 is 100 % after every evaluation"
    assert content in notes_of(("head:64",), "top1")
    assert best in notes_of((), "top5")
    neither = notes_of((), "top1")
    assert content not in neither
    assert best not in neither


def test_augmented_files_with_more_tokens_than_positions_are_noted(config: Config, mixed: list[str]) -> None:
    source = Source(mixed[0], eval_path=mixed[3], augment=Augment("tiff", image_size=32))
    few = replace(config, model=replace(config.model, max_tokens=64), data=replace(config.data, sources=(source,)))
    notes = open_run_data(few, Ranks()).notes
    (note,) = [note for note in notes if "the augmented files of train are longer than" in note]
    enough = replace(few, model=replace(few.model, max_tokens=int(note.split("model.max_tokens=")[1].split()[0])))
    assert not [note for note in open_run_data(enough, Ranks()).notes if "longer than" in note]


def test_a_misspelt_evaluation_split_is_refused(config: Config) -> None:
    for name in ("vall", "Validation"):
        wrong = replace(config, data=replace(config.data, eval_split=name))
        with pytest.raises(UserError, match=rf"no source has a split '{name}' \(did you mean 'val'\?\)"):
            open_run_data(wrong, Ranks())

"""The datasets that a config may join, and the notes on them before training."""

import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from bfsys.config import Augment, Config, Data, Source
from bfsys.data.streaming.datasets import notes_on_data, open_evaluation, open_training, source_names
from bfsys.data.streaming.run_data import open_run_data
from bfsys.dryrun import dry_run
from bfsys.errors import EXIT_CRASHED, UserError
from bfsys.ranks import Ranks
from tests.data.packed import pack

LABELS = [[(0, b"12"), (1, b"34")]]


def config_of(*paths):
    return Config(data=Data(sources=tuple(Source(str(path)) for path in paths), batch_samples=4, lanes=2), name="run")


def problems_of(*paths):
    with pytest.raises(UserError) as error:
        open_training(config_of(*paths))
    return error.value.problems


def test_two_datasets_whose_classes_are_alike_are_refused(tmp_path):
    one = pack(tmp_path, "one", {"train": LABELS, "val": LABELS}, ("dog", "caf\u00e9"))
    two = pack(tmp_path, "two", {"train": [[(1, b"1")]], "val": LABELS}, ("Dog", "cafe\u0301"))
    capitals, form = problems_of(one, two)
    assert capitals.startswith(
        f"data.sources: two classes differ only in case or spaces: 'Dog' in {two} and 'dog' in {one}; "
        "'Dog' has no files in train; spell the name in one way"
    )
    assert f"(written 'caf\\xe9') in {one}" in form
    assert f"(written 'cafe\\u0301') in {two}" in form


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (("x/a", "y/b"), ["a", "b"]),
        (("x/a", "y/a", "y/b"), ["a_0", "a_1", "b"]),
        (("x/all",), ["all"]),
        (("x/all", "x/b"), ["all_0", "b"]),
        (("x/all", "y/all"), ["all_0", "all_1"]),
        (("x/all", "x/all_0"), ["all_0", "all_0_1"]),
    ],
)
def test_names_of_sources_differ_from_each_other_and_from_that_of_all_scores(folders, names):
    assert source_names(config_of(*folders)) == names


def test_a_class_that_the_model_knows_by_another_spelling_is_named(tmp_path):
    path = pack(tmp_path, "pets", {"train": LABELS, "val": LABELS}, ("cat", "Dog"))
    with pytest.raises(UserError) as error:
        open_evaluation(config_of(path), "val", ("cat", "dog"))
    unknown, alike = error.value.problems
    assert unknown == f"{path}: the model does not know the classes Dog"
    assert f"'Dog' in {path} and 'dog' in the model" in alike


def test_a_model_that_has_classes_that_are_alike_can_be_evaluated(tmp_path):
    path = pack(tmp_path, "pets", {"val": LABELS}, ("A", "a"))
    assert open_evaluation(config_of(path), "val", ("A", "a")).classes == ("A", "a")


def test_classes_without_training_files_are_missing_in_all_sources(tmp_path):
    one = pack(tmp_path, "one", {"train": [[(0, b"1")]]}, ("cat", "dog", "fox"))
    two = pack(tmp_path, "two", {"train": [[(0, b"1")]]}, ("dog",))
    assert notes_on_data(open_training(config_of(one, two))) == [
        "1 class is without training files and cannot be learned: fox"
    ]
    assert notes_on_data(open_training(config_of(two))) == ["one class: there is nothing to learn"]


def test_augmented_files_are_looked_into(tmp_path):
    for name in ("turned", "plain"):
        exif = Image.Exif()
        exif[0x112] = 6 if name == "turned" else 1
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{name}.jpg", exif=exif)
    turned, plain = ((0, (tmp_path / f"{name}.jpg").read_bytes()) for name in ("turned", "plain"))
    path = pack(tmp_path, "pets", {"train": [[turned, plain], [plain], [(1, b"damaged"), turned]]})
    config = config_of(path)
    assert notes_on_data(open_training(config)) == []
    source = replace(config.data.sources[0], augment=Augment("fhwc", image_size=8))
    augmented = replace(config, data=replace(config.data, sources=(source,)))
    (note,) = notes_on_data(open_training(augmented))
    assert note.startswith(f"{path}: 2 of the first 5 files have an EXIF orientation")
    (path / "pets-train-000002.tar").unlink()  # training reports it
    assert notes_on_data(open_training(augmented))[0].startswith(f"{path}: 1 of the first 5 files have")
    os.mkfifo(path / "pets-train-000002.tar")  # no process ever writes to it
    assert notes_on_data(open_training(augmented))[0].startswith(f"{path}: 1 of the first 5 files have")


def test_a_dry_run_prints_notes(tmp_path, capsys):
    path = pack(tmp_path, "pets", {"train": [[(0, b"0123456789abcdef")]]})
    dry_run(config_of(path), 1, with_data=True)
    assert "note        1 class is without training files and cannot be learned: y\n" in capsys.readouterr().out


def test_a_server_that_is_away_at_the_start_is_a_crash_that_launchers_restart(tmp_path):
    config = config_of("http://127.0.0.1:9/pets")
    config = replace(config, data=replace(config.data, fetch_tries=1, cache_dir=str(tmp_path)))
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9") as error:
        open_training(config)
    assert error.value.exit_code == EXIT_CRASHED


def test_odd_settings_of_a_run_are_noted(tmp_path):
    config = config_of(pack(tmp_path, "pets", {"train": LABELS}))
    config = replace(config, data=replace(config.data, workers=5000, batch_samples=2, lanes=1))
    unevaluated, workers = open_run_data(config, Ranks()).notes
    assert unevaluated == "no source has a split 'val': nothing will be evaluated"
    config = replace(config, data=replace(config.data, eval_split="train"))
    assert (
        open_run_data(config, Ranks()).notes[0].startswith("data.eval_split: 'train' is the split that the run trains")
    )
    assert workers.startswith("data.workers: 5,000 loader processes for each rank, which has ")

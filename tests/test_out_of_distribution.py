"""The out-of-distribution score: its value, the data that a checkpoint stores for it, and the commands that report
it."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

import bfsys
from bfsys.cli import call
from bfsys.config import Config, Data, Source
from bfsys.data.streaming.run_data import RunData, open_run_data
from bfsys.errors import UserError
from bfsys.out_of_distribution import FEWEST, FILES, from_tree, reference_files, text_of
from bfsys.ranks import Ranks
from tests.data.packed import pack


def sounds(count: int, seed: int, spread: float = 20) -> list[np.ndarray]:
    """Files of one format: a header with the length, then samples around the middle value."""
    rng = np.random.default_rng(seed)
    files = []
    for length in rng.integers(300, 900, count).tolist():
        samples = np.clip(128 + spread * rng.standard_normal(length), 0, 255).astype(np.uint8)
        files.append(
            np.concatenate([np.frombuffer(b"RIFF" + length.to_bytes(4, "little") + b"WAVEfmt ", "u1"), samples])
        )
    return files


def of(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def test_other_files_of_the_kind_are_usual_and_foreign_ones_are_not() -> None:
    references = reference_files(sounds(128, 0))
    usual = [references.score(file) for file in sounds(200, 1)]
    assert np.mean(np.array(usual) <= 1) > 0.93  # 0.98 is expected, with 128 files
    rng = np.random.default_rng(2)
    foreign = {
        "noise": of(rng.bytes(600)),
        "text": of(b"def train(config: Config) -> int:\n" * 20),
        "zeros": np.zeros(600, np.uint8),
        "one byte": of(b"R"),
        "no header": sounds(1, 1)[0][16:],
        "other header": np.concatenate([of(b"fLaC" + bytes(12)), sounds(1, 1)[0][16:]]),
        "louder": sounds(1, 1, spread=100)[0],
    }
    for name, file in foreign.items():
        assert references.score(file) > 1, name


def test_files_of_each_kind_of_a_mixture_are_usual() -> None:
    text = [of(f"title: page {i}\n".encode() + b"the words of a page " * (10 + i)) for i in range(128)]
    references = reference_files([*sounds(64, 0), *text[::2]])
    for file in (*sounds(20, 1), *text[1::6]):
        assert references.score(file) < 1.5
    assert references.score(of(np.random.default_rng(0).bytes(600))) > 3


def test_references_from_a_manifest_give_equal_scores() -> None:
    references = reference_files(sounds(FILES, 0))
    tree = json.loads(json.dumps(references.to_tree()))
    assert len(json.dumps(tree)) < 60_000
    for file in (*sounds(5, 3), of(b"x"), of(bytes(100))):
        assert from_tree(tree).score(file) == references.score(file)
        assert from_tree(tree).describe() == references.describe() == "128 evaluation files"
    assert from_tree(None) is None
    del tree["training_files"]  # of an earlier version
    assert from_tree(tree).describe() == "128 files"


@pytest.mark.parametrize(
    "change",
    [
        {"descriptors": "AAAA"},
        {"descriptors": 3},
        {"files": 10**6},
        {"files": 1},
        {"files": 0},
        {"usual": "x"},
        {"usual": 0},
        {"training_files": 129},
        {"training_files": "x"},
    ],
)
def test_damaged_references_are_one_line(change: dict) -> None:
    with pytest.raises(UserError, match="reference_files: damaged"):
        from_tree(reference_files(sounds(FILES, 0)).to_tree() | change)


def test_few_files_and_equal_files() -> None:
    assert reference_files([]) is None
    assert reference_files(sounds(FEWEST - 1, 0)) is None
    equal = reference_files([of(b"equal bytes")] * FEWEST)
    assert equal.score(of(b"equal bytes")) < 1 < equal.score(of(b"other bytes"))


@pytest.mark.parametrize("splits", [("train", "val"), ("train",)])
def test_references_come_from_the_evaluation_split_or_else_from_the_training_split(
    tmp_path: Path, splits: tuple[str, ...]
) -> None:
    shards = {split: [[(0, bytes(file)) for file in sounds(70, seed)]] * 2 for seed, split in enumerate(splits)}
    dataset = pack(tmp_path, "data", shards)
    shard = min(dataset.glob(f"*{splits[-1]}*.tar"))
    content = bytearray(shard.read_bytes())
    place = content.index(bytes(sounds(70, len(splits) - 1)[0][16:60]))
    content[place] ^= 1  # the first file is damaged and left out
    shard.write_bytes(content)
    data = open_run_data(Config(data=Data(sources=(Source(str(dataset)),), lanes=1), name="x"), Ranks())
    found = data.read_reference_files()
    assert len(found.headers) == FILES - 1
    stored = sounds(70, len(splits) - 1) * 2
    expected = [stored[i] for i in np.linspace(0, 139, FILES).astype(int)][1:]  # of all classes, if sorted by class
    np.testing.assert_array_equal(found.headers, reference_files(expected).headers)
    assert found.describe() == f"127 {'evaluation' if 'val' in splits else 'training'} files"


def run_data(*datasets: Path, **options: str) -> RunData:
    sources = tuple(Source(str(dataset)) for dataset in datasets)
    return open_run_data(Config(data=Data(sources=sources, lanes=1, **options), name="x"), Ranks())


def labelled(files: list[np.ndarray]) -> list[list[tuple[int, bytes]]]:
    return [[(0, bytes(file)) for file in files]]


def test_training_files_are_added_to_a_small_evaluation_split(tmp_path: Path) -> None:
    training, evaluation = sounds(162, 0), sounds(18, 1)
    dataset = pack(tmp_path, "small", {"train": labelled(training), "val": labelled(evaluation)})
    found = run_data(dataset).read_reference_files()
    assert found.describe() == "18 evaluation files and 110 training files"
    expected = [*evaluation, *(training[i] for i in np.linspace(0, 161, 110).astype(int))]
    np.testing.assert_array_equal(found.headers, reference_files(expected).headers)
    assert run_data(dataset, eval_split="train").read_reference_files().describe() == "128 evaluation files"


def test_a_source_without_an_evaluation_split_has_training_files_as_references(tmp_path: Path) -> None:
    texts = [of(f"title: page {i}\n".encode() + b"the words of a page " * (10 + i)) for i in range(80)]
    whole = pack(tmp_path, "sounds", {"train": labelled(sounds(80, 0)), "val": labelled(sounds(80, 1))})
    without = pack(tmp_path, "texts", {"train": labelled(texts)})
    found = run_data(whole, without).read_reference_files()
    assert found.describe() == "64 evaluation files and 64 training files"
    assert all(found.score(text) < 2 for text in texts)


def test_files_used_twice_are_not_added(tmp_path: Path) -> None:
    """With the training split as the evaluation split, a file would be its own nearest neighbour."""
    dataset = pack(tmp_path, "few", {"train": labelled(sounds(12, 0))})
    assert run_data(dataset, eval_split="train").read_reference_files() is None


def test_a_score_above_1_is_never_shown_as_1() -> None:
    assert [text_of(score) for score in (0.5, 1.0, 1.0001, 1.04, 28.999)] == ["0.50", "1.00", "1.01", "1.04", "29.00"]


def test_a_run_and_its_export_report_the_same_score(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(bytes(range(256)) * 4)
    call("export", [str(finished_run), str(tmp_path / "out"), "--format", "safetensors"])
    scores = []
    for path in (finished_run, tmp_path / "out"):
        model = bfsys.load(path, device="cpu")
        with pytest.warns(
            UserWarning,
            match=r"foreign was compared with 35 evaluation files of .* and resembles none of them \(out-of-dist",
        ):
            model.predict(foreign)
        scores.append(model.out_of_distribution(foreign))
        assert model.out_of_distribution([foreign, foreign]).tolist() == [scores[-1]] * 2
    assert scores[0] == scores[1] > 1
    capsys.readouterr()
    assert call("predict", [str(finished_run), str(foreign)]) == 0
    printed = capsys.readouterr()
    assert f"(out-of-distribution score: {text_of(float(scores[0]))})" in printed.out
    assert "out-of-distribution score" in printed.err
    assert call("predict", [str(finished_run), str(foreign), "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["out_of_distribution"] == pytest.approx(float(scores[0]))


def test_a_checkpoint_of_an_earlier_version_has_no_score(finished_run: Path, tmp_path: Path) -> None:
    call("export", [str(finished_run), str(tmp_path / "old"), "--format", "safetensors"])
    description = tmp_path / "old" / "model.json"
    facts = json.loads(description.read_text())
    del facts["reference_files"]
    description.write_text(json.dumps(facts))
    model = bfsys.load(tmp_path / "old", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(bytes(range(256)) * 4)
    with pytest.raises(UserError, match="holds no reference files"):
        model.out_of_distribution(b"x")
    shutil.rmtree(tmp_path / "old")

"""The model card of an export: what the run recorded, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from bfsys.cli import call
from bfsys.config import Augment, Config, Data, Optim, Source
from bfsys.model_card import model_card

ARCHITECTURE = {
    "dim": 16, "layers": 1, "heads": 2, "kernel": 8, "window": 8, "shifts": [0], "merge_after": [0], "max_tokens": 64,
}  # fmt: skip


def card_of(run: Path, out: Path, *options: str) -> str:
    call("export", [str(run), str(out), "--format", "safetensors", *options])
    return (out / "README.md").read_text()


def evaluation(run: Path, step: int) -> dict:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["kind"] == "eval" and line["step"] == step)


def row(card: str, name: str) -> list[str]:
    """The cells of the first row of a table that begins with a name."""
    (line, *_) = re.findall(rf"^\| {re.escape(name)} \|.*$", card, re.MULTILINE)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_card_holds_the_scores_of_the_evaluation(finished_run: Path, tmp_path: Path) -> None:
    card, scores = card_of(finished_run, tmp_path / "out"), evaluation(finished_run, 120)
    assert row(card, "all")[1:4] == ["35", f"{100 * scores['top1']:.1f}", f"{100 * scores['top5']:.1f}"]
    assert row(card.partition("## Scores")[2], "b")[1] == "14"
    for name in ("a0", "a1", "a2", "b0", "b1"):
        assert row(card, name) == [name, "7", f"{100 * scores['classes'][name]['top1']:.1f}"]
    assert "after step 120, with averaged weights" in card


def test_a_card_describes_data_model_and_training(finished_run: Path, tmp_path: Path) -> None:
    card = card_of(finished_run, tmp_path / "out")
    name, files, total, mean, read_as = row(card, "a")
    assert (name, files, read_as) == ("a", "120", "stored: any format")
    assert float(mean) == round(int(total.replace(",", "")) / 120)
    assert row(card, "steps") == ["steps", "120 of 120, 8 files each"]
    assert row(card, "peak learning rates")[1] == "AdamW 0.01"
    assert "windows of 8 tokens; mean pooling" in row(card, "architecture")[1]
    assert row(card, "weight of the content loss")[1] == "no content loss"
    assert "a0, a1, a2, b0, b1" in card
    assert 'bfsys.load(".")' in card
    assert "torch.export.load" not in card  # the format was not requested


def test_a_checkpoint_that_was_not_evaluated_has_no_scores(finished_run: Path, tmp_path: Path) -> None:
    card = card_of(finished_run / "checkpoints" / "step_00000060", tmp_path / "out")
    assert "The run recorded no evaluation after step 60." in card
    assert "top-1" not in card


def test_the_scores_of_a_checkpoint_are_those_of_its_run(finished_run: Path, tmp_path: Path) -> None:
    card = card_of(finished_run / "checkpoints" / "step_00000120", tmp_path / "out")
    assert row(card, "all")[1] == "35"


def test_weights_that_were_not_evaluated_are_named(finished_run: Path, tmp_path: Path) -> None:
    card = card_of(finished_run, tmp_path / "out", "--weights", "last")
    assert "This export holds the weights of the last step, which the run did not evaluate." in card


def test_a_run_without_metrics_has_a_card(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "metrics.jsonl").unlink()
    assert "The run recorded no evaluation after step 120." in card_of(run, tmp_path / "out")


@pytest.fixture
def facts() -> dict:
    return {
        "run": "birds", "step": 7, "weights": "last", "classes": ["a|b", "<i>", "x_y"], "architecture": ARCHITECTURE,
        "least_bytes": 1, "input_formats": [{"encoding": "tiff", "image_size": 64}], "reference_files": None,
        "byte_transforms": ["reverse"], "files": {"model.onnx": {}}, "versions": {"bfsys": "1"},
    }  # fmt: skip


def test_names_of_classes_are_shown_as_they_are(facts: dict) -> None:
    manifest = {"plan": None, "step": 7}
    scores = {"loss": 1.0, "top1": 0.5, "top5": 1.0, "samples": 2, "classes": {"a|b": {"samples": 2, "top1": 0.5}}}
    card = model_card(facts, manifest, Config(Data(()), optim=Optim(ema_decay=0)), 10, scores)
    assert r"The classes are: a\|b, &lt;i&gt;, x\_y" in card
    assert r"| a\|b | 2 | 50.0 |" in card


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("&lt;script>", "&amp;lt;script&gt;"),
        ("two\nlines", r"two\\nlines"),
        ("`code`", r"\`code\`"),
        ("    indented", "    indented"),
        ("x" * 5000, "x" * 5000),
    ],
)
def test_names_of_any_characters_stay_in_their_cell(facts: dict, name: str, shown: str) -> None:
    scores = {"loss": 1.0, "top1": 0.5, "top5": 1.0, "samples": 2, "classes": {name: {"samples": 2, "top1": 0.5}}}
    facts |= {"classes": [name], "run": name}
    card = model_card(facts, {"plan": None, "step": 7}, Config(Data(()), optim=Optim(ema_decay=0)), 10, scores)
    lines = card.splitlines()
    assert lines[0] == f"# {shown}"
    assert f"The classes are: {shown}" in lines
    assert f"| {shown} | 2 | 50.0 |" in lines


def test_the_recommended_recipe_is_named(facts: dict) -> None:
    facts["architecture"] = {**ARCHITECTURE, "pool": "attention"}
    config = Config(Data(()), optim=Optim(name="muon", content_loss=5))
    card = model_card(facts, {"plan": None, "step": 7}, config, 10, None)
    assert row(card, "architecture")[1].endswith("attention pooling")
    assert row(card, "peak learning rates")[1] == "Muon 0.005, AdamW 0.001"
    assert row(card, "weight of the content loss")[1] == "5"


def test_formats_transforms_and_augmentation_are_named(facts: dict) -> None:
    data = Data((Source("s", augment=Augment("tiff")),), byte_transforms=("reverse",))
    plan = {"source 0": "s train: 1,000 samples, 2 shards, 50,000 bytes, 3 classes, fingerprint 00"}
    card = model_card(facts, {"plan": plan, "step": 7}, Config(data), 10, None)
    assert row(card, "s") == ["s", "1,000", "50,000", "50", "tiff of 64 × 64 pixels, augmented"]
    assert "in this order: reverse." in card
    assert "--encode" in card
    assert "onnxruntime" in card
    assert "there is no out-of-distribution score" in card


def test_imported_weights_have_a_card(facts: dict) -> None:
    manifest = {"plan": None, "step": 0, "imported": {"file": "w.pt", "part": [], "sha256": "12"}}
    card = model_card(facts, manifest, Config(Data(())), 10, None)
    assert "w.pt, sha256 12" in card
    assert "their training is not known" in card
    assert "records no training data" in card

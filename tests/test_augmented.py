"""A run that decodes, augments and encodes pictures and sounds while it trains, and evaluates files as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image

from bfsys.cli import call
from tests.conftest import _run_ranks, tiny_config
from tests.test_train import assert_success, cut_short, lines, newest, tensors

CLASSES = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on 2 ranks with 1 worker each, and one that was stopped and resumed without workers."""
    folder = tmp_path_factory.mktemp("augmented")
    write_files(folder / "files")
    for kind, encoding in (("image", "fhwc"), ("audio", "wav:uint8")):
        common = ["--subdir", kind, "--workers", "1"]
        call("pack", [str(folder / "files"), str(folder), *common, "--name", kind])
        fitted = ["--encoding", encoding, *(["--image-size", "8"] if kind == "image" else ["--seconds", "0.06"])]
        call("pack", [str(folder / "files"), str(folder), *common, "--name", f"{kind}-eval", *fitted])
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(augmented_config(folder)))
    assert_success(_run_ranks(2, ["tests/worker.py", str(config), "name=whole data.workers=1"]))
    cut_short(folder / "runs" / "whole", folder / "runs" / "resumed", step=4)
    assert_success(_run_ranks(2, ["tests/worker.py", str(config), "name=resumed"]))
    return folder / "runs"


def write_files(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, files in (("train", 12), ("val", 4)):
        for label in range(CLASSES):
            for kind in ("image", "audio"):
                (folder / split / kind / f"{kind}{label}").mkdir(parents=True)
            for i in range(files):
                pixels = rng.integers(0, 128, (12, 14, 3)) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / "image" / f"image{label}" / f"{i}.png")
                wave = 0.5 * np.sin(np.arange(70) * (0.3 + label)) + rng.normal(0, 0.05, 70)
                soundfile.write(folder / split / "audio" / f"audio{label}" / f"{i}.wav", wave, 1000, subtype="PCM_16")


def augmented_config(folder: Path) -> dict:
    config = tiny_config(folder, folder)
    config["data"]["sources"] = [
        {
            "path": str(folder / "image"),
            "eval_path": str(folder / "image-eval"),
            "augment": {"encoding": "fhwc", "image_size": 8},
        },
        {
            "path": str(folder / "audio"),
            "eval_path": str(folder / "audio-eval"),
            "augment": {"encoding": "wav:uint8", "sample_rate_hz": 1000, "seconds": 0.06},
        },
    ]
    config["train"] |= {"steps": 8, "eval_every": 4}
    return config


def test_losses_are_those_of_the_augmented_files(runs: Path) -> None:
    whole = lines(runs / "whole")
    assert len(whole) == 8
    assert all(0 < line["loss"] < 3 and set(line["sources"]) == {"image", "audio"} for line in whole)
    # A picture has 8 × 8 × 3 bytes and a sound 44 + 60. A step has 4 of each.
    assert all(line["bytes_per_s"] * line["step_s"] == pytest.approx(4 * 192 + 4 * 104) for line in whole)


def test_an_augmented_run_resumes_bit_for_bit_with_other_workers(runs: Path) -> None:
    assert [line["loss"] for line in lines(runs / "whole")] == [line["loss"] for line in lines(runs / "resumed")]
    weights, again = (tensors(newest(runs / name), "weight") for name in ("whole", "resumed"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_evaluation_takes_the_files_that_were_packed_for_it(runs: Path) -> None:
    evaluations = lines(runs / "whole", "eval")
    assert [line["step"] for line in evaluations] == [4, 8]
    assert {name: s["samples"] for name, s in evaluations[-1]["sources"].items()} == {"image": 8, "audio": 8}
    manifest = json.loads((newest(runs / "whole") / "manifest.json").read_text())
    assert manifest["classes"] == ["audio0", "audio1", "image0", "image1"]

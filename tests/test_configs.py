"""Every config of the project: its own commands make its data, and a dry run accepts it on them."""

from __future__ import annotations

import io
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bfsys.cli import call
from bfsys.config import load_config
from bfsys.data.streaming.datasets import open_evaluation, open_training
from bfsys.dryrun import dry_run
from tests.commands.packing_helpers import wav_bytes
from tests.conftest import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
PUBLISHED = [path for path in CONFIGS if path.parent.name in ("imagenet", "speech_commands")]
IDS = [str(path.relative_to(REPOSITORY / "configs")) for path in CONFIGS]
PICTURES_PER_CLASS = 800  # planning is slow with fewer files than a step has
FILES_PER_CLASS = 40


def commands(path: Path) -> list[str]:
    """The commands in the comment at the head of a config."""
    head = re.match(r"(#.*\n)+", path.read_text())[0]
    joined = re.sub(r"\\\n#\s*", "", head)
    return [line.lstrip("# ") for line in joined.splitlines() if line.startswith("#   ")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with small replacements for the files that the commands read. It is the current folder and the home."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    picture = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(picture, "JPEG")
    for split, count in (("train", PICTURES_PER_CLASS), ("val", 2)):
        for name in ("n01440764", "n01443537"):
            folder = root / "imagenet" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{split}_{i}.JPEG").write_bytes(picture.getvalue())
    for split, count in (("train", FILES_PER_CLASS), ("val", 2), ("test", 2)):
        for name in ("yes", "_silence_"):
            folder = root / "data" / "speech_commands" / "twelve" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{split}_{i}.wav").write_bytes(wav_bytes(1.0, 16_000))
    noise = root / "data" / "speech_commands" / "background"
    noise.mkdir()
    (noise / "noise.wav").write_bytes(wav_bytes(2.0, 16_000))
    for folder in ("FOLDER/a", "FOLDER/b", "data/digits/train/image/a", "data/digits/train/speech/b", "kinds/a"):
        (root / folder).mkdir(parents=True)
        for i in range(FILES_PER_CLASS * 2):
            (root / folder / f"{i}.bin").write_bytes(bytes([i]) * 50)
    (root / "kinds.tsv").write_text("".join(f"kinds/a/{i}.bin\ta\n" for i in range(FILES_PER_CLASS * 2)))
    previous, home = Path.cwd(), os.environ.get("HOME", "")
    os.chdir(root)
    os.environ["HOME"] = str(root)
    yield root
    os.chdir(previous)
    os.environ["HOME"] = home


@pytest.mark.parametrize("path", CONFIGS, ids=IDS)
def test_a_dry_run_accepts_it_on_the_data_of_its_commands(
    path: Path, world: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = commands(path)
    start = re.compile(rf"(make quickstart|.*(deepspeed|launchers/(local|slurm)\.py) .*configs/.*{path.stem}\.yaml)")
    assert any(start.match(line) for line in lines), "no command that trains it"
    if path.stem == "quickstart":
        lines = [f"python tools/pack.py data/digits data/shards --name {n} --subdir {n}" for n in ("image", "speech")]
    packs = [shlex.split(os.path.expandvars(line)) for line in lines if "tools/pack.py" in line]
    assert packs, "no command that packs its data"
    for words in packs:
        arguments = [str(Path(word).expanduser()) if word.startswith("~") else word for word in words[2:]]
        call("pack", [*arguments, "--workers", "1"])
    lanes = min(2, load_config(path).data.lanes)  # more lanes take longer and show nothing new
    config = load_config(path, [f"data.lanes={lanes}"])
    dry_run(config, lanes, with_data=True)
    said = capsys.readouterr().out
    assert "rows of the learned position table" not in said
    training = open_training(config)
    assert all(np.all(split.samples["length"] > 0) for split in training.splits)
    for number, source in enumerate(config.data.sources):
        if source.eval_path:  # evaluation files have the same form as training files
            augmentation = training.opened[number].augmentation
            (split,) = open_evaluation(config, "val", training.classes).splits[number : number + 1]
            assert split.dataset.description["encoding"] == augmentation.encoding.text


def test_all_published_experiments_are_there() -> None:
    """Section 3 of the released configurations: 4 + 3 + 8 + 5 + 4 + 6 on ImageNet, 11 + 4 on Speech Commands."""
    assert len([path for path in PUBLISHED if path.parent.name == "imagenet"]) == 30
    assert len([path for path in PUBLISHED if path.parent.name == "speech_commands"]) == 15
    names = [path.stem for path in CONFIGS]
    assert len(set(names)) == len(names), "two runs of the same name"


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_the_published_recipe(path: Path) -> None:
    config = load_config(path)
    is_speech = path.parent.name == "speech_commands"
    optim, model = config.optim, config.model
    assert (optim.lr, optim.final_lr, optim.warmup_lr, optim.weight_decay) == (1e-3, 2e-5, 1e-6, 0.05)
    assert (optim.beta1, optim.beta2, optim.eps, optim.clip_norm) == (0.9, 0.999, 1e-8, 0.0)
    assert (optim.label_smoothing, optim.ema_decay) == (0.1, 0.9999)
    assert optim.warmup_steps == (500 if is_speech else 7500)
    assert config.data.batch_samples == (384 if is_speech else 768)
    assert config.train.steps == (28_800 if is_speech else 500_456)
    assert (model.size, model.shift) == ("tiny", model.window // 2)
    assert config.data.sources[0].augment


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_positions_are_as_many_as_tokens(path: Path, world: Path) -> None:
    """Configs with files of equal length have one position for each token; others have the published 50,000."""
    config = load_config(path)
    encoding = config.data.sources[0].augment.encoding.partition(":")
    if encoding[0] == "jpeg":
        assert config.model.max_tokens == 50_000
        return
    (source,) = open_training(config).opened
    length = source.augmentation.least_bytes
    for text in config.data.byte_transforms:
        if text.startswith("keep:"):
            length = int(float(text[5:]) * length)
    assert config.model.max_tokens == -(-length // (config.model.kernel // 2))

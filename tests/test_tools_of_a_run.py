"""What is done with a finished run: evaluate, predict, checkpoints proven and refused; without DeepSpeed."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bfsys import checkpoint, evaluate, predict
from bfsys.errors import UserError
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def run(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import yaml

    from tests.conftest import _run_ranks, tiny_config

    folder = tmp_path_factory.mktemp("finished")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_config(datasets, folder)))
    overrides = ["train.steps=120", "train.log_every=40", "train.save_every=60", "optim.lr=1e-2", "train.zero_stage=0"]
    (result,) = _run_ranks(1, ["bfsys/train.py", str(config), *overrides])
    assert result.returncode == 0, result.stderr
    return folder / "runs" / "tiny"


def command(module, *arguments: str, capsys, monkeypatch) -> str:
    """What `python -m bfsys.MODULE …` prints; exceptions come through."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()
    return capsys.readouterr().out


@pytest.fixture
def evaluate_run(capsys, monkeypatch):
    return lambda *a: command(evaluate, *a, capsys=capsys, monkeypatch=monkeypatch)


@pytest.fixture
def predict_files(capsys, monkeypatch):
    return lambda *a: command(predict, *a, capsys=capsys, monkeypatch=monkeypatch)


def test_evaluation_counts_each_file_once_per_source(run: Path, evaluate_run) -> None:
    result = json.loads(evaluate_run(run, "--json"))
    assert result["samples"] == 35
    assert result["step"] == 120
    assert {name: s["samples"] for name, s in result["sources"].items()} == {"a": 21, "b": 14}
    weighted = sum(s["top1"] * s["samples"] for s in result["sources"].values()) / 35
    assert result["top1"] == pytest.approx(weighted)
    assert result["top1"] > 0.5, "the model learned nothing: the other assertions say little"
    assert "top-1" in evaluate_run(run)


def test_evaluation_agrees_with_the_training_runs_own(run: Path, evaluate_run) -> None:
    own = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()][-1]
    again = json.loads(evaluate_run(run, "--json", "--weights", "last"))
    assert own["kind"] == "eval"
    for key in ("loss", "top1", "top5"):
        assert again[key] == pytest.approx(own[key], rel=1e-6)


def test_prediction_agrees_with_evaluation(run: Path, datasets: Path, evaluate_run, predict_files) -> None:
    answers = json.loads(predict_files(run, datasets / "trees" / "a" / "val", "--json", "--top", 2))
    assert len(answers) == 21
    right = sum(a["top"][0]["class"] == Path(a["path"]).parent.name for a in answers)
    assert right / 21 == pytest.approx(json.loads(evaluate_run(run, "--json"))["sources"]["a"]["top1"])
    for a in answers:
        first, second = a["top"]
        assert 1 >= first["probability"] >= second["probability"] >= 0
        assert first["class"] == ["a0", "a1", "a2", "b0", "b1"][first["index"]]


def test_prediction_reads_standard_input(run: Path, monkeypatch, predict_files) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes([40] * 30))))
    assert predict_files(run, "-", "--top", 1).startswith("-: ")


def test_bad_files_are_named_and_the_others_answered(run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "long").write_bytes(bytes(10_000))
    (tmp_path / "good").write_bytes(bytes([41] * 20))
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(
        sys, "argv", ["predict", str(run), *(str(tmp_path / n) for n in ("empty", "long", "none", "good", "folder"))]
    )
    with pytest.raises(UserError) as error:
        predict.main()
    text = str(error.value)
    for expected in ("empty: empty", "long: 10,000 bytes; this model takes up to 256", "none: cannot be read",
                     "folder: a folder without files"):  # fmt: skip
        assert expected in text
    assert f"{tmp_path / 'good'}: " in capsys.readouterr().out


def test_a_models_answers_need_no_deepspeed(run: Path, datasets: Path) -> None:
    file = next((datasets / "trees" / "a" / "val").rglob("*.bin"))
    code = "import sys; sys.modules['deepspeed'] = None; from bfsys import predict; predict.main()"
    result = subprocess.run(
        [sys.executable, "-c", code, str(run), str(file)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("damage", ["flip", "cut", "no file", "no manifest", "bad manifest", "other step", "a list"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(run: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    newest, problems = checkpoint.find_newest(copy)
    assert (newest.name, problems) == ("step_00000120", [])
    file = newest / "ema-0-of-1.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "no file":
        file.unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "other step":  # one changed digit
        text = (newest / "manifest.json").read_text()
        (newest / "manifest.json").write_text(text.replace('"step": 120', '"step": 121'))
    else:
        (newest / "manifest.json").write_text("{" if damage == "bad manifest" else "[]")
    found, problems = checkpoint.find_newest(copy)
    assert found.name == "step_00000060"
    assert len(problems) == 1
    assert str(newest) in problems[0]
    assert checkpoint.load_model(copy)[2]["step"] == 60


def test_a_copy_beside_the_checkpoints_is_no_trouble(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.copytree(copy / "checkpoints" / "step_00000060", copy / "checkpoints" / "step_00000060.bak")
    assert checkpoint.find_newest(copy)[0].name == "step_00000120"


def test_the_averaged_weights_are_the_default(run: Path) -> None:
    averaged, last = checkpoint.load_model(run)[0], checkpoint.load_model(run, average=False)[0]
    assert any(not torch.equal(a, b) for a, b in zip(averaged.parameters(), last.parameters(), strict=True))


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_what_is_no_run_is_said(tmp_path: Path, what: str) -> None:
    if what == "empty":
        (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no such run directory" if what == "missing" else "no checkpoint yet"):
        checkpoint.load_model(tmp_path / what)


def test_a_split_that_no_source_has_is_said(run: Path, evaluate_run) -> None:
    with pytest.raises(UserError, match="has a split 'test'"):
        evaluate_run(run, "--split", "test")


def test_metrics_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    from bfsys.metrics import _open_lines

    path = tmp_path / "metrics.jsonl"
    kept = '{"kind": "train", "step": 1}\n{"kind": "eval", "step": 1}\n{"kind": "train", "step": 2}\n'
    path.write_text(kept + '{"kind": "train", "step": 3}\n{"ste')
    file, last_evaluation = _open_lines(path, 2)
    file.close()
    assert path.read_text() == kept
    assert last_evaluation == 1

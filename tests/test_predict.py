"""`python -m bfsys.predict` on a finished run; without DeepSpeed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bfsys import predict
from bfsys.batch import Sample
from bfsys.cli import call
from bfsys.data.streaming.byte_transforms import write_key
from bfsys.errors import UserError
from tests.conftest import REPOSITORY


def test_prediction_agrees_with_evaluation(finished_run: Path, datasets: Path, evaluate_run, predict_files) -> None:
    answers = json.loads(predict_files(finished_run, datasets / "trees" / "a" / "val", "--json", "--top", 2))
    assert len(answers) == 21
    right = sum(a["top"][0]["class"] == Path(a["path"]).parent.name for a in answers)
    assert right / 21 == pytest.approx(json.loads(evaluate_run(finished_run, "--json"))["sources"]["a"]["top1"])
    for a in answers:
        first, second = a["top"]
        assert 1 >= first["probability"] >= second["probability"] >= 0
        assert first["class"] == ["a0", "a1", "a2", "b0", "b1"][first["index"]]


def test_prediction_reads_standard_input(finished_run: Path, monkeypatch, predict_files) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes([40] * 30))))
    assert predict_files(finished_run, "-", "--top", 1).startswith("-: ")


def test_bad_files_are_named_and_the_others_answered(finished_run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "long").write_bytes(bytes(10_000))
    (tmp_path / "good").write_bytes(bytes([41] * 20))
    (tmp_path / "folder").mkdir()
    files = (str(tmp_path / n) for n in ("empty", "long", "none", "good", "folder"))
    with pytest.raises(UserError) as error:
        call("predict", [str(finished_run), *files])
    text = str(error.value)
    for expected in ("empty: empty", "none: cannot be read", "folder: a folder without files"):
        assert expected in text
    answered = capsys.readouterr().out
    assert f"{tmp_path / 'good'}: " in answered
    assert f"{tmp_path / 'long'}: " in answered  # of more tokens than positions


def test_a_folder_is_read_as_it_is_packed(finished_run: Path, tmp_path: Path, predict_files) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for path in (folder / "b", folder / ".git" / "config", elsewhere / "c"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([40] * 30))
    (folder / "link").symlink_to(elsewhere)
    (folder / os.fsdecode(b"caf\xe9")).write_bytes(bytes([40] * 30))  # Latin-1, no text in UTF-8
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")  # of which nobody ever reads an end
    result = subprocess.run(
        [sys.executable, "-m", "bfsys.predict", finished_run, folder],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-3:] == [
        *(f"error: {folder}/{n}: is not a regular file" for n in ("loop", "pipe")),
        "error: 2 problems; 3 files were classified",
    ]
    named = [line.partition(": ")[0] for line in result.stdout.splitlines()]
    assert named == [f"{folder}/b", f"{folder}/caf\\udce9", f"{folder}/link/c"]


def test_small_files_are_not_too_many_at_once() -> None:
    samples = [Sample(str(n), np.zeros(n, np.uint8)) for n in (1, 2, 30, 1, 200, 1)]
    lengths = [[len(s.data) for s in batch] for batch in predict.batches_of(iter(samples), 40, least_bytes=10)]
    assert lengths == [[1, 2], [30, 1], [200], [1]]


def test_a_models_answers_need_no_deepspeed(finished_run: Path, datasets: Path) -> None:
    file = next((datasets / "trees" / "a" / "val").rglob("*.bin"))
    code = "import sys; sys.modules['deepspeed'] = None; from bfsys.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "predict", str(finished_run), str(file)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


def test_what_a_run_does_to_bytes_is_done_before_prediction_too(
    config_file: Path, datasets: Path, tmp_path: Path, run_ranks, evaluate_run, predict_files
) -> None:
    change = ["data.byte_transforms=[reverse, noise:-3:3, permute]", "train.steps=100", "optim.lr=1e-2"]
    (result,) = run_ranks(1, ["bfsys/train.py", str(config_file), *change])
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "tiny"
    answers = json.loads(predict_files(run, datasets / "trees" / "a" / "val", "--json", "--top", 1))
    right = sum(a["top"][0]["class"] == Path(a["path"]).parent.name for a in answers) / len(answers)
    evaluated = json.loads(evaluate_run(run, "--json"))["sources"]["a"]["top1"]
    assert evaluated > 0.6
    assert right > 0.6  # the noise differs, so they need not agree to the file


def test_a_key_elsewhere_and_files_that_were_transformed_before(
    config_file: Path, datasets: Path, tmp_path: Path, run_ranks, evaluate_run, predict_files, capsys
) -> None:
    key, elsewhere, other = tmp_path / "my.key", tmp_path / "elsewhere.key", tmp_path / "other.key"
    for path in (key, other):
        write_key(path)
    change = [f"data.byte_transforms=[reverse, permute:{key}]", "train.steps=3"]
    (result,) = run_ranks(1, ["bfsys/train.py", str(config_file), *change])
    assert result.returncode == 0, result.stderr
    run, files = tmp_path / "runs" / "tiny", datasets / "trees" / "a" / "val"
    answers = predict_files(run, files)
    scores = evaluate_run(run)
    key.rename(elsewhere)
    for command in (predict_files, evaluate_run):
        with pytest.raises(UserError, match=r"my\.key cannot be read"):
            command(run, *([files] if command is predict_files else []))
    assert predict_files(run, files, "--permute", elsewhere) == answers
    assert evaluate_run(run, "--permute", elsewhere) == scores
    with pytest.raises(UserError, match="restore the key"):
        predict_files(run, files, "--permute", other)
    hidden = tmp_path / "hidden"
    call("encode", [str(files), str(hidden), "--transform", "reverse", "--transform", f"permute:{elsewhere}"])
    assert capsys.readouterr().out == f"{hidden}: 21 files\n"
    assert predict_files(run, hidden, "--transformed") == answers.replace(str(files), str(hidden))


def test_options_that_a_run_has_no_use_for(finished_run: Path, tmp_path: Path, predict_files) -> None:
    with pytest.raises(UserError, match="this run does not permute byte values"):
        predict_files(finished_run, tmp_path, "--permute", tmp_path / "key")
    with pytest.raises(UserError, match="was trained on files as they are"):
        predict_files(finished_run, tmp_path, "--transformed")

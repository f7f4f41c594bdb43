"""A finished run's answers, from Python and by `bfsys predict`; without DeepSpeed."""

from __future__ import annotations

import doctest
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import bfsys
from bfsys import inputs, predict
from bfsys.batch import ByteBatch, Sample
from bfsys.checkpoint.loading import load_model
from bfsys.cli import call
from bfsys.data.packing import folders
from bfsys.data.streaming.byte_transforms import write_key
from bfsys.errors import UserError
from tests.commands.packing_helpers import make_files
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
    assert f"{tmp_path / 'long'}: " in answered  # it has more tokens than positions


def test_a_folder_is_read_as_it_is_packed(finished_run: Path, tmp_path: Path, predict_files) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for path in (folder / "b", folder / ".git" / "config", elsewhere / "c"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([40] * 30))
    (folder / "link").symlink_to(elsewhere)
    (folder / os.fsdecode(b"caf\xe9")).write_bytes(bytes([40] * 30))  # Latin-1, not valid UTF-8
    (folder / "two\nlines").write_bytes(bytes([40] * 30))
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")  # no process ever writes to it
    result = subprocess.run(
        [sys.executable, "-m", "bfsys.predict", finished_run, folder],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=900, env={**os.environ, "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-3:] == [
        *(f"error: {folder}/{n}: is not a regular file" for n in ("loop", "pipe")),
        "error: 2 problems; 4 files classified",
    ]
    named = [line.partition(": ")[0] for line in result.stdout.splitlines()]
    assert named == [f"{folder}/{n}" for n in ("b", "caf\\udce9", "link/c", "two\\nlines")]


def test_a_long_listing_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    make_files(tmp_path, {"a": b"1", "b": b"2"})
    monkeypatch.setattr(folders, "NOTE_S", 0.0)
    first, second = inputs.files_in(tmp_path)
    assert capsys.readouterr().err.splitlines() == [
        f"listing {tmp_path}: {number} files so far, now at {path}" for number, path in enumerate((first, second), 1)
    ]


def test_a_file_that_is_too_large_for_memory_does_not_affect_other_answers(finished_run: Path, tmp_path: Path) -> None:
    model = predict.load(finished_run, device="cpu")
    forward = model._network.forward

    def in_little_memory(batch: ByteBatch) -> torch.Tensor:
        if len(batch.data) > 5000:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return forward(batch)

    model._network.forward = in_little_memory
    problems: list[str] = []
    inputs = [("one", bytes(30)), ("long", bytes(9000)), ("two", bytes(30))]
    named = [name for name, *_ in model.answers(inputs, problems, lambda _: None)]
    assert named == ["one", "two"]
    assert problems == ["long: not enough memory on cpu for its 9,000 bytes"]
    with pytest.raises(UserError, match=r"inputs\[1\]: not enough memory on cpu"):
        model.predict([bytes(30), bytes(9000)])


def test_a_file_whose_tokens_do_not_fit_into_memory_is_not_computed(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container with little memory, the system would kill the process."""
    model = predict.load(finished_run, device="cpu")
    monkeypatch.setattr(predict, "CHECKED_BYTES", 0)
    monkeypatch.setattr(predict, "free_memory_bytes", lambda: 100_000)
    assert model.predict(bytes(30))
    for compute in (model.predict, model.explain):
        with pytest.raises(UserError, match="the input: not enough memory on cpu for its 50,000 bytes"):
            compute(bytes(50_000))


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
        timeout=900,
    )
    assert result.returncode == 0, result.stderr


def test_prediction_applies_the_runs_byte_transforms(
    config_file: Path, datasets: Path, tmp_path: Path, run_ranks, evaluate_run, predict_files
) -> None:
    change = ["data.byte_transforms=[reverse, noise:-3:3, permute]", "recipe=recommended", "train.steps=300",
              "optim.lr=1e-2", "train.micro_batch_tokens=1000"]  # fmt: skip
    (result,) = run_ranks(1, ["bfsys/train.py", str(config_file), *change])
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "tiny"
    answers = json.loads(predict_files(run, datasets / "trees" / "a" / "val", "--json", "--top", 1))
    right = sum(a["top"][0]["class"] == Path(a["path"]).parent.name for a in answers) / len(answers)
    evaluated = json.loads(evaluate_run(run, "--json"))["sources"]["a"]["top1"]
    assert evaluated > 0.6
    assert right > 0.6  # the noise differs, so single files may disagree


@pytest.mark.filterwarnings("ignore:.*out-of-distribution score")
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
        with pytest.raises(UserError, match=r"my\.key cannot be found; .* give that with --permute"):
            command(run, *([files] if command is predict_files else []))
    assert predict_files(run, files, "--permute", elsewhere) == answers
    assert evaluate_run(run, "--permute", elsewhere) == scores
    with pytest.raises(UserError, match="restore the key"):
        predict_files(run, files, "--permute", other)
    call("export", [str(run), str(tmp_path / "out"), "--format", "safetensors"])
    for trained in (run, tmp_path / "out"):
        model = bfsys.load(trained, permute=elsewhere)
        first = bfsys.files_in(files)[0]
        assert answers.startswith(f"{first}: {model.predict(first)[0].class_name} ")
        with pytest.raises(UserError, match="restore the key"):
            bfsys.load(trained, permute=other)
        assert bfsys.load(trained, transformed=True).predict(b"hidden before")
    capsys.readouterr()
    hidden = tmp_path / "hidden"
    call("encode", [str(files), str(hidden), "--transform", "reverse", "--transform", f"permute:{elsewhere}"])
    assert capsys.readouterr().out == f"{hidden}: 21 files\n"
    assert predict_files(run, hidden, "--transformed") == answers.replace(str(files), str(hidden))


def test_options_that_do_not_apply_to_the_run_are_refused(finished_run: Path, tmp_path: Path, predict_files) -> None:
    with pytest.raises(UserError, match="this run does not permute byte values"):
        predict_files(finished_run, tmp_path, "--permute", tmp_path / "key")
    with pytest.raises(UserError, match="was trained on files without transforms"):
        predict_files(finished_run, tmp_path, "--transformed")


def test_names_come_without_pytorch_until_they_are_asked_for() -> None:
    code = """
import sys, bfsys
assert sorted(m for m in sys.modules if m.startswith("bfsys")) == ["bfsys"]
assert not {"torch", "numpy"} & set(sys.modules)
assert {*bfsys.__all__} == {"Explanation", "Model", "Prediction", "UserError", "files_in", "fit", "load"}
assert {*bfsys.__all__} <= {*dir(bfsys)}
assert issubclass(bfsys.UserError, Exception) and "torch" not in sys.modules
assert all(getattr(bfsys, name).__name__ == name for name in bfsys.__all__)
try:
    bfsys.laod
except AttributeError as error:
    assert "laod" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:.*out-of-distribution score")
def test_examples_in_docstrings(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").symlink_to(finished_run.parent)
    make_files(tmp_path, {"photos/cat/001.jpg": b"cat", "photos/dog/001.jpg": b"dog"})
    monkeypatch.chdir(tmp_path)
    for module in (predict, inputs):
        found = doctest.testmod(module)
        assert (found.failed, found.attempted > 0) == (0, True), module


@pytest.fixture(scope="module")
def model(finished_run: Path) -> bfsys.Model:
    return bfsys.load(finished_run)


@pytest.fixture(scope="module")
def paths(datasets: Path) -> list[str]:
    return bfsys.files_in(datasets / "trees" / "b" / "val")


def test_python_and_the_command_agree(model: bfsys.Model, finished_run: Path, paths: list[str], predict_files) -> None:
    answers = json.loads(predict_files(finished_run, *paths, "--json"))
    assert [a["path"] for a in answers] == paths
    want = [[(c["class"], c["index"], c["probability"]) for c in a["top"]] for a in answers]
    got = model.predict(paths)
    assert [[(c.class_name, c.index, c.probability) for c in classes] for classes in got] == want


def test_one_input_has_one_answer_and_many_have_many(model: bfsys.Model, paths: list[str]) -> None:
    many = model.probabilities(Path(path) for path in paths)
    assert (many.shape, many.dtype) == ((len(paths), 5), np.float32)
    np.testing.assert_allclose(many.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(model.probabilities(paths[3]), many[3], atol=1e-6)
    assert model.probabilities(paths[:1]).shape == (1, 5)
    assert [len(model.predict(paths[0], top=top)) for top in (1, 2, 9)] == [1, 2, 5]
    ranked = model.predict(paths, top=5)
    assert [[c.probability for c in classes] for classes in ranked] == np.sort(many)[:, ::-1].tolist()
    assert all(model.classes[c.index] == c.class_name and many[i, c.index] == c.probability
               for i, classes in enumerate(ranked) for c in classes)  # fmt: skip
    assert (model.predict([]), model.probabilities([]).shape, model.embed([]).shape) == ([], (0, 5), (0, 16))
    assert [len(model.predict(paths[0], top=top)) for top in (True, np.int64(2))] == [1, 2]  # type: ignore[call-overload]
    for top in (0, 1.5, "3"):
        with pytest.raises(UserError, match=f"top: got {top!r}; a whole number of at least 1 is needed"):
            model.predict(paths, top=top)  # type: ignore[call-overload]
    for call_with in (model.shortcuts, lambda seed: model.explain(paths[0], seed=seed)):
        for seed in (-1, "a"):
            with pytest.raises(UserError, match=f"seed: got {seed!r}; a whole number of at least 0 is needed"):
                call_with(seed=seed)  # type: ignore[arg-type]


def test_the_head_takes_what_embed_gives(model: bfsys.Model, finished_run: Path, paths: list[str]) -> None:
    network, _, _ = load_model(finished_run)
    features = model.embed(paths)
    assert (features.shape, features.dtype) == ((len(paths), 16), np.float32)
    with torch.no_grad():
        got = network.head(torch.from_numpy(features)).softmax(1)
    np.testing.assert_allclose(got.numpy(), model.probabilities(paths), atol=1e-6)


def test_a_model_answers_in_bfloat16(model: bfsys.Model, finished_run: Path, paths: list[str]) -> None:
    rough = bfsys.load(finished_run, device="cpu", precision="bf16")
    exact, near = (m.predict(paths, top=5) for m in (model, rough))
    for ours, theirs in zip(exact, near, strict=True):
        known = {one.class_name: one.probability for one in ours}
        assert [one.probability for one in ours] != [one.probability for one in theirs]
        assert all(abs(known[one.class_name] - one.probability) < 0.03 for one in theirs)
    with pytest.raises(UserError, match=r"precision: got 'half'; allowed: fp32, tf32, bf16"):
        bfsys.load(finished_run, precision="half")  # type: ignore[arg-type]


def test_all_problems_of_a_call_are_reported_at_once(model: bfsys.Model, tmp_path: Path) -> None:
    wrong = [b"good", b"", tmp_path, tmp_path / "none", np.zeros(3), "no path", 7]
    with pytest.raises(bfsys.UserError) as error:
        model.predict(wrong)  # type: ignore[arg-type]
    told = [problem.partition(": ")[0] for problem in error.value.problems]
    assert told == ["inputs[1]", str(tmp_path), str(tmp_path / "none"), "inputs[4]", "no path", "inputs[6]"]


def test_threads_share_a_model(model: bfsys.Model, paths: list[str]) -> None:
    want = model.probabilities(paths)
    kept = {name: value.clone() for name, value in model._network.state_dict().items()}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: model.probabilities(paths), range(12)))
    assert all(np.array_equal(answer, want) for answer in answers)
    assert all(torch.equal(kept[name], value) for name, value in model._network.state_dict().items())
    assert torch.is_grad_enabled()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(kept)


@pytest.mark.parametrize(
    "setting",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),  # as set_default_device("cuda") on a machine with a GPU
        lambda: _default_dtype(torch.float64),
        lambda: _default_dtype(torch.bfloat16),
    ],
    ids=["inference_mode", "no_grad", "autocast", "device", "float64", "bfloat16"],
)
def test_settings_of_pytorch_change_no_answer(
    setting: Callable, model: bfsys.Model, finished_run: Path, paths: list[str], tmp_path: Path
) -> None:
    call("export", [str(finished_run), str(tmp_path / "out"), "--format", "safetensors"])
    with setting():
        models = [model, *(bfsys.load(origin, device="cpu") for origin in (finished_run, tmp_path / "out"))]
        answers = [(one.probabilities(paths), one.explain(paths[0]).gradients) for one in models]
        model.shortcuts(limit=20)
    answers += [(one.probabilities(paths), one.explain(paths[0]).gradients) for one in models]
    probabilities, gradients = model.probabilities(paths), model.explain(paths[0]).gradients
    for found in answers:
        np.testing.assert_array_equal(found[0], probabilities)
        np.testing.assert_array_equal(found[1], gradients)


def test_an_export_is_the_model(model: bfsys.Model, finished_run: Path, paths: list[str], tmp_path: Path) -> None:
    call("export", [str(finished_run), str(tmp_path / "out"), "--format", "safetensors"])
    exported = bfsys.load(tmp_path / "out")
    assert np.array_equal(exported.probabilities(paths), model.probabilities(paths))
    assert (exported.classes, exported.step, exported.config) == (model.classes, 120, model.config)
    with pytest.raises(UserError, match="holds averaged weights; export the run with --weights last"):
        bfsys.load(tmp_path / "out", weights="last")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"model\.safetensors: checksum mismatch"):
        bfsys.load(tmp_path / "out")
    (tmp_path / "out" / "model.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.json: is damaged, or no description"):
        bfsys.load(tmp_path / "out")


def test_checkpoints_and_both_kinds_of_weights(model: bfsys.Model, finished_run: Path, paths: list[str]) -> None:
    last, earlier = bfsys.load(str(finished_run), weights="last"), finished_run / "checkpoints" / "step_00000060"
    assert not np.array_equal(last.probabilities(paths), model.probabilities(paths))
    assert (model.step, bfsys.load(earlier).step) == (120, 60)
    with pytest.raises(UserError, match="weights: got 'mean'; allowed: ema, last"):
        bfsys.load(finished_run, weights="mean")  # type: ignore[arg-type]
    for device in ("gpu", "cuda:99", "meta:x", "meta"):
        with pytest.raises(
            UserError, match=f"device: got '{device}', which cannot be used.*; allowed are 'cpu'"
        ) as error:
            bfsys.load(finished_run, device=device)
        assert len(str(error.value)) < 300
    for no_path in (3, None):
        with pytest.raises(UserError, match=f"the run: got {type(no_path).__name__}; a path is allowed"):
            bfsys.load(no_path)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=f"the folder: got {type(no_path).__name__}; a path is allowed"):
            bfsys.files_in(no_path)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no such directory"):
        bfsys.load(finished_run / "none")
    with pytest.raises(UserError, match="this run does not permute byte values"):
        bfsys.load(finished_run, permute="my.key")
    with pytest.raises(UserError, match="was trained on files without transforms"):
        bfsys.load(finished_run, transformed=True)

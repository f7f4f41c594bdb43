"""The checks pass here, and they report what is wrong. No timing is asserted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from bfsys.cli import call
from bfsys.commands import check_gpu
from bfsys.engine import import_deepspeed
from bfsys.errors import UserError
from bfsys.gpu_check import (
    all_reduce,
    engine_waits,
    environment,
    kernel_cases,
    kernels,
    operations,
    processes,
    short_training,
    step,
)
from bfsys.gpu_check.checks import CHECKS
from bfsys.gpu_check.findings import Finding, Verdict, exit_code
from bfsys.gpu_check.interpreter import interpreted
from bfsys.launch.job import set_slurm_variables
from bfsys.model.byteformer import ByteFormer
from bfsys.ranks import Ranks
from tests.conftest import REPOSITORY, _run_ranks, closed_output
from tests.forked import start_ranks
from tests.model.triton_kernels import DEVICE

CPU = torch.device("cpu")
WRONG = {
    "attention": ("attention_forward", "attention_backward"),
    "stem": ("stem_forward", "stem_backward"),
    "positions": ("positions_backward",),
    "addition and norm": ("norm_forward", "norm_backward"),
}


def test_each_check_has_its_module() -> None:
    folder = Path(processes.__file__).parent
    assert all((folder / f"{check.module}.py").exists() for check in CHECKS.values())
    assert sum(check.share for check in CHECKS.values()) == pytest.approx(1)


# --- Kernels -----------------------------------------------------------------------------------------------------


def perturbed(module: object, name: str) -> SimpleNamespace:
    """The kernels, one of which returns a single wrong number."""
    right = getattr(module, name)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        first = result if isinstance(result, torch.Tensor) else result[-1]
        index = first.abs().argmax()
        first.view(-1)[index] *= 1.1
        return result

    return SimpleNamespace(**{**vars(module), name: wrong})


@pytest.mark.parametrize(("kernel", "function"), [(k, f) for k, functions in WRONG.items() for f in functions])
def test_a_wrong_kernel_is_called_wrong(kernel: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    all_cases = kernels.cases
    monkeypatch.setattr(kernels, "cases", lambda *on: (case for case in all_cases(*on) if case[0] == kernel))
    with interpreted("kernels", "norm_kernels") as modules:
        given = [perturbed(module, function) if hasattr(module, function) else module for module in modules]
        found = {finding.what: finding for finding in kernels.compare_all(*given, CPU, seconds=0)}
        right = kernels.compare_all(*modules, CPU, seconds=0)
    assert [finding.verdict for finding in right] == [Verdict.OK, Verdict.SKIPPED]
    wrong = [name for name, finding in found.items() if finding.verdict == Verdict.WRONG]
    assert wrong == [f"{kernel} (interpreted)"]
    assert found[wrong[0]].advice
    assert exit_code(list(found.values())) == 1
    assert found["other sizes"].verdict == Verdict.SKIPPED


def test_a_nan_and_other_bits_are_wrong() -> None:
    expected = torch.ones(3, dtype=torch.float64)
    assert kernel_cases.compare("x", torch.ones(3), expected, 0).is_right
    assert not kernel_cases.compare("x", torch.tensor([1, float("nan"), 1]), expected, 1e9).is_right
    results = iter([torch.ones(3), torch.ones(3) + 1e-6])
    _, same = kernel_cases.same_bits("x", lambda: [next(results)])
    assert not same.is_right


# --- Environment, all-reduce -------------------------------------------------------------------------------------


def test_the_environment_of_this_machine() -> None:
    found = {finding.what: finding for finding in environment.check(DEVICE, 1)}
    assert torch.__version__ in found["versions"].detail
    assert {finding.verdict for finding in found.values()} <= {Verdict.OK, Verdict.SKIPPED}


def test_a_missing_compiler_and_missing_headers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    on_gpu = environment._compiler(torch.device("cuda"))
    assert (on_gpu.verdict, "Python.h" in on_gpu.detail) == (Verdict.WRONG, True)
    assert "headers" in on_gpu.advice
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not found" in environment._compiler(CPU).detail
    monkeypatch.setenv("CC", "/no/such/compiler")
    assert "cannot be run" in environment._compiler(CPU).detail


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    finding = environment._kernel_cache()
    assert finding.verdict == Verdict.WRONG
    assert "TRITON_CACHE_DIR" in finding.advice
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "file"))
    finding = environment._kernel_cache()
    assert finding.verdict == Verdict.WRONG


def test_sums_over_ranks_and_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_reduce, "NUMBERS", {"cpu": 1000, "cuda": 1000})
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (right,) = all_reduce.measure(Ranks())
    assert right.verdict == Verdict.OK
    monkeypatch.setattr(all_reduce, "expected_sum", lambda ranks, count: torch.ones(count))
    (wrong,) = all_reduce.measure(Ranks())
    assert (wrong.verdict, "not exact" in wrong.detail) == (Verdict.WRONG, True)


def test_an_exact_sum_of_many_ranks() -> None:
    wide = sum(all_reduce.values_of(rank, 5000).double() for rank in range(4096))
    assert torch.equal(all_reduce.expected_sum(4096, 5000).double(), wide)


def test_many_ranks_are_summed_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    made, values_of = [], all_reduce.values_of
    monkeypatch.setattr(all_reduce, "values_of", lambda rank, count: made.append(count) or values_of(rank, count))
    assert len(all_reduce.expected_sum(64, 2**20)) == 2**20
    assert sum(made) <= 2**20  # not the numbers of every rank, which took minutes for 64 GPUs


# --- Engine, step ------------------------------------------------------------------------------------------------


def test_waits_are_counted() -> None:
    x = torch.arange(4.0)
    waits = operations.count_waits(lambda: (x.sum().item(), x.nonzero(), x + 1), CPU)
    assert waits == {"_local_scalar_dense": 1, "nonzero": 1}


def test_operations_of_a_backward_are_counted_and_views_launch_nothing() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    with operations.CountedOperations() as counted:
        x.view(16).exp().sum().backward()
    assert counted.all["exp"] == 1
    assert counted.launching["exp"] == 1
    assert counted.launching["mul"] == 1  # the gradient of exp
    assert counted.all["view"] >= 1
    assert counted.launching["view"] == 0


def test_a_wait_in_each_micro_batch_is_slow() -> None:
    few, many = Counter({"synchronize": 2, "norm": 3}), Counter({"synchronize": 6, "norm": 3})
    (finding,) = engine_waits.judge(few, many, CPU, "9 ms")
    assert (finding.verdict, "synchronize" in finding.advice) == (Verdict.SLOW, True)
    (finding,) = engine_waits.judge(Counter({"norm": 3}), Counter({"norm": 3}), CPU, "9 ms")
    assert (finding.verdict, "0 per micro-batch, 3 per update" in finding.detail) == (Verdict.OK, True)
    (finding,) = engine_waits.judge(Counter({"norm": 99}), Counter({"norm": 99}), CPU, "9 ms")
    assert finding.verdict == Verdict.SLOW


def test_the_engine_makes_no_micro_batch_wait() -> None:
    (process,) = start_ranks(1, show_waits, [])
    shown, errors = process.communicate(timeout=900)
    assert shown.splitlines() == ["{'synchronize': 1}", "ok, 0 per micro-batch, 3 per update"], errors


def show_waits() -> None:
    accelerator = import_deepspeed().accelerator.get_accelerator()
    print(dict(operations.count_waits(lambda: accelerator.synchronize(), CPU)))
    (finding,) = engine_waits.check(CPU, 1)
    print(f"{finding.verdict}, {finding.detail.partition(';')[0]}")


def test_answers_of_a_wrong_model_are_wrong() -> None:
    assert step.same_answers(DEVICE).verdict == Verdict.OK

    def wrong(a, classes: int) -> ByteFormer:
        return ByteFormer(replace(a, shifts=tuple(shift + 1 for shift in a.shifts)), classes)

    assert step.same_answers(DEVICE, wrong).verdict == Verdict.WRONG


# --- Training ----------------------------------------------------------------------------------------------------


def in_fork(arguments: Sequence[str]) -> str:
    if arguments[0] == "pack":
        return str(call("pack", list(arguments[1:])) or "")
    (result,) = _run_ranks(1, ["bfsys/train.py", *arguments[1:]])
    return result.stderr if result.returncode else ""


def test_a_resumed_training_is_the_same_and_a_changed_one_is_not(tmp_path: Path) -> None:
    found = short_training.train_twice(tmp_path, False, in_fork)
    assert [(finding.what, finding.verdict) for finding in found] == [("training", "ok"), ("resume", "ok")]
    whole, again = tmp_path / "runs" / "whole", tmp_path / "runs" / "again"
    assert short_training.compare_runs(whole, again).verdict == Verdict.OK
    manifest = again / "checkpoints" / f"step_{short_training.STEPS:08d}" / "manifest.json"
    content = json.loads(manifest.read_text())
    name = next(name for name in content["files"] if name.endswith(".safetensors"))
    content["files"][name]["sha256"] = "other"
    manifest.write_text(json.dumps(content))
    finding = short_training.compare_runs(whole, again)
    assert (finding.verdict, name in finding.detail) == (Verdict.WRONG, True)


def test_a_failing_training_is_reported_as_wrong_with_the_reason(tmp_path: Path) -> None:
    (finding,) = short_training.train_twice(tmp_path, False, lambda arguments: "code 1: no memory")
    assert (finding.verdict, finding.detail) == (Verdict.WRONG, "code 1: no memory")


# --- Processes, command ------------------------------------------------------------------------------------------


def processes_result(name: str, limit_s: float = 900, is_cut_short: bool = False) -> list[Finding]:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        child = processes.start(name, 1, Path(folder), {**os.environ, "DS_ACCELERATOR": "cpu"})
        return processes.finish(name, child, Path(folder), limit_s, is_cut_short=is_cut_short)


def test_checks_that_crash_or_hang_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    (skipped,) = processes_result("engine", 0.01, is_cut_short=True)
    assert (skipped.verdict, "--seconds" in skipped.advice) == (Verdict.SKIPPED, True)
    (hung,) = processes_result("engine", 0.01)
    assert (hung.verdict, "hung" in hung.detail) == (Verdict.WRONG, True)
    monkeypatch.setattr(processes, "CHECKS", {"nonsense": CHECKS["engine"]})
    (crashed,) = processes_result("nonsense")
    assert (crashed.verdict, "KeyError" in crashed.detail) == (Verdict.WRONG, True)


def test_a_stopped_check_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(processes, "finish", lambda name, child, *_, **__: _kill_after_its_first_file(child, tmp_path))
    processes.run_checks(["training"], 60, Ranks(), lambda *_: None)
    assert list(tmp_path.iterdir()) == []


def _kill_after_its_first_file(child: subprocess.Popen, folder: Path) -> list[Finding]:
    while not list(folder.rglob("bfsys-training-*")) and child.poll() is None:
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return []


def test_the_result_does_not_depend_on_the_reader_of_the_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = {"environment": [Finding("PyTorch", Verdict.WRONG, "too old")]}

    def run_checks(names: object, seconds: float, ranks: Ranks, say) -> dict[str, list[Finding]]:
        say("environment", wrong["environment"])
        return wrong

    monkeypatch.setattr(processes, "run_checks", run_checks)
    with closed_output():
        assert call("check-gpu", ["--json", str(tmp_path / "findings.json")]) == 1
    assert (tmp_path / "findings.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_stopped_command_stops_its_check_and_leaves_no_files(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bfsys", "check-gpu", "--only", "training"]
    variables = {**os.environ, "DS_ACCELERATOR": "cpu", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=variables, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    children: list[psutil.Process] = []
    try:
        while not list(tmp_path.rglob("bfsys-training-*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        assert process.wait(900) == 128 + number
        assert psutil.wait_procs(children, 900)[1] == []
        assert list(tmp_path.iterdir()) == []
    finally:
        for each in (process, *children):
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.communicate()


def test_each_rank_checks_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"RANK": "3", "WORLD_SIZE": "4", "SLURM_PROCID": "3", "HOME": "/h", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    ranks = Ranks(3, 4, 3, 4)
    assert processes.variables_of_one(env, Ranks()) == {"HOME": "/h", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    monkeypatch.setattr("bfsys.ranks.gpu_count", lambda: 4)
    assert processes.variables_of_one(env, ranks) == {"HOME": "/h", "CUDA_VISIBLE_DEVICES": "7"}
    del env["CUDA_VISIBLE_DEVICES"]
    assert processes.variables_of_one(env, ranks) == {"HOME": "/h", "CUDA_VISIBLE_DEVICES": "3"}


def test_a_check_of_one_rank_is_no_task_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    of_step = {"STEP_NODELIST": "n[1-2]", "STEP_ID": "0", "STEP_NUM_TASKS": "16", "NODEID": "0", "PROCID": "3"}
    env = {"HOME": "/h", "SLURM_JOB_ID": "7", **{f"SLURM_{name}": value for name, value in of_step.items()}}
    alone = processes.variables_of_one(env, Ranks())
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", alone)
        set_slurm_variables()  # as the short training does
    assert alone == {"HOME": "/h"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(CHECKS, "environment", replace(CHECKS["environment"], limit_s=900))
    assert call("check-gpu", ["--only", "environment", "--seconds", "900", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "environment  skipped  GPU: DS_ACCELERATOR=cpu selects the CPU" in shown
    report = json.loads(out.read_text())
    assert list(report["checks"]) == ["environment"]
    assert report["checks"]["environment"][0]["verdict"] == "ok"
    wrong = [Finding("stem", Verdict.WRONG, "1 of 2", "look")]
    monkeypatch.setattr(processes, "finish", lambda name, child, *_, **__: child.kill() or (child.wait() and wrong))
    assert call("check-gpu", ["--only", "kernels"]) == 1
    assert call("check-gpu", ["--only", "kernels", "--seconds", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "kernels      wrong    stem: 1 of 2", f"{'':21} → look",
        "kernels      skipped  whole check: no time was left",
        f"{'':21} → give more --seconds, or this check alone with --only",
    ]  # fmt: skip
    quiet = check_gpu.rows("kernels", [*wrong, Finding("x", Verdict.OK, "")], "rank 1 on n1", shows_all=False)
    assert quiet[0].startswith("rank 1 on n1: kernels")
    assert len(quiet) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "kernel"], "got 'kernel' (did you mean 'kernels'?)"),
        (["--only", ""], "got ''"),
        (["--seconds", "0"], "more than 0"),
        (["--seconds", "nan"], "more than 0"),
        (["--json", "/no/such/folder/x"], "does not exist"),
    ],
)
def test_wrong_arguments(arguments: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        call("check-gpu", arguments)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2

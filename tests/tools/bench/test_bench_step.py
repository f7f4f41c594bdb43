"""bench_step compares equal computations, and its report has the right form. No timing is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bfsys.batch import ByteBatch, Sample
from bfsys.gpu_check.training_steps import random_files
from bfsys.model.byteformer import ByteFormer
from bfsys.model.published_form import PublishedForm, load_bfsys_weights, pad
from bfsys.model.sizes import PAD_BYTE, architecture
from tests.forked import answer_of
from tools.bench import bench_step, step_measurement
from tools.bench.step_measurement import SIDES, Workload, in_child, in_this_process

NUMBERS = ("baseline", "sdpa", "bfsys", "bfsys_checkpointing")
CPU = torch.device("cpu")


@pytest.mark.parametrize("fused_attention", [False, True])
@pytest.mark.parametrize(("window", "shift"), [(8, 4), (8, 8), (4, 3)])
def test_baseline_gives_the_logits_of_bfsys(fused_attention: bool, window: int, shift: int) -> None:
    """This holds for any lengths and padding. In float64, rounding cannot hide a wrong mask."""
    torch.manual_seed(0)
    a = architecture("custom", kernel=4, window=window, shift=shift, dim=24, layers=6, heads=3, max_tokens=300)
    model = ByteFormer(a, 5).double()
    with torch.no_grad():  # with the initial weights, the logits hardly depend on the bytes
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        model.stem.embedding[PAD_BYTE] = 0
    baseline = PublishedForm(a, 5, fused_attention).double()
    load_bfsys_weights(baseline, model.state_dict())
    files = random_files([1, 300, 7, 64, 129, 599])
    expected = model(ByteBatch.from_samples([Sample("", file) for file in files]))
    assert expected.std(0).min() > 0.1
    torch.testing.assert_close(baseline(pad(files, a)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [side for side in SIDES if side not in ("bfsys_compiled", "bfsys_engine")])
@pytest.mark.parametrize("bf16", [False, True])
def test_step_trains(side: str, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss falls in each step. In bfloat16, the optimizer still has float32 weights."""
    losses, optimizers = [], []
    entropy, adamw = F.cross_entropy, torch.optim.AdamW

    def recorded_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert logits.dtype == torch.float32
        losses.append(entropy(logits, labels))
        return losses[-1]

    def recorded_adamw(*args, **kwargs) -> torch.optim.Optimizer:
        optimizers.append(adamw(*args, **kwargs))
        return optimizers[-1]

    torch.manual_seed(0)
    monkeypatch.setattr(F, "cross_entropy", recorded_entropy)
    monkeypatch.setattr(torch.optim, "AdamW", recorded_adamw)
    a = architecture("custom", kernel=4, window=8, shift=4, dim=64, layers=3, heads=1, max_tokens=60)
    step = SIDES[side](random_files([100, 30, 77]), a, 3, CPU, bf16)
    for _ in range(6):
        step()
    assert losses[5] < losses[1] < losses[0]
    parameters = [p for group in optimizers[0].param_groups for p in group["params"]]
    assert sum(p.numel() for p in parameters) == sum(p.numel() for p in ByteFormer(a, 3).parameters())
    assert {p.dtype for p in parameters} == {torch.float32}


@pytest.mark.parametrize("side", ["bfsys", "bfsys_engine"])
def test_child_measures(side: str) -> None:
    workload = bench_step.trial_workloads()["wav"]
    job = {"side": side, "workload": asdict(workload), "size": "custom", "repeats": 1, "times": True}
    job |= {"device": "cpu", "precision": "fp32"}
    # bfsys runs in a new process, as users start it. The other side, whose imports are slow, runs in a forked process.
    done = in_child(job) if side == "bfsys" else answer_of(step_measurement.measure, job)
    parts = done.pop("parts")
    assert parts.keys() == {"forward", "backward", "update"}
    assert all(part["operations"] >= part["launches"] > 0 < part["ms"] for part in parts.values())
    assert parts["backward"]["launches"] > parts["forward"]["launches"]
    assert done.keys() == {"ms", "cpu_ms", "mib"} | ({"peak_flops_per_s"} if side == "bfsys" else set())
    assert all(value > 0 for value in done.values())


def test_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out.json"
    arguments = ["--trial", "--device", "cpu", "--workloads", "wav", "--repeats", "1", "--json", str(out)]
    assert bench_step.main([*arguments, "--one-process"]) == 0
    report = json.loads(out.read_text())
    assert {"rows", "machine", "versions", "date"} <= report.keys()
    (row,) = report["rows"]
    assert (row["workload"], row["files"], row["problem"]) == ("wav", 4, None)
    assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["bfsys_ms"])
    assert row["bfsys_checkpointing_ms"] is None
    seconds = row["bfsys_ms"] / 1000
    assert row["share_of_peak"] == pytest.approx(row["flops"] / seconds / row["peak_flops_per_s"])
    assert row["tokens_per_s"] == pytest.approx(row["real_tokens"] / seconds)
    assert row["bytes_per_s"] == pytest.approx(row["bytes"] / seconds)
    assert 0 < row["flops"] < row["published_flops"]
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert printed.count("wav, k 16") == 1
    assert f"wav, 4 files, bfsys: {row['bfsys_ms']:,.1f} ms, " in printed
    assert report["machine"]["bf16_instructions"]


def test_one_process_measures_all_sides_of_all_workloads(tmp_path: Path, run_ranks) -> None:
    """This includes the engine, which has one process group in a process. A separate process would take too long."""
    out = tmp_path / "out.json"
    script = """
import sys
from tools.bench import bench_step, step_measurement

step_measurement.LIMIT_S = 0
sys.exit(bench_step.main(sys.argv[1:]))
"""
    options = ["--trial", "--device", "cpu", "--workloads", "wav,jpeg", "--repeats", "1", "--engine", "--one-process"]
    (result,) = run_ranks(1, ["-c", script, *options, "--json", str(out)])
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["workload"] for row in rows] == ["wav", "jpeg"]
    assert all(row[f"{side}_ms"] > 0 for row in rows for side in ("baseline", "sdpa", "bfsys", "bfsys_engine"))


def test_all_workloads_and_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed: list[str] = []

    def run(job: dict) -> dict:
        printed.append(capsys.readouterr().out)
        if (job["side"], job["workload"]["kernel"]) == ("sdpa", 8):
            return {"problem": "out of memory"}
        return {"ms": 10.0, "cpu_ms": 9.0, "mib": 20.0, "peak_flops_per_s": 1e12, "parts": {}}

    arguments = ["--trial", "--device", "cpu", "--checkpointing", "--json", str(tmp_path / "out.json")]
    assert bench_step.main(arguments, run) == 1
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["workload"] for row in rows] == ["tiff", "jpeg", "wav"]
    assert [row["problem"] for row in rows] == [None, "sdpa: out of memory", None]
    assert all(row[f"{side}_{key}"] is not None for row in rows[::2] for side in NUMBERS for key in ("ms", "mib"))
    assert (rows[0]["ratio"], rows[0]["sdpa_ratio"], rows[0]["memory_ratio"]) == (1.0, 1.0, 1.0)
    assert (rows[1]["sdpa_ms"], rows[1]["sdpa_ratio"], rows[1]["ratio"]) == (None, None, 1.0)
    assert printed[0] == ""
    assert printed[1] == "  tiff, 4 files, baseline: 10.0 ms, 20 MiB\n", "it is printed before the next is measured"
    assert sum("out of memory" in text for text in [*printed, capsys.readouterr().out]) >= 2  # in its row and below


def test_workloads() -> None:
    tiff, jpeg, wav = bench_step.workloads().values()
    assert (tiff.kernel, tiff.lengths) == (32, (150_668,) * 4)
    assert (jpeg.kernel, len(jpeg.lengths)) == (8, 16)
    assert 9_000 < np.median(jpeg.lengths) < 15_000
    assert (wav.kernel, sorted(wav.lengths)) == (16, [32_044] * 4 + [64_058] * 4)
    for workload in (tiff, jpeg, wav):
        a = bench_step.make_architecture("tiny", workload)
        assert a.max_bytes - a.stride < max(workload.lengths) <= a.max_bytes


def test_fewer_files_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = bench_step.workloads()["tiff"]
    a = bench_step.make_architecture("tiny", workload)
    monkeypatch.setattr(bench_step, "available_bytes", lambda: 4 * 2**30)
    assert 1 < len(bench_step.that_fits(workload, a).lengths) < 8
    monkeypatch.setattr(bench_step, "available_bytes", lambda: 2**40)
    assert bench_step.that_fits(workload, a) == workload
    assert bench_step.with_files(workload, 3).lengths == workload.lengths[:3]
    assert bench_step.with_files(workload, 9).lengths == workload.lengths * 2 + workload.lengths[:1]
    monkeypatch.setattr(bench_step, "available_bytes", lambda: 0)
    assert bench_step.that_fits(workload, a).lengths == workload.lengths[:1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workloads", "tiff,mp3"], "got mp3"),
        (["--repeats", "0"], "positive"),
        (["--files", "0"], "positive"),
        (["--precision", "fp16"], "fp16"),
        (["--size", "giant"], "giant"),
        (["--device", "cpu", "--compiled"], "on GPUs only"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "no GPU")]),
    ],
)
def test_wrong_arguments(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        bench_step.main(arguments)
    assert end.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("run", [in_child, in_this_process])
def test_failure_is_the_last_line_of_its_error(run: Callable[[dict], dict]) -> None:
    result = run({"side": "nonsense", "device": "cpu", "precision": "fp32"})
    assert result == {"problem": "KeyError: 'nonsense'"}


def test_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_measurement, "LIMIT_S", 0.01)
    assert in_child({"workload": Workload(4, 2, (5,)).__dict__}) == {"problem": "no end after 0.01 s"}

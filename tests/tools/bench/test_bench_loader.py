"""bench_loader measures and checks its loaders, and cleans up. No timing is asserted."""

from __future__ import annotations

import itertools
import json
import os
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import pytest

from bfsys.data.storage.shards import FORMAT
from tests.forked import answer_of
from tools.bench import bench_loader
from tools.bench.bench_loader import RAW_READ

SAMPLES = 320
NUMBERS = ("mb_per_s", "samples_per_s", "first_batch_s", "padding_share")


def batches_of(lengths: np.ndarray, numbers: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    payloads = [bench_loader.sample(number, lengths) for number in numbers]
    return [bench_loader.flat_batch(payloads[i : i + 32])[:2] for i in range(0, len(numbers), 32)]


def test_small_run_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each job runs in a forked process, since new ones would import PyTorch. The next test starts new ones."""
    ledgers = (tmp_path / f"ledger-{i}" for i in itertools.count())

    def in_forked_child(job: dict) -> dict:
        ledger = next(ledgers)
        try:
            return answer_of(bench_loader.run_job, {**job, "ledger": str(ledger)})
        finally:
            bench_loader.remove_shared_memory(ledger)

    monkeypatch.setattr(bench_loader, "in_child", in_forked_child)
    out = tmp_path / "new" / "out.json"
    arguments = ["--samples", str(SAMPLES), "--repeats", "1", "--workers", "0,1"]
    arguments += ["--loaders", "webdataset,raw read,bfsys", "--json", str(out), "--data", str(tmp_path / "data")]
    assert bench_loader.main(arguments) == 0
    report = json.loads(out.read_text())
    assert {"rows", "machine", "versions", "date"} <= report.keys()
    assert {"python", "torch", "webdataset"} <= report["versions"].keys()
    rows = report["rows"]
    cases = [(row["loader"], row["workers"]) for row in rows]
    assert cases == [(RAW_READ, 0), ("bfsys", 0), ("bfsys", 1), ("webdataset", 0), ("webdataset", 1)]
    assert [row["problem"] for row in rows] == [None] * 5  # a loader that loses or repeats samples would have one
    assert all(row[key] is not None for row in rows[1:] for key in NUMBERS)
    assert all(0.2 < row["padded_share"] < 0.9 and row["padding_share"] == 0 for row in rows[1:])
    assert rows[2]["vs_webdataset"] == pytest.approx(rows[2]["mb_per_s"] / rows[4]["mb_per_s"])
    assert rows[0]["vs_raw_read"] == 1
    printed = capsys.readouterr().out
    assert printed.count("webdataset") == 3  # two rows and a column
    assert "…" not in printed
    assert [path.name for path in (tmp_path / "data").iterdir()] == [f"tars-{SAMPLES}-format{FORMAT}"]


def test_missing_peer_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        if name == "litdata":
            raise PackageNotFoundError
        return version(name)

    monkeypatch.setattr(bench_loader, "version", installed)
    arguments = ["--loaders", "litdata,raw read", "--samples", "64", "--cold", "--repeats", "2", "--json"]
    assert bench_loader.main([*arguments, str(tmp_path / "out.json")]) == 0
    assert "litdata: not installed, left out; to have it: pip install -e '.[bench]'" in capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(row["loader"], row["cold"]) for row in report["rows"]] == [(RAW_READ, False), (RAW_READ, True)]
    assert "litdata" not in report["versions"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--loaders", "bfsys,dali"], "got dali"),
        (["--workers", "0,-1"], "got -1"),
        (["--samples", "100"], "a multiple of 32"),
        (["--repeats", "0"], "positive"),
        (["--seconds", "-1"], "positive"),
        (["--data", __file__], "is not a folder"),
    ],
)
def test_wrong_arguments(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        bench_loader.main(arguments)
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_lost_and_repeated_samples_are_noticed() -> None:
    lengths = bench_loader.sample_lengths(64)
    whole = bench_loader.check_epoch(batches_of(lengths, list(range(63, -1, -1))), lengths)
    assert whole["problem"] is None
    assert whole["padding_share"] == 0
    twice = bench_loader.check_epoch(batches_of(lengths, [0, *range(63)]), lengths)
    assert twice["problem"].startswith("WRONG: 64 samples of 64, 63 different ones, ")
    short = bench_loader.check_epoch(batches_of(np.maximum(lengths - 1, 8), list(range(64))), lengths)
    assert short["problem"].startswith("WRONG: 64 samples of 64, 64 different ones, ")
    timed = bench_loader.timed_epoch(lambda: batches_of(lengths, list(range(33))), lengths, None)
    assert timed["problem"].startswith("WRONG: 33 samples")


def test_failure_is_the_last_line_of_its_error() -> None:
    result = bench_loader.in_child({"write": "nonsense", "folder": "/nowhere", "samples": 64})
    assert list(result) == ["problem"]
    assert "nowhere" in result["problem"] or "nonsense" in result["problem"]


def test_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_loader, "LIMIT_S", 0.01)
    job = {"loader": RAW_READ, "folder": "nowhere", "samples": 64}
    assert bench_loader.in_child(job) == {"problem": "no end after 0.01 s"}


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="named shared memory is elsewhere here")
def test_only_own_shared_memory_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SharedMemory(create=True, size=8)
    monkeypatch.setattr(SharedMemory, "__init__", SharedMemory.__init__)  # restored after the test
    ledger = tmp_path / "ledger"
    bench_loader.record_shared_memory(ledger)
    mine = SharedMemory(create=True, size=8)
    SharedMemory(mine.name).close()  # attached, not created
    with open(ledger, "a") as file:
        file.write(f"1 /dev/shm/{other.name}\n")  # has the same name, but another process made it later
    bench_loader.remove_shared_memory(ledger)
    assert not os.path.exists(f"/dev/shm/{mine.name}")
    assert os.path.exists(f"/dev/shm/{other.name}")
    for memory in (mine, other):
        memory.close()
    other.unlink()

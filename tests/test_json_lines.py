from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from bfsys import json_lines
from bfsys.checkpoint.retention import evaluations
from bfsys.compare import last_train_line
from bfsys.json_lines import NUMBER, read_json_lines, read_json_lines_backwards
from bfsys.supervision.goodput import read_seconds
from bfsys.supervision.metrics import _open_lines
from tests.checkpoint.test_checkpoint import resume, save

DAMAGE = [
    b"",
    b"[1]",
    b"null",
    b"7",
    b'{"kind": 5, "step": 1}',
    b'{"kind": "train"}',
    b"\xff\xfe\x00{",
    b"[" * 9999,
    b'{"ki',
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: repr(damage[:12]))
def test_damaged_lines_are_ignored(damage: bytes, tmp_path: Path) -> None:
    good = b'{"kind": "eval", "step": 4, "top1": 0.5, "loss": 1.0}'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(damage + b"\n" + good + b"\n" + damage)
    assert [line["step"] for line in read_json_lines(path, {"kind": str, "step": int})] == [4]
    assert evaluations(tmp_path)[4]["top1"] == 0.5
    file, latest = _open_lines(path, 4, ())
    file.close()
    assert (path.read_bytes(), latest["step"]) == (good + b"\n", 4)


def test_fields_are_of_their_types(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"time": 1}\n{"time": 1.5}\n{"time": "1"}\n{}\n')
    assert [line["time"] for line in read_json_lines(path, {"time": NUMBER})] == [1, 1.5]
    assert not list(read_json_lines(tmp_path / "missing", {}))


def test_a_ledger_with_damage_counts_the_rest(tmp_path: Path) -> None:
    (tmp_path / "goodput.jsonl").write_bytes(
        b'{"event": "start", "time": 100, "step": 0}\n\xff\n{"event": "note", "time": 105}\n'
        b'{"event": "begin", "time": 110}\n[1]\n{"event": "another", "time": 120}\n'
        b'{"event": "note", "time": 150, "step": 4, "stall_s": 1, "wait_s": 2}\n{"ev'
    )
    assert read_seconds(tmp_path) == {"productive": 37, "lost": 0, "restart": 10, "stall": 1, "data_wait": 2}


@pytest.mark.parametrize("chunk_bytes", [1, 7, 24, 25, 1000])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n", b'{"step":'])
def test_lines_can_be_read_backwards(
    chunk_bytes: int, end: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\n{"step": 22, "more": "a longer line"}\n\n{"step": 333}' + end)
    forwards = list(read_json_lines(path, {"step": int}))
    assert len(forwards) == (3 if not end.startswith(b"{") else 2)
    assert list(read_json_lines_backwards(path, {"step": int})) == forwards[::-1]
    assert not list(read_json_lines_backwards(tmp_path / "missing", {}))


def _open_and_close(path: Path) -> None:
    _open_lines(path, 1, ())[0].close()


def _resume(path: Path) -> None:
    resume(path.parent)


def _restore(path: Path) -> None:
    path.unlink()
    resume(path.parent)


@pytest.mark.parametrize(
    "read", [lambda path: evaluations(path.parent), last_train_line, _open_and_close, _resume, _restore]
)
def test_a_long_history_is_not_held_in_memory(read: Callable[[Path], object], tmp_path: Path) -> None:
    """A run of millions of steps has a metrics.jsonl of gigabytes, which every start and `bfsys slurm status` read."""
    path = tmp_path / "metrics.jsonl"
    line = b'{"kind": "train", "step": 1, "seconds": {}, "more": "' + b"x" * 1000 + b'"}\n'
    path.write_bytes(20_000 * line)
    save(tmp_path, 1)
    tracemalloc.start()
    try:
        read(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size == 20_000 * len(line)
    assert peak_bytes < 6e6

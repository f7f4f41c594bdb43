from __future__ import annotations

from pathlib import Path

import pytest

from bfsys.checkpoint.files import evaluations
from bfsys.json_lines import NUMBER, read_json_lines
from bfsys.supervision.goodput import read_seconds
from bfsys.supervision.metrics import _open_lines

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

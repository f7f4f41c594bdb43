"""What the benchmark of file calls makes of a trace."""

from __future__ import annotations

from pathlib import Path

from tools.bench.bench_files import MARK, ROOT, by_rank, count, read_trace

TRACE = """\
1.0 execve("/usr/bin/python", ["python"], 0x7f /* 9 vars */) = 0
1.1 newfstatat(AT_FDCWD</here>, "{mark}rank/3", 0x7f, 0) = -1 ENOENT (No such file or directory)
1.2 openat(AT_FDCWD</here>, "{folder}/data/a/dataset.json", O_RDONLY) = 3</x>
1.3 newfstatat(3</x>, "", 0x7f, AT_EMPTY_PATH) = 0
1.4 newfstatat(AT_FDCWD</here>, "{mark}step", 0x7f, 0) = -1 ENOENT (No such file or directory)
1.5 openat(AT_FDCWD</here>, "{folder}/data/a/0.tar", O_RDONLY) = 4</x>
1.6 openat(AT_FDCWD</here>, "{folder}/runs/tiny/tb/events", O_WRONLY) = 5</x>
1.7 vfork()                            = 8
1.9 openat(AT_FDCWD<{root}>, "bfsys/train.py", O_RDONLY) = 6</x>
"""
WRITER = """\
1.75 execve("/usr/bin/python", ["python"], 0x7f /* 9 vars */) = 0
1.8 openat(AT_FDCWD</here>, "{folder}/runs/tiny/checkpoints/x", O_WRONLY) = 3</x>
1.85 fsync(3<{folder}/runs/tiny/checkpoints/x>) = 0
"""


def test_calls_are_counted_by_rank_occasion_and_place(tmp_path: Path) -> None:
    (tmp_path / "trace").mkdir()
    for process, text in ((7, TRACE), (8, WRITER)):
        (tmp_path / "trace" / f"t.{process}").write_text(text.format(mark=MARK, folder=tmp_path, root=ROOT))
    ((who, calls),) = by_rank(read_trace(tmp_path / "trace")).items()
    assert who == "rank 3"
    assert count(calls, tmp_path) == {
        "start": {"system": 1, "datasets": 1},
        "step": {"datasets": 1, "checkout": 1},
        "log line": {"run directory": 1},
        "save": {"system": 1, "run directory": 1, "fsync": 1},
    }

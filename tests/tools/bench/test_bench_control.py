"""The benchmark of control messages measures small groups of processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

# In another process, since the benchmark forks, and the process of the tests has threads
SMALL = """
import sys
from tools.bench import bench_control
bench_control.PAIR_RANKS = (2, 4, 8)
sys.exit(bench_control.main(sys.argv[1:]))
"""


def test_groups_and_pairs_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "control.json"
    command = [sys.executable, "-c", SMALL, "--ranks", "3", "--steps", "3", "--json", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [(row["ranks"], row["connections"]) for row in result["rows"]] == [(3, "full"), (3, "on demand")]
    for row in result["rows"]:
        assert {each["name"]: each["messages"] for each in row["exchanges"]} == {"ring": 2, "control message": 2}
        assert all(each["wall_us"] > 0 for each in row["exchanges"])
    assert [list(of_exchange["figures"]) for of_exchange in result["as_one_of"]] == [["2", "4", "8"]] * 2
    assert "as one of     8 ranks, control message" in done.stdout

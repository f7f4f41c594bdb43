"""The benchmark of remote data sees what its server did, and that failures change no batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bfsys.errors import UserError
from tools.bench import bench_remote


def test_it_counts_what_nodes_ask_for(tmp_path: Path) -> None:
    options = (
        "--nodes 2 --ranks-per-node 2 --shards 8 --epochs 2 --step-s 0 --failures 0.3 --outage-s 0.5 --rate-mb-s 50"
    )
    bench_remote.main([*options.split(), "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())
    assert rows.keys() == {"no failures", "failures", "outage"}
    for row in rows.values():
        assert row["batches that differ"] == 0
        assert row["reads of a sample"] == [2, 2]
        assert 0 < row["largest cache, of its limit"] <= 1
    assert rows["no failures"]["requests"]["dataset.json"] == 1
    assert rows["no failures"]["requests"]["index"] == 4  # each node requests two files
    assert not rows["no failures"]["failed"]
    assert rows["failures"]["failed"]
    assert rows["outage"]["failed"].keys() == {"503"}


def test_shards_that_the_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(UserError, match="--shards is 9; a multiple of the 4 ranks is allowed"):
        bench_remote.main(["--nodes", "4", "--shards", "9"])

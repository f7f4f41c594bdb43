"""Whole runs on remote data: a server that is unavailable for a while, and S3."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

from bfsys.cli import call
from bfsys.data.storage.remote import Cache, RemoteFile, WrongContentError
from bfsys.data.streaming.datasets import make_plan, open_training
from tests.data.conftest import config_of, files_of, read_by
from tests.data.http_server import FaultyServer
from tests.plain_training import train_plainly
from tests.s3_server import S3Server
from tests.test_train import assert_success, lines, losses

IMPATIENT_RUN = """
import runpy
from bfsys.data.storage.remote import Cache
Cache.__init__.__kwdefaults__.update(back_off_s=0.01)
runpy.run_path("bfsys/train.py", run_name="__main__")
"""


def comparable(run: Path) -> list[dict]:
    """Lines of metrics.jsonl, without clocks and memory."""
    not_data = {
        "step_s",
        "samples_per_s",
        "bytes_per_s",
        "tokens_per_s",
        "model_tflop_per_s",
        "mfu",
        "matmul_share",
        "data_wait_share",
        "peak_memory_mib",
        "goodput",
        "seconds",
    }
    return [
        {k: v for k, v in line.items() if k not in not_data} for kind in ("train", "eval") for line in lines(run, kind)
    ]


def test_a_run_that_loses_its_server_ends_and_can_be_resumed(
    served: FaultyServer, packed: Path, tmp_path: Path, run_ranks
) -> None:
    local = config_of(tmp_path, packed / "a", packed / "b", "data.shuffle_block=4", "data.batch_samples=8")
    remote = config_of(tmp_path, f"{served.url}/a", f"{served.url}/b", name="remote")
    plan = make_plan(local, open_training(local))
    first_half, second_half = (read_by(plan, range(a, b), range(4)) for a, b in ((0, 5), (5, local.train.steps)))
    assert second_half - first_half
    for path in tars_of(served) - first_half:
        served.fail(path, itertools.repeat("503"))
    overrides = ["data.shuffle_block=4", "data.batch_samples=8"]
    ended = run_ranks(2, ["-c", IMPATIENT_RUN, str(tmp_path / "remote.yaml"), *overrides])
    output = "".join(rank.stderr for rank in ended)
    assert {rank.returncode for rank in ended} == {1}, output  # launchers restart it, since the server may recover
    assert f"{served.url}/" in output
    assert "could not be fetched in 3 tries (1: HTTP status 503; 2: " in output
    assert "Traceback" not in output
    assert not (remote.run_dir / "quarantine.tsv").exists()
    assert 4 <= len(lines(remote.run_dir)) < local.train.steps
    served.faults.clear()
    served.requests.clear()
    both = [f"name={name} {' '.join(overrides)} data.sources.0.path={a} data.sources.1.path={b}" for name, a, b in (
        ("local", packed / "a", packed / "b"), ("remote", f"{served.url}/a", f"{served.url}/b"))]  # fmt: skip
    assert_success(run_ranks(2, ["tests/worker.py", str(tmp_path / "remote.yaml"), *both]))
    assert served.requests["/a/dataset.json"] == served.requests["/b/dataset.json"] == 1  # one request for all ranks
    assert comparable(remote.run_dir) == comparable(remote.run_dir.parent / "local")
    assert not (remote.run_dir / "quarantine.tsv").exists()


def test_a_run_shows_no_secrets_of_its_data(served: FaultyServer, tmp_path: Path, run_ranks, capsys) -> None:
    """config.yaml and the checkpoints hold the locations, since they are needed again; nothing else does."""
    location = f"{served.url.replace('//', '//me:hunter2@')}/a?sig=hunter2"
    change = ["train.steps=2", "model.max_tokens=2"]  # for notes on both datasets
    config = config_of(tmp_path, location, f"pipe:curl -s -H X:hunter2 {served.url}/b/{{file}}", *change)
    train = ["bfsys/train.py", str(tmp_path / "tiny.yaml"), *change]
    ended = run_ranks(1, train)
    assert_success(ended)
    dry, wrong = run_ranks(1, [*train, "--dry-run"])[0], run_ranks(1, [*train, "data.train_split=none"])[0]
    assert "there is no split 'none'" in wrong.stderr
    call("checkpoint", ["show", str(config.run_dir)])
    shown = [capsys.readouterr().out, *(text for end in (*ended, dry, wrong) for text in (end.stdout, end.stderr))]
    shown += [file.read_text(errors="replace") for file in config.run_dir.iterdir() if file.is_file()]
    shown += [file.read_text(errors="replace") for file in (config.run_dir / "tb").iterdir()]
    assert "hunter2" in (config.run_dir / "config.yaml").read_text()
    assert [text for text in shown if "hunter2" in text] == [(config.run_dir / "config.yaml").read_text()]
    assert "127.0.0.1" in "".join(shown)


def tars_of(server: FaultyServer) -> set[str]:
    return {path for path in server.files if path.endswith(".tar") and "-train-" in path}


@pytest.fixture
def few_shards(datasets: Path, tmp_path: Path) -> Path:
    """The tree `a` in few shards, because each fetch from S3 starts a program that takes a second."""
    call(
        "pack", [str(datasets / "trees" / "a"), str(tmp_path), "--name", "a", "--shard-bytes", "200K", "--workers", "1"]
    )
    return tmp_path / "a"


@pytest.fixture
def bucket(few_shards: Path, s3: S3Server) -> str:
    """A dataset in a bucket. Programs find the server through the environment."""
    if shutil.which("aws") is None or subprocess.run(["aws", "--version"], capture_output=True).returncode != 0:
        pytest.skip("the AWS command line (aws) does not work here")
    for file in files_of(few_shards):
        s3.write(f"dir/a/{file}", (few_shards / file).read_bytes())
    return "s3://bucket/dir/a"


def test_a_run_on_s3(bucket: str, few_shards: Path, tmp_path: Path, run_ranks) -> None:
    change = ["data.lanes=1", "data.batch_samples=8", "data.eval_split=none", "train.steps=2"]
    local = config_of(tmp_path, few_shards, None, *change)
    remote = config_of(tmp_path, bucket, None, *change, name="s3")
    assert_success(run_ranks(1, ["bfsys/train.py", str(tmp_path / "s3.yaml"), *change]))
    assert losses(remote.run_dir) == pytest.approx(train_plainly(local)[0], rel=2e-6)
    assert not (remote.run_dir / "quarantine.tsv").exists()


def test_a_shard_that_s3_does_not_have_is_damage(bucket: str, tmp_path: Path) -> None:
    """A missing shard is not an outage; the answer means the same as HTTP 404."""
    cache = Cache(tmp_path / "cache", 10**6, attempts=1)
    with pytest.raises(WrongContentError, match="404"):
        cache.fetch(RemoteFile(f"{bucket}/none.tar", "0" * 64, 1))

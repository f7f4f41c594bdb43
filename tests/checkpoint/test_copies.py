"""Runs whose checkpoints are copied to S3: they lose their disk, the server, or the permission to write."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from bfsys.checkpoint.files import all_checkpoints, find_newest
from bfsys.cli import call
from bfsys.errors import EXIT_REQUEUE, EXIT_STOPPED, EXIT_STORAGE, EXIT_USER_ERROR
from tests.conftest import REPOSITORY, tiny_config
from tests.data.streaming.test_remote_runs import comparable
from tests.forked import Forked, start_ranks
from tests.s3_server import S3Server
from tests.test_train import tensors

STATES = ("weight", "exp_avg", "exp_avg_sq", "ema")
ROOT = "copies/tiny/checkpoints"


def train_in_step_with_copies(config: str, overrides: Sequence[str], stop_after: int | None) -> None:
    """Run bfsys/train.py, wait for the copies after each step, and request a stop after `stop_after`."""
    from bfsys import dist, train
    from bfsys.config import load_config
    from bfsys.errors import exit_code_of
    from bfsys.ranks import ranks_from_environment
    from bfsys.supervision.supervisor import Supervisor

    end_step = Supervisor.end_step

    def end_step_and_wait(self: Supervisor, step: int, outcome) -> None:
        end_step(self, step, outcome)
        if self.saver.under_way:
            self.finish_save(step)
        while self.copies.copying:
            self.copies.attend(step, self.metrics)
            time.sleep(0.01)
        if step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    Supervisor.end_step = end_step_and_wait
    ranks = ranks_from_environment()
    dist.hard_exit(exit_code_of(lambda: train.train_rank(load_config(config, overrides), ranks)))


class Runs:
    """Starts runs whose checkpoints are copied to a server."""

    def __init__(self, folder: Path, config: dict, s3: S3Server) -> None:
        self.folder, self.s3, self.config = folder, s3, folder / "tiny.yaml"
        config["train"]["checkpoint_copy"] = "s3://bucket/copies"
        self.config.write_text(yaml.safe_dump(config))
        self.run = folder / "runs" / "tiny"

    def start(self, *overrides: str, ranks: int = 1, stop_after: int | None = None) -> list[Forked]:
        return start_ranks(ranks, train_in_step_with_copies, (str(self.config), overrides, stop_after))

    def train(self, *overrides: str, stop_after: int | None = None) -> tuple[int | None, str]:
        """Train, and return (exit code, output)."""
        (process,) = self.start(*overrides, stop_after=stop_after)
        try:
            said = "".join(process.communicate(900))
        finally:
            process.kill()
        assert "Traceback" not in said, said
        return process.returncode, said

    def lose_disk(self) -> None:
        shutil.rmtree(self.run)


@pytest.fixture
def runs(datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    server = S3Server(monkeypatch)
    yield Runs(tmp_path, tiny_config(datasets, tmp_path), server)
    server.close()


def same_bits(one: Path, other: Path) -> bool:
    pairs = ((tensors(one, state), tensors(other, state)) for state in STATES)
    return all(a.keys() == b.keys() and all(a[n].equal(b[n]) for n in a) for a, b in pairs)


def steps(paths: Sequence[str | Path]) -> list[int]:
    return sorted(int(re.findall(r"step_(\d+)", str(path))[0]) for path in paths)


def test_a_run_that_loses_its_disk_continues_from_its_copies(runs: Runs, tmp_path: Path, capsys) -> None:
    """First the bucket becomes read-only, so the disk has more than the bucket. Then the disk is lost."""
    runs.s3.fault = deny_after(4)
    code, said = runs.train()
    assert code == EXIT_STORAGE
    assert f"checkpoint {runs.run}/checkpoints/step_00000010: is intact, but has no copy in s3://bucket" in said
    assert said.count("training continues, and the next save tries again") == 1
    assert steps(runs.s3.whole("copies/tiny")) == [0, 4]
    path, problems = find_newest(runs.run)
    assert path
    assert path.name == "step_00000010"
    assert not problems
    undisturbed = runs.run.rename(tmp_path / "undisturbed")

    runs.s3.fault = lambda request: None
    code, said = runs.train()
    assert code == 0, said
    assert "fetched step_00000004 from s3://bucket/copies/tiny" in said
    assert same_bits(runs.run / "checkpoints" / "step_00000010", undisturbed / "checkpoints" / "step_00000010")
    assert comparable(runs.run) == comparable(undisturbed)
    assert steps(runs.s3.whole("copies/tiny")) == steps(all_checkpoints(runs.run)) == [4, 8, 10]
    assert call("checkpoint", ["verify", "s3://bucket/copies/tiny"]) == 0

    # A different run of the same name does not use these copies.
    runs.lose_disk()
    code, said = runs.train("train.seed=1")
    assert code == EXIT_USER_ERROR
    assert "the object store holds a run with other settings" in said
    assert not list((runs.run / "checkpoints").iterdir())


@pytest.mark.slow
def test_damage_and_a_store_that_does_not_answer(runs: Runs) -> None:
    code, said = runs.train()
    assert code == 0, said

    # Damaged copies are skipped. The ranks of a launcher wait while rank 0 fetches.
    runs.lose_disk()
    runs.s3.write(f"{ROOT}/step_00000010/weight-0-of-1.safetensors", b"short")
    runs.s3.client.delete_object(Bucket="bucket", Key=f"{ROOT}/step_00000008/manifest.json")
    command = [sys.executable, "-m", "bfsys", "launch", str(runs.config), "--ranks", "2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "skipped a damaged copy: s3://bucket/copies/tiny/checkpoints/step_00000010/weight-0" in ended.stdout
    assert "fetched step_00000004" in ended.stdout
    assert steps(runs.s3.whole("copies/tiny")) == [4, 8, 10]
    assert call("checkpoint", ["verify", "s3://bucket/copies/tiny"]) == 0

    # A checkpoint that is damaged on the disk is replaced by its copy.
    weights = next((runs.run / "checkpoints" / "step_00000010").glob("weight-*"))
    weights.write_bytes(weights.read_bytes()[:-1])
    code, said = runs.train()
    assert code == 0, said
    assert "skipped a damaged checkpoint" in said
    assert "fetched step_00000010" in said
    assert find_newest(runs.run) == (runs.run / "checkpoints" / "step_00000010", [])

    # If the store does not answer, a run with a checkpoint resumes, and a run without one does not start from scratch.
    runs.s3.fault = lambda request: 403
    code, said = runs.train("train.steps=11")
    assert code == EXIT_STORAGE
    assert "did not answer whether it has newer checkpoints" in said
    assert find_newest(runs.run)[0] == runs.run / "checkpoints" / "step_00000011"
    runs.lose_disk()
    code, said = runs.train()
    assert code == EXIT_USER_ERROR
    assert "train.checkpoint_copy: s3://bucket/copies/tiny/checkpoints: cannot be listed" in said
    assert not all_checkpoints(runs.run)


def deny_after(step: int):
    """Return a fault that refuses writes after the copy of a step."""

    def fault(request: str) -> int | None:
        found = re.search(r"^PUT .*/step_(\d+)/", request)
        return 403 if found and int(found[1]) > step else None

    return fault


def test_a_kill_in_the_middle_of_a_copy_and_a_stop(runs: Runs, tmp_path: Path) -> None:
    reached, killed = threading.Event(), threading.Event()

    def hold(request: str) -> None:
        if request.startswith("PUT") and "step_00000004/exp_avg-" in request:
            reached.set()
            killed.wait(900)

    runs.s3.fault = hold
    (process,) = runs.start()
    try:
        assert reached.wait(900), process.said()
    finally:
        process.kill()
        killed.set()
    runs.s3.fault = lambda request: None
    assert steps(runs.s3.whole("copies/tiny")) == [0]
    runs.lose_disk()
    code, said = runs.train(stop_after=5)
    assert code == EXIT_STOPPED, said
    assert "fetched step_00000000" in said
    assert steps(runs.s3.whole("copies/tiny")) == [0, 4, 6]
    assert call("checkpoint", ["verify", "s3://bucket/copies/tiny"]) == 0


def test_a_run_that_is_stopped_while_its_last_copy_fails_is_restarted(runs: Runs) -> None:
    reached, asked = threading.Event(), threading.Event()

    def fail(request: str) -> int | None:
        if not re.search("PUT .*/step_00000008/", request):
            return None
        reached.set()
        asked.wait(900)
        return 403

    runs.s3.fault = fail
    (process,) = runs.start("train.steps=8")
    try:
        assert reached.wait(900), process.said()
        os.kill(process.pid, signal.SIGUSR2)
        time.sleep(0.5)
        asked.set()
        said = "".join(process.communicate(900))
    finally:
        process.kill()
        asked.set()
    assert process.returncode == EXIT_REQUEUE, said
    assert "step_00000008: is intact, but has no copy in s3://bucket/copies/tiny" in said
    runs.s3.fault = lambda request: None
    code, said = runs.train("train.steps=8")
    assert code == 0, said
    assert steps(runs.s3.whole("copies/tiny"))[-1] == 8


@pytest.mark.parametrize(
    ("url", "code", "says"),
    [
        ("s3://nowhere/x", EXIT_USER_ERROR, "cannot be written: The specified bucket does not exist"),
        ("s3://bucket/x", 0, "copies      s3://bucket/x/tiny: can be written"),
    ],
)
def test_a_dry_run_checks_that_the_store_can_be_written(runs: Runs, run_ranks, url: str, code: int, says: str) -> None:
    (ended,) = run_ranks(1, ["bfsys/train.py", str(runs.config), "--dry-run", f"train.checkpoint_copy={url}"])
    assert ended.returncode == code
    assert says in ended.stdout + ended.stderr
    assert runs.s3.keys() == []

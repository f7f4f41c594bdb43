"""What a shared file system sees of a run: a call of each of a thousand ranks is a thousand calls.

`tools/bench/bench_files.py` counts the calls of the kernel; these tests watch those of Python.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.test_train import assert_success

WATCHED_RANK = """
import json, os, runpy, sys
import bfsys.train as training

calls, step = [], 0

def noted(name, path):
    if step and isinstance(path, (str, bytes, os.PathLike)):
        calls.append((step, name, os.fsdecode(path)))

def audit(event, arguments):
    if event == "open" or event.startswith(("os.", "shutil.", "subprocess.", "glob.")):
        noted(event, arguments[0] if arguments else "")

def watching(name):
    act = getattr(os, name)
    def watched(path, *args, **options):
        noted(name, path)
        return act(path, *args, **options)
    setattr(os, name, watched)

for name in ("stat", "lstat", "access", "readlink", "statvfs"):  # which have no audit event
    watching(name)
sys.addaudithook(audit)
train_step = training.train_step

def counted(*args):
    global step
    step = args[-1] + 1
    return train_step(*args)

def write():
    with open(sys.argv[1] + f".calls-{os.environ['RANK']}", "w") as file:
        json.dump([call for call in calls if call[0] < int(os.environ["LAST_STEP"])], file)

training.train_step = counted
training.dist.stop = lambda stop=training.dist.stop: (stop(), write())
runpy.run_path("bfsys/train.py", run_name="__main__")
"""
LAST_STEP, LOG_EVERY, FIRST_STEADY = 40, 5, 20  # the last step saves and evaluates


def test_steps_do_without_the_file_system(config_file: Path, run_ranks, monkeypatch) -> None:
    """A shard is opened once. Later steps access no file. A log line opens metrics.jsonl and
    TensorBoard's file once, on rank 0."""
    monkeypatch.setenv("LAST_STEP", str(LAST_STEP))
    options = [f"train.steps={LAST_STEP}", f"train.log_every={LOG_EVERY}", "train.save_every=1000"]
    assert_success(run_ranks(2, ["-c", WATCHED_RANK, str(config_file), *options]))
    for rank in range(2):
        calls = json.loads(Path(f"{config_file}.calls-{rank}").read_text())
        shards = Counter(path for _, _, path in calls if path.endswith(".tar"))
        assert len(shards) > 5
        assert set(shards.values()) == {1}
        others = ((step, name, Path(path)) for step, name, path in calls if path not in shards)
        steady = [(step, name, path.name.split(".")[0]) for step, name, path in others if step >= FIRST_STEADY]
        lines = range(FIRST_STEADY, LAST_STEP, LOG_EVERY) if rank == 0 else ()
        assert steady == [(step, "open", name) for step in lines for name in ("metrics", "events")]


def test_a_rank_does_not_import_what_it_does_not_need() -> None:
    """Rank 0 imports TensorBoard and its dependencies only when it opens TensorBoard's files."""
    code = "import sys, bfsys.train, bfsys.engine; bfsys.engine.import_deepspeed(); print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    modules = set(imported.stdout.split())
    assert {"torch", "deepspeed.runtime.zero.muon.muon_optimizer"} <= modules
    unneeded = {"tensorboard", "PIL", "botocore", "matplotlib", "torchvision", "onnx", "submitit", "fastapi"}
    assert not modules & {*unneeded, "torch._dynamo", "torch._inductor.compile_fx", "networkx", "sympy"}

"""Checkpoints: they are written in the background, verified or skipped, kept, listed and removed."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from bfsys.checkpoint import files, loading, saving
from bfsys.checkpoint.retention import RetentionPolicy
from bfsys.cli import call
from bfsys.dist import AgreedError, Ranks
from bfsys.errors import EXIT_CRASHED, EXIT_STORAGE, UserError
from bfsys.launch.restart_policy import newest_step

ALONE = Ranks()
FACTS = {"metrics": None, "guard": None, "classes": ["x"], "versions": {}, "config": {}, "plan": {}}


class Tensors:
    """Replaces an engine: two states of three parameters."""

    device = torch.device("cpu")

    def __init__(self, seed: int, size: int = 1000) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.values = {
            state: {
                "w": torch.randn(size, 7, generator=generator),
                "b": torch.randn(5, generator=generator),
                "scalar": torch.randn((), generator=generator),
            }
            for state in ("weight", "exp_avg")
        }
        self.steps: tuple[int, int] | None = None

    def state_names(self) -> tuple[str, ...]:
        return tuple(self.values)

    def parameter_shapes(self, state: str) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.values[state].items()}

    def read_pieces(self, state: str) -> Iterator[tuple[str, int, Tensor]]:
        return ((name, 0, tensor) for name, tensor in self.values[state].items())

    def write_state(self, state: str, values) -> None:
        for name in self.values[state]:
            self.values[state][name] = values[name]

    def set_step(self, step: int, updates: int) -> None:
        self.steps = step, updates


def save(run: Path, step: int, source: Tensors | None = None, keep: RetentionPolicy | None = None) -> Path:
    facts = {"step": step, "updates": step, **FACTS}
    return saving.save(source or Tensors(step), run, facts, ranks=ALONE, keep=keep or RetentionPolicy(100))


def same(one: Tensors, other: Tensors) -> bool:
    return all(torch.equal(one.values[s][n], other.values[s][n]) for s in one.values for n in one.values[s])


def resume(run: Path) -> tuple[Tensors, Path, list[str]]:
    said: list[str] = []
    engine = Tensors(-1)
    manifest = loading.resume(engine, run, ALONE, said.append)
    assert engine.steps == (manifest["step"], manifest["updates"])
    return engine, files.checkpoints_dir(run) / files.checkpoint_name(manifest["step"]), said


def test_a_saved_checkpoint_is_restored(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\n')
    path = save(tmp_path, 3)
    assert same(Tensors(3), resume(tmp_path)[0])
    assert torch.equal(load_file(path / "weight-0-of-1.safetensors")["w"], Tensors(3).values["weight"]["w"])
    assert (path / "metrics.jsonl").read_text() == '{"kind": "train"}\n'
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000003\n"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")] == []
    (tmp_path / "metrics.jsonl").unlink()  # the history is restored too
    resume(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"kind": "train"}\n'


def test_training_may_continue_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The checkpoint has the state at `start`, although it changes afterwards. The memory is reused."""
    saver, source = saving.Saver(tmp_path, ALONE, RetentionPolicy(100)), Tensors(1)
    for step in (1, 2):
        expected = Tensors(0)
        expected.values = {s: {n: t.clone() for n, t in source.values[s].items()} for s in source.values}
        saver.start(source, {"step": step, "updates": step, **FACTS})
        for state in source.values.values():
            for tensor in state.values():
                tensor.add_(1)
        saver.finish()
        assert not saver.under_way
        assert same(resume(tmp_path)[0], expected)


DAMAGE_SEED = 7


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path, how: str) -> None:
    """After each of 50 bit flips and 20 truncations in the newest checkpoint, a resume uses the previous one."""
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n' * 20)
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    rng = random.Random(DAMAGE_SEED)
    for _ in range(50 if how == "flip" else 20):
        file = rng.choice(sorted(newest.iterdir()))
        whole = file.read_bytes()
        if how == "flip":
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        else:
            damaged = whole[: rng.randrange(len(whole))]
        file.write_bytes(damaged)
        assert files.find_newest(tmp_path)[0].name == "step_00000001"
        engine, path, said = resume(tmp_path)
        assert path.name == "step_00000001"
        assert same(engine, Tensors(1))
        assert len(said) == 1
        assert str(newest) in said[0]
        aside = newest.with_name("damaged_step_00000002")  # it is renamed, not deleted
        assert newest_step(tmp_path) == 1
        assert (aside / file.name).read_bytes() == bytes(damaged)
        aside.rename(newest)
        file.write_bytes(whole)
    assert same(resume(tmp_path)[0], Tensors(2))


def test_without_a_whole_checkpoint_nothing_is_resumed(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "weight-0-of-1.safetensors").unlink()
    with pytest.raises(AgreedError, match="no intact checkpoint"):
        resume(tmp_path)


@pytest.mark.parametrize("moment", ["copied", "half written", "written", "manifest", "renamed", "latest"])
def test_a_save_that_is_cut_short_leaves_the_one_before(tmp_path: Path, moment: str, monkeypatch) -> None:
    """The process ends at some point of a save. The next save handles its remains."""
    save(tmp_path, 1)

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    saver = saving.Saver(tmp_path, ALONE, RetentionPolicy(100))
    if moment == "manifest":
        monkeypatch.setattr(files, "replace_file", killed)
    elif moment == "renamed":
        monkeypatch.setattr(files, "sync_folder", lambda path: killed() if path.name == "checkpoints" else None)
    elif moment == "latest":
        replace_file = files.replace_file
        monkeypatch.setattr(files, "replace_file", lambda p, t: killed() if p.name == "latest" else replace_file(p, t))
    if moment == "copied":
        monkeypatch.setattr(saving, "_start_writer", killed)
    try:
        saver.start(Tensors(2), {"step": 2, "updates": 2, **FACTS})
        if moment == "half written":
            saver.close()
            raise Killed
        while saver.is_writing():
            time.sleep(0.01)
        if moment != "written":
            saver.finish()
    except Killed:
        pass
    else:
        assert moment == "written"
    monkeypatch.undo()
    counts = moment in ("renamed", "latest")  # after the rename, the new one counts
    assert same(resume(tmp_path)[0], Tensors(2 if counts else 1))
    save(tmp_path, 2)
    assert same(resume(tmp_path)[0], Tensors(2))
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_writer_that_dies_ends_the_run_as_a_crash(tmp_path: Path) -> None:
    save(tmp_path, 1)
    os.mkfifo(tmp_path / "pipe")  # nobody writes to it, so the writer waits
    saver = saving.Saver(tmp_path, ALONE, RetentionPolicy(100), history=("pipe",))
    saver.start(Tensors(2), {"step": 2, "updates": 2, **FACTS})
    saver._process.send_signal(signal.SIGKILL)
    with pytest.raises(AgreedError, match="the writing process ended with code 137: SIGKILL killed it") as error:
        saver.finish()
    assert not list((tmp_path / "checkpoints").glob(".*"))  # a full disk needs the space
    assert error.value.exit_code == EXIT_CRASHED  # a launcher restarts the run
    assert same(resume(tmp_path)[0], Tensors(1))


def test_a_writer_that_cannot_start_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    save(tmp_path, 1)
    with monkeypatch.context() as limited:
        limited.setattr(saving, "start_child", fail)
        with pytest.raises(UserError, match=r"writes checkpoints cannot be started: Resource temp.*ulimit -u") as error:
            save(tmp_path, 2)
        assert error.value.exit_code == EXIT_CRASHED  # a launcher restarts the run
    monkeypatch.setattr(sys, "executable", "/missing/python")
    with pytest.raises(UserError, match="cannot be started: /missing/python: No such file or directory; repair that"):
        save(tmp_path, 2)
    assert same(resume(tmp_path)[0], Tensors(1))


def test_a_missing_folder_is_reported_and_the_earlier_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    start_writer = saving._start_writer

    def start_without_a_folder(work: Path, *task: object) -> subprocess.Popen:
        work.rmdir()
        return start_writer(work, *task)

    monkeypatch.setattr(saving, "_start_writer", start_without_a_folder)
    saver = saving.Saver(tmp_path, ALONE, RetentionPolicy(100))
    saver.start(Tensors(2), {"step": 2, "updates": 2, **FACTS})
    with pytest.raises(AgreedError, match="cannot be written") as error:
        saver.finish()
    assert error.value.exit_code == EXIT_STORAGE
    assert same(resume(tmp_path)[0], Tensors(1))


def test_a_full_disk_is_reported_and_the_earlier_checkpoint_stays(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("a file system of its own cannot be mounted here")
    try:
        save(small, 1)
        with pytest.raises(AgreedError, match=os.strerror(errno.ENOSPC)) as error:
            save(small, 2, Tensors(2, size=1_000_000))
        assert error.value.exit_code == EXIT_STORAGE
        assert "step_00000002" in str(error.value)
        assert same(resume(small)[0], Tensors(1))
        save(small, 3)  # there is space again, and the remains are removed
    finally:
        subprocess.run(["umount", small], check=True)


@given(
    shapes=st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(1, 4), max_size=2).map(tuple), min_size=1),
    rng=st.randoms(use_true_random=False),
)
def test_pieces_cover_a_state_or_do_not(shapes: dict[str, tuple[int, ...]], rng: random.Random) -> None:
    pieces = []
    for name, shape in shapes.items():
        elements = math.prod(shape)
        cuts = sorted({0, elements, *(rng.randint(0, elements) for _ in range(3))})
        spans = list(itertools.pairwise(cuts))
        pieces += [name] if len(spans) == 1 else [files.piece_name(name, *span) for span in spans]
    rng.shuffle(pieces)
    assert files.cover(pieces, shapes)
    one = rng.choice(pieces)
    assert not files.cover([piece for piece in pieces if piece != one], shapes)
    assert not files.cover([*pieces, one], shapes)
    assert not files.cover([*pieces, "other"], shapes)


@pytest.mark.parametrize("older", [True, False], ids=["an older one on the disk", "the only one on the disk"])
def test_an_older_copy_takes_the_place_of_a_damaged_checkpoint(tmp_path: Path, older: bool) -> None:
    """The store has fewer checkpoints than the disk, and none of the damaged step."""
    run, there = tmp_path / "run", tmp_path / "store"
    for step in (3, 6) if older else (6,):
        path = save(run, step)
    (path / "weight-0-of-1.safetensors").write_bytes(b"")
    copy = save(there, 5)
    asked = []

    def fetch(damaged: Path, after: int) -> Path | None:
        asked.append((damaged.name, after))
        return copy.rename(damaged.with_name(copy.name))

    engine = Tensors(-1)
    assert loading.resume(engine, run, ALONE, lambda _: None, fetch)["step"] == 5
    assert same(engine, Tensors(5))
    assert asked == [("step_00000006", 3 if older else -1)]
    left = sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
    assert left == ["damaged_step_00000006", *["step_00000003"] * older, "step_00000005"]


def test_checkpoints_on_a_disk_that_is_not_mounted_are_not_missing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "scratch")
    with pytest.raises(files.Unreachable, match=f"links to {tmp_path}/scratch, which does not exist") as error:
        files.all_checkpoints(tmp_path)
    assert error.value.exit_code == EXIT_CRASHED
    (tmp_path / "scratch").mkdir()
    assert files.all_checkpoints(tmp_path) == []
    other = tmp_path / "other"
    other.mkdir()
    (other / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints: is not a folder"):
        files.all_checkpoints(other)


def test_a_checkpoint_of_another_format_is_not_damaged(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    manifest = files.read_manifest(path)
    manifest["format"] = 3
    manifest["sha256"] = files.fingerprint(manifest)
    (path / files.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has format 3, and this version of bfsys reads 2") as error:
        files.manifest_or_problems(path)
    assert not isinstance(error.value, files.Damaged)


def test_a_dangling_link_does_not_stop_a_save(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000003").symlink_to(tmp_path / "nowhere")
    assert files.problems_of(save(tmp_path, 3)) == []


def test_the_command_lists_verifies_and_shows(finished_run: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    assert call("checkpoint", ["list", str(copy)]) == 0
    listed = capsys.readouterr().out
    assert "       60  " in listed
    assert "loss" in listed.splitlines()[-1]
    assert call("checkpoint", ["verify", str(copy)]) == 0
    assert capsys.readouterr().out.count(": intact") == 3
    assert call("checkpoint", ["show", str(copy)]) == 0
    assert "exp_avg_sq" in capsys.readouterr().out

    file = copy / "checkpoints" / "step_00000060" / "exp_avg-0-of-1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert call("checkpoint", ["verify", str(copy)]) == 1
    captured = capsys.readouterr()
    assert "step_00000060: damaged" in captured.out
    assert "step_00000120: intact" in captured.out
    assert str(file) in captured.err
    assert call("checkpoint", ["verify", str(copy / "checkpoints" / "step_00000120")]) == 0
    file.write_bytes(content[:-1])
    assert call("checkpoint", ["list", str(copy)]) == 0
    (listed,) = (line for line in capsys.readouterr().out.splitlines() if "damaged" in line)
    assert listed.endswith(f"damaged: {file.name} has {len(content) - 1:,} of {len(content):,} bytes")
    with pytest.raises(UserError, match="no such directory"):
        call("checkpoint", ["list", str(tmp_path / "nowhere")])


def test_the_newest_checkpoint_that_can_be_read_is_shown(finished_run: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "run\x1b[31m"
    shutil.copytree(finished_run, copy)
    (copy / "checkpoints" / "step_00000120" / "manifest.json").write_text("{}")
    assert call("checkpoint", ["show", str(copy)]) == 0
    captured = capsys.readouterr()
    assert "step      60" in captured.out
    assert "skipped a damaged checkpoint: " in captured.err
    assert "\x1b" not in captured.out + captured.err


def test_a_limit_on_the_size_of_files_is_named() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(
            UserError, match=r"File too large; raise the limit on the size of files \(ulimit -f\)"
        ) as error:
            saving.HostMemory(1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert error.value.exit_code == EXIT_STORAGE


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "no file", "no manifest", "a pipe", "bad manifest", "other step", "a list"]
)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(finished_run: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    newest, problems = files.find_newest(copy)
    assert (newest.name, problems) == ("step_00000120", [])
    file = newest / "ema-0-of-1.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage in ("no file", "no manifest"):
        (file if damage == "no file" else newest / "manifest.json").unlink()
    elif damage == "a pipe":
        os.mkfifo(copy / "pipe")
        os.replace(copy / "pipe", newest / "manifest.json")
    elif damage == "other step":  # one changed digit
        text = (newest / "manifest.json").read_text()
        (newest / "manifest.json").write_text(text.replace('"step": 120', '"step": 121'))
    else:
        (newest / "manifest.json").write_text("{" if damage == "bad manifest" else "[]")
    found, problems = files.find_newest(copy)
    assert found.name == "step_00000060"
    assert len(problems) == 1
    assert str(newest) in problems[0]
    assert loading.load_model(copy)[2]["step"] == 60


def test_a_backup_beside_the_checkpoints_is_ignored(finished_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    shutil.copytree(copy / "checkpoints" / "step_00000060", copy / "checkpoints" / "step_00000060.bak")
    assert files.find_newest(copy)[0].name == "step_00000120"


def test_errors_about_missing_runs_name_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / files.EXPORTED).touch()
    for name, told in (
        ("missing", "no such directory; give a run directory"),
        ("empty", "holds no checkpoint; is it a run directory"),
        ("runs", f"holds no checkpoint; give a run in it, for example {tmp_path}/runs/mine"),
        ("file", "a file; give a run directory"),
        ("export", "is an export; give the run from which it was exported"),
    ):
        with pytest.raises(UserError, match=told):
            loading.load_model(tmp_path / name)
        with pytest.raises(UserError, match=told):
            call("checkpoint", ["show", str(tmp_path / name)])

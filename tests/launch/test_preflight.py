"""The checks of the SLURM launcher before a job is queued. Small scripts take the place of SLURM."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bfsys.config import load_config
from bfsys.launch import preflight, slurm_commands
from tests.data.packed import pack
from tests.test_train import newest


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90), ("30:00", 30), ("0:30", 1), ("1:30:00", 90), ("0:00:01", 1), ("2-00", 2880), ("1-12:30", 2190),
        ("2-00:00:00", 2880), ("0", None), ("1:70:00", None), ("1h", None), ("infinite", None), ("", None),
    ],
)  # fmt: skip
def test_time_limits(text: str, minutes: int | None) -> None:
    assert preflight.parse_minutes(text) == minutes


def test_a_good_run_has_no_problems(config_file: Path) -> None:
    checked = preflight.check_run(load_config(config_file), 2, on_gpu=False)
    assert not checked.problems
    assert "each of 2 ranks needs" in checked.notes[-1]
    assert preflight.CHECK_FIRST not in checked.notes
    assert preflight.CHECK_FIRST in preflight.check_run(load_config(config_file), 2, on_gpu=True).notes
    assert not preflight.check_run(load_config(config_file), 3, on_gpu=False).notes  # three ranks do not fit


def test_peculiarities_of_the_data_are_noted(config_file: Path, tmp_path: Path) -> None:
    twins = pack(tmp_path, "twins", {"train": [[(0, b"same" * 20), (1, b"same" * 20)]]})
    config = load_config(config_file, [f"data.sources.0.path={twins}", "data.workers=5000"])
    notes = preflight.check_run(config, 1, on_gpu=False).notes
    assert "2 training files are byte-identical to training files of another class" in notes
    assert not any("loader processes" in note for note in notes), "the job runs on another machine"


def test_missing_and_cut_shards_are_named(config_file: Path, datasets: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a"
    subprocess.run(["cp", "-r", datasets / "a", copy], check=True)
    gone, cut, *_ = sorted(copy.glob("a-train-*.tar"))
    gone.unlink()
    os.truncate(cut, cut.stat().st_size - 512)
    problems = preflight.check_run(load_config(config_file, [f"data.sources.0.path={copy}"]), 1, on_gpu=False).problems
    assert problems[0].startswith(f"{gone}: the shard is missing")
    assert problems[1].startswith(f"{cut}: has {cut.stat().st_size:,} bytes, but")


def test_another_run_in_the_directory_is_found_before_it_waits(finished_run: Path) -> None:
    config = load_config(finished_run / "config.yaml")
    assert not preflight.check_run(config, 1, on_gpu=False).problems
    changed = load_config(finished_run / "config.yaml", ["model.dim=32"])
    problems = preflight.check_run(changed, 1, on_gpu=False).problems
    assert f"{newest(finished_run)}: model: dim was 16, is now 32" in problems


def test_weights_to_start_from_are_checked(config_file: Path, finished_run: Path) -> None:
    start = f"train.init_from={finished_run}"
    assert f"starting from the averaged weights of {newest(finished_run)}" in "\n".join(
        preflight.check_run(load_config(config_file, [start]), 1, on_gpu=False).notes
    )
    problems = preflight.check_run(load_config(config_file, [start, "model.dim=32"]), 1, on_gpu=False).problems
    assert "dim is 16 there and 32 here" in problems[0]


def test_a_run_directory_below_a_file_is_rejected(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = load_config(config_file, [f"runs_dir={tmp_path}/file/runs"])
    assert preflight.check_run(config, 1, on_gpu=False).problems == [
        f"run directory {tmp_path}/file/runs/tiny: {tmp_path}/file is not a directory",
    ]


def test_file_systems_of_this_machine_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = {Path("/"): "ext4", Path("/dev/shm"): "tmpfs", Path("/home"): "nfs4", Path("/home/fast"): "xfs"}
    monkeypatch.setattr(preflight, "_mounts", lambda: mounts)
    monkeypatch.setattr(preflight.sys, "base_prefix", "/dev/shm/python")  # every node may have an equal copy
    checked = preflight.check_places([
        ("run directory", Path("/home/me/runs/x")), ("data", Path("/dev/shm/data")), ("current folder", Path("/srv")),
    ])  # fmt: skip
    assert checked.problems == [
        "data /dev/shm/data: is on tmpfs, which other machines cannot see; use a shared file system"
    ]
    assert checked.notes == [
        "Python: on tmpfs; make sure that the nodes can see it",
        "current folder: on ext4; make sure that the nodes can see it",
    ]


def test_mounts_of_this_machine_are_read() -> None:
    assert preflight._mounts()[Path("/proc")] == "proc"


def test_mounts_of_any_name_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "self" / "mounts"
    mounts.parent.mkdir()
    mounts.write_bytes("nas:/a /données\\040brutes nfs4 rw 0 0\n".encode() + b"nas:/b /\xe9t\\134 lustre rw 0 0\n")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    assert preflight._mounts() == {Path("/données brutes"): "nfs4", Path("/\udce9t\\"): "lustre"}


@pytest.fixture
def slurm_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`slurm_says(sbatch, sinfo)` replaces them by shell commands."""

    def say(sbatch: str, sinfo: str) -> None:
        for name, script in (("sbatch", sbatch), ("sinfo", sinfo)):
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return say


PARTITIONS = """cat <<END
long infinite 4 idle
batch* 1-00:00:00 2 mix
batch* 1-00:00:00 1 drain
short 30:00 4 idle
END"""


def test_slurm_is_asked_with_the_script(slurm_says, tmp_path: Path) -> None:
    said = "sbatch: Job 8 to start at 2026-11-21T18:10:13 using 2 processors on nodes n[1-2] in partition batch"
    slurm_says(f'[ "$1" = --test-only ] && cat "$2" > {tmp_path}/seen && echo "{said}" >&2', PARTITIONS)
    checked = preflight.check_slurm("#!/bin/bash\n#SBATCH x\n", None, 2, 60)
    assert (tmp_path / "seen").read_text() == "#!/bin/bash\n#SBATCH x\n"
    assert checked == preflight.Checked([], ["SLURM would start it at 2026-11-21 18:10:13 in partition batch"])


@pytest.mark.parametrize(
    ("partition", "minutes", "limit"),
    [(None, 1440, None), (None, 1441, 1440), ("short", 31, 30), ("long", 10**6, None), ("unknown", 10**6, None)],
)
def test_a_time_limit_beyond_the_partitions_is_found(slurm_says, partition, minutes, limit) -> None:
    slurm_says("exit 0", PARTITIONS)
    problems = preflight.check_slurm("", partition, 2, minutes).problems
    assert [problem.partition(". ")[0] for problem in problems] == (
        [f"--time: got {minutes} minutes; partition {partition or 'batch'} allows {limit}"] if limit else []
    )


def test_a_users_choice_of_shown_partitions_and_times_does_not_count(slurm_says, monkeypatch) -> None:
    monkeypatch.setenv("SINFO_PARTITION", "short")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    slurm_says("exit 0", f'[ -z "$SINFO_PARTITION$SLURM_TIME_FORMAT" ] && {PARTITIONS}')
    (problem,) = preflight.check_slurm("", None, 2, 1441).problems
    assert "partition batch allows 1440" in problem


def test_the_name_of_a_cluster_is_not_a_partition(slurm_says) -> None:
    """With SLURM_CLUSTERS, sinfo prints it in spite of --noheader. A site's wrapper may print a line of its own."""
    slurm_says("exit 0", PARTITIONS.replace("<<END", "<<END\nCLUSTER: alpha\nWelcome to cluster alpha"))
    (problem,) = preflight.check_slurm("", None, 2, 1441).problems
    assert "partition batch allows 1440" in problem


def test_a_refusal_by_slurm_is_one_sentence(slurm_says) -> None:
    slurm_says("echo 'sbatch: error: invalid partition' >&2; echo 'allocation failure: x' >&2; exit 1", "exit 1")
    (problem,) = preflight.check_slurm("", "nope", 2, 60).problems
    assert problem.endswith("SLURM would refuse the job: invalid partition; allocation failure: x")


def test_nodes_that_are_away_for_now_are_waited_for(slurm_says) -> None:
    slurm_says(f"echo 'allocation failure: {preflight.NOT_NOW}' >&2; exit 1", PARTITIONS)
    checked = preflight.check_slurm("", None, 3, 60)
    assert not checked.problems
    assert "could not start the job with the nodes that are up" in checked.notes[0]
    assert preflight.check_slurm("", None, 4, 60).problems  # the partition has three nodes
    assert preflight.check_slurm("", "long", 3, 60).problems  # all nodes are up, so the error has another reason


def test_a_reservation_that_begins_within_the_time_limit_is_waited_for(slurm_says) -> None:
    refusal = f"echo 'allocation failure: {preflight.NOT_NOW}' >&2; exit 1"
    slurm_says(f'[ "$2" = --time=1 ] && exit; {refusal}', PARTITIONS)
    checked = preflight.check_slurm("", "long", 3, 60)
    assert not checked.problems
    assert "cannot end the job before nodes are reserved" in checked.notes[0]


def test_a_qos_may_allow_more_time(slurm_says) -> None:
    slurm_says("exit 0", PARTITIONS)
    checked = preflight.check_slurm("", None, 2, 1441, qos="long")
    assert not checked.problems
    assert "partition batch allows 1440" in checked.notes[0]


def test_a_controller_that_does_not_answer_is_reported(slurm_says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_commands, "LIMIT_S", 0.2)
    slurm_says("exec sleep 5", "exit 1")
    assert "no answer within" in preflight.check_slurm("", None, 2, 60).problems[0]
    monkeypatch.undo()
    slurm_says("echo 'allocation failure: Socket timed out on send/recv operation' >&2; exit 1", "exit 1")
    (problem,) = preflight.check_slurm("", None, 2, 60).problems
    assert problem == (
        "sbatch --test-only: SLURM does not answer: allocation failure: Socket timed out on send/recv operation; "
        "is the controller up? See sinfo"
    )

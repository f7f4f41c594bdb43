"""Pre-flight checks of a job before it is queued: data, run directory, file systems, SLURM.

They take seconds on a login node and need no GPU. Each check yields its problems; no check stops the others.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from bfsys import plan_run
from bfsys.checkpoint.files import all_checkpoints
from bfsys.config import Config
from bfsys.data.streaming.datasets import Sources
from bfsys.data.streaming.run_data import open_run_data
from bfsys.dist import Ranks
from bfsys.dryrun import check_copies, notes_on_start
from bfsys.errors import collecting
from bfsys.files import exists, is_dir
from bfsys.launch.slurm_commands import IS_IT_UP, ask
from bfsys.launch.slurm_options import parse_minutes
from bfsys.locations import is_remote

# Kinds of file systems, as the kernel names them. Others, such as ext4, may be exported to the nodes.
OF_THIS_MACHINE = {"tmpfs", "ramfs", "devtmpfs"}
SHARED = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "panfs", "pvfs2", "orangefs", "afs", "cifs",
          "smb3", "9p", "virtiofs"}  # fmt: skip
NOT_NOW = "Requested node configuration is not available"
CHECK_FIRST = "on a cluster that is new to you, check GPUs and network with `bfsys check-gpu` first (docs/slurm.md)"


@dataclass(frozen=True)
class Checked:
    problems: list[str]
    notes: list[str]

    def add(self, other: Checked) -> None:
        self.problems.extend(other.problems)
        self.notes.extend(other.notes)


def check_run(config: Config, ranks: int, *, on_gpu: bool) -> Checked:
    """Check data and run directory for everything that would end the job in its first minute. Notes say what a rank
    will need."""
    problems, notes = list(_writable(config.run_dir)), []
    with collecting(problems):
        notes += check_copies(config)
    with collecting(problems):
        data = open_run_data(config, Ranks())
        problems += missing_shards(data.training) + missing_shards(data.validation)
        notes += data.notes_on_content + notes_on_start(data)
        if on_gpu and not all_checkpoints(config.run_dir):
            notes.append(CHECK_FIRST)
        if config.data.lanes % ranks == 0:  # the caller reports numbers that do not fit
            notes.append(f"{config.name}: {plan_run.estimate(data, ranks, on_gpu=on_gpu).describe()}")
    return Checked(problems, notes)


def missing_shards(sources: Sources) -> list[str]:
    """Report local shards that are missing, or whose size differs from dataset.json."""
    problems = []
    for split in sources.splits:
        if is_remote(split.dataset.location):
            continue
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(split.path)}
        for shard in split.shards:
            size = sizes.get(shard.file)
            if size is None:
                problems.append(f"{split.path / shard.file}: the shard is missing; it holds {shard.samples} samples")
            elif size != shard.bytes:
                problems.append(f"{split.path / shard.file}: has {size:,} bytes, but {shard.bytes:,} by dataset.json")
    return problems


def _writable(run_dir: Path) -> Iterator[str]:
    place = run_dir.absolute()
    while not exists(place):
        place = place.parent
    if not is_dir(place):
        yield f"run directory {run_dir}: {place} is not a directory"
    elif not os.access(place, os.W_OK | os.X_OK):
        yield f"run directory {run_dir}: you have no permission to write to {place}; choose another with runs_dir=…"
    elif (free := os.statvfs(place)).f_bavail * free.f_frsize < 2**30 or (free.f_files and not free.f_favail):
        yield f"run directory {run_dir}: its disk has less than 1 GiB or no inode free; choose another with runs_dir=…"


def check_places(places: Sequence[tuple[str, Path]]) -> Checked:
    """Check that the nodes can see some places, each of which has a description."""
    problems, mounts = [], _mounts()
    # Each node may have its own copy of Python, even in memory.
    unsure = {_file_system(Path(sys.base_prefix), mounts): ["Python"]}
    for what, path in places:
        kind = _file_system(path, mounts)
        if kind in OF_THIS_MACHINE:
            problems.append(f"{what} {path}: is on {kind}, which other machines cannot see; use a shared file system")
        elif kind not in SHARED and not kind.startswith("fuse"):
            unsure.setdefault(kind, []).append(what)
    notes = [
        f"{', '.join(dict.fromkeys(whats))}: on {kind}; make sure that the nodes can see it"
        for kind, whats in unsure.items()
        if kind not in SHARED
    ]
    return Checked(problems, notes)


def _mounts() -> dict[Path, str]:
    """File system kinds by mount point. Later mounts hide earlier ones."""
    return {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}


def _file_system(path: Path, mounts: dict[Path, str]) -> str:
    path = path.resolve()
    return next((mounts[place] for place in (path, *path.parents) if place in mounts), "unknown")


def check_slurm(script: str, partition: str | None, nodes: int, minutes: int, qos: str | None = None) -> Checked:
    """Ask SLURM whether it would accept the script, and when the job would start."""
    problems: list[str] = []
    notes: list[str] = []
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        answer = ask("sbatch", "--test-only", file.name)
        # A job of one minute ends before a reservation of its nodes begins, such as one for maintenance.
        is_reserved = NOT_NOW in answer.errors and ask("sbatch", "--test-only", "--time=1", file.name).is_good
    said = [re.sub(r"^sbatch: (error: )?", "", line) for line in answer.errors.splitlines() if line.strip()]
    if answer.is_none:
        return Checked([f"sbatch --test-only: SLURM does not answer: {'; '.join(said)}; {IS_IT_UP}"], [])
    limits = _partitions()
    if starts := re.search(r"to start at (\S+) .* in partition (\S+)", answer.errors):
        notes.append(f"SLURM would start it at {starts[1].replace('T', ' ')} in partition {starts[2]}")
        partition = starts[2]
    partition = partition or next((name for name, limit in limits.items() if limit.is_default), "")
    limit = limits.get(partition)
    if answer.code:
        # --test-only does not count nodes that are down or drained, but a real job would wait for them.
        is_passing = NOT_NOW in answer.errors and limit is not None and nodes <= limit.nodes and limit.away
        found = notes if is_passing or is_reserved else problems
        what = "SLURM would refuse the job"
        if is_reserved:
            what = (
                "SLURM cannot end the job before nodes are reserved, so it may wait; a shorter --time may start earlier"
            )
        elif is_passing:
            what = "SLURM could not start the job with the nodes that are up"
        found.append(f"sbatch --test-only: {what}: {'; '.join(said)}")
    # Without EnforcePartLimits, SLURM accepts a job above the limit, and it waits forever.
    if limit and limit.minutes and minutes > limit.minutes:
        (notes if qos else problems).append(  # a QOS may allow more
            f"--time: got {minutes} minutes; partition {partition} allows {limit.minutes}. A job that runs out of time "
            f"saves and is requeued, so a short limit costs a restart, not work"
        )
    return Checked(problems, notes)


@dataclass(frozen=True)
class Partition:
    is_default: bool = False
    minutes: int | None = None
    """The time limit of a job in minutes; None means no limit."""
    nodes: int = 0
    away: int = 0
    """The number of these nodes that are down or drained."""


def _partitions() -> dict[str, Partition]:
    """The partitions by name; none if SLURM does not answer."""
    answer = ask("sinfo", "--noheader", "--format=%P %l %D %t")
    partitions: dict[str, Partition] = {}
    for line in answer.output.splitlines() if answer.is_good else ():  # one line for each node state
        if len(fields := line.split()) != 4 or not fields[2].isdecimal():
            continue  # the name of a cluster, with SLURM_CLUSTERS, or a line of the site
        name, limit, number, state = fields
        before = partitions.get(name.rstrip("*"), Partition())
        is_away = state.rstrip("*~#!%$@^-").startswith(("down", "drain", "drng", "fail", "maint", "boot", "resv"))
        partitions[name.rstrip("*")] = Partition(
            is_default=name.endswith("*"),
            minutes=parse_minutes(limit),
            nodes=before.nodes + int(number),
            away=before.away + int(number) * is_away,
        )
    return partitions

"""Benchmark of the load of a run on a shared file system: calls with a file name, by rank, phase and place.

    python tools/bench/bench_files.py --ranks 1 2 4
    python tools/bench/bench_files.py --ranks 2 --launch --list

It trains a tiny model under strace, and counts the calls that name a file (open, stat, readlink, rename, …) and the
fsyncs of every rank and its child processes. Each rank is a separate program, as with torchrun and srun. With --launch,
`bfsys launch` forks the ranks. A phase begins at a mark that this program puts into the trace: a call with the name of
a file that does not exist. All files that the benchmark makes are removed.
"""

import argparse
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from bfsys.start import let_signals_end_the_process

    let_signals_end_the_process()

from bfsys.errors import UserError, run_command, summary_of
from bfsys.launch.job import free_port, rank_variables
from tools.bench.command import at_least

ROOT = Path(__file__).resolve().parents[2]
MARK = "/bfsys-phase/"
STEPS, SAVE_EVERY, LOG_EVERY, EVAL_EVERY = 21, 10, 5, 7
PHASES = ("start", "resume", "step", "log line", "save", "evaluation", "end")
TIMES = {"step": STEPS, "log line": 5, "save": 3, "evaluation": 3}
PLACES = ("packages", "checkout", "datasets", "run directory", "system")
CALL = re.compile(r"^(\d+\.\d+) (\w+)\((.*)\) += (-?\d+|\?)(?:.*?(E[A-Z]+))?")
NAME = re.compile(r'(?:AT_FDCWD<([^>]*)>, |(?:\d+)<([^>]*)>, )?"([^"]*)"')
SYNCS = ("fsync", "fdatasync")
FORKS = ("clone", "clone3", "fork", "vfork")
LIMIT_S = 900


class Call(NamedTuple):
    at: float
    process: int
    name: str
    path: str
    result: int


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=summary_of(__doc__))
    add = parser.add_argument
    add(
        "--ranks", type=at_least(1), nargs="+", default=[1, 2, 4], metavar="N", help="numbers of ranks (default: 1 2 4)"
    )
    add("--launch", action="store_true", help="start the ranks by bfsys launch instead of as programs")
    add("--list", action="store_true", help="show the names in calls of two ranks, without those of imports")
    add("--packages", type=int, default=0, metavar="N", help="show the N packages with the most calls")
    add("--json", type=Path, metavar="OUT")
    add("--marked", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.marked:
        return run_marked(args.marked) or 0
    if shutil.which("strace") is None:
        raise UserError("strace is not installed; apt install strace")
    results = {}
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory(prefix="bfsys-files-") as folder:
            calls = trace(Path(folder).resolve(), ranks, args.launch)
            results[ranks] = {who: count(of_one, Path(folder).resolve()) for who, of_one in calls.items()}
            for who, table in results[ranks].items():
                show(f"{who} of {ranks}", table)
                show_opened(calls[who], Path(folder).resolve())
            for who in ("rank 0", f"rank {ranks - 1}") if args.list else ():
                show_names(who, calls[who], Path(folder).resolve())
            if args.packages:
                show_packages(calls["rank 0"], args.packages)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def run_marked(command: Sequence[str]) -> int | None:
    """Run `bfsys COMMAND …` with marks in its trace."""
    import bfsys.train as training
    from bfsys.cli import dispatch
    from bfsys.supervision.supervisor import Supervisor

    def marking(act: Callable, before: Callable[..., str], after: str = "") -> Callable:
        def marked(*args: object, **options: object) -> object:
            mark(before(*args))
            result = act(*args, **options)
            if after:
                mark(after)
            return result

        return marked

    training.train_rank = marking(training.train_rank, lambda _, ranks: f"rank/{ranks.rank}", "end")
    training.resume = marking(training.resume, lambda *_: "resume")
    training.train_step = marking(training.train_step, lambda *_: "step")
    training.evaluate_if_due = marking(training.evaluate_if_due, lambda *_: "evaluation")
    Supervisor.save_if_due = marking(Supervisor.save_if_due, lambda *_: "save")  # type: ignore[method-assign]
    Supervisor.end_step = marking(Supervisor.end_step, lambda *_: "log line")  # type: ignore[method-assign]
    Supervisor.end_steps = marking(Supervisor.end_steps, lambda *_: "end")  # type: ignore[method-assign]
    return dispatch(command)


def mark(phase: str) -> None:
    os.path.exists(MARK + phase)


def trace(folder: Path, ranks: int, launch: bool) -> dict[str, list[Call]]:
    """Train, and return the calls of each rank with its children, and those of the launcher."""
    make_datasets(folder / "data")
    config = folder / "tiny.json"  # JSON is YAML
    config.write_text(json.dumps(config_tree(folder)))
    common = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    me = [sys.executable, str(Path(__file__).resolve()), "--marked"]
    port = free_port()
    commands = (
        [([*me, "launch", str(config), "--ranks", str(ranks)], common)]
        if launch
        else [
            ([*me, "train", str(config)],
             {**common, **rank_variables(rank, ranks, rank, ranks, master_addr="127.0.0.1", master_port=port)})
            for rank in range(ranks)
        ]
    )  # fmt: skip
    running = []
    for number, (command, env) in enumerate(commands):
        out = folder / f"trace{number}"
        out.mkdir()
        traced = ["strace", "-f", "-ff", "-y", "-ttt", "-s", "300", "--seccomp-bpf", "-o", str(out / "t"),
                  "-e", f"trace=%file,{','.join((*FORKS, *SYNCS))}", *command]  # fmt: skip
        log = open(folder / f"output{number}", "wb")  # noqa: SIM115
        running.append(subprocess.Popen(traced, cwd=ROOT, env=env, stdout=log, stderr=log))
    try:
        codes = [process.wait(LIMIT_S) for process in running]
    finally:
        for process in running:
            process.kill()
    if any(codes):
        raise UserError(*((folder / f"output{n}").read_text()[-2000:] for n, code in enumerate(codes) if code))
    found: dict[str, list[Call]] = {}
    for number in range(len(commands)):
        found |= by_rank(read_trace(folder / f"trace{number}"))
    return dict(sorted(found.items()))


def make_datasets(root: Path) -> None:
    import numpy as np

    from bfsys.cli import call

    rng = np.random.default_rng(0)
    for split, files in (("train", 40), ("val", 7)):
        for label in "xy":
            tree = root / "tree" / split / label
            tree.mkdir(parents=True)
            for i in range(files):
                (tree / f"{i}.bin").write_bytes(rng.bytes(20 + int(rng.integers(80))))
    call("pack", [str(root / "tree"), str(root), "--name", "a", "--shard-bytes", "20000", "--workers", "1"])


def config_tree(folder: Path) -> dict:
    return {
        "data": {
            "sources": [{"path": str(folder / "data" / "a")}],
            "batch_samples": 8, "lanes": 4, "shuffle_block": 16, "eval_batch_bytes": 500,
        },
        "model": {
            "size": "custom", "dim": 16, "layers": 3, "heads": 2, "kernel": 8, "window": 8, "shift": 4,
            "max_tokens": 64,
        },
        "optim": {"warmup_steps": 2},
        "train": {
            "steps": STEPS, "precision": "fp32", "zero_stage": 1, "log_every": LOG_EVERY,
            "eval_every": EVAL_EVERY, "save_every": SAVE_EVERY,
        },
        "runs_dir": str(folder / "runs"),
        "name": "tiny",
    }  # fmt: skip


def read_trace(folder: Path) -> tuple[list[Call], dict[int, int]]:
    """Return the calls with a file name, in order, and the parent of each process."""
    calls, parents = [], {}
    for file in folder.iterdir():
        process = int(file.suffix[1:])
        with open(file, errors="replace") as lines:
            for line in lines:
                if not (match := CALL.match(line)):
                    continue
                at, name, arguments, result, _ = match.groups()
                if name in FORKS:
                    parents[int(result)] = process
                elif name in SYNCS:
                    synced = re.search(r"<([^>]*)>", arguments)
                    calls.append(Call(float(at), process, name, synced[1] if synced else "", int(result)))
                elif (named := NAME.search(arguments)) and named[3]:  # an empty name means an open file
                    at_cwd, at_folder, path = named.groups()
                    path = os.path.join(at_cwd or at_folder or ROOT, path)
                    calls.append(Call(float(at), process, name, path, -1 if result == "?" else int(result)))
    return sorted(calls), parents


def by_rank(traced: tuple[list[Call], dict[int, int]]) -> dict[str, list[Call]]:
    """Group calls by rank. A process belongs to the rank whose mark it has, or whose mark its nearest ancestor has."""
    calls, parents = traced
    rank_of = {
        call.process: f"rank {call.path.removeprefix(MARK + 'rank/')}"
        for call in calls
        if call.path.startswith(MARK + "rank/")
    }

    def owner(process: int) -> str:
        while process not in rank_of and process in parents:
            process = parents[process]
        return rank_of.get(process, "launcher")

    found = defaultdict(list)
    for call in calls:
        found[owner(call.process)].append(call)
    return found


def place_of(path: str, folder: Path) -> str:
    path = os.path.normpath(path)
    packages = (*site.getsitepackages(), sys.prefix, sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    roots = [(str(folder / "data"), "datasets"), (str(folder / "runs"), "run directory"), (str(folder), "checkout")]
    roots += [(os.path.realpath(p), "packages") for p in packages] + [(p, "packages") for p in packages]
    roots += [(str(ROOT), "checkout")]
    return next((place for root, place in roots if path == root or path.startswith(root + "/")), "system")


def occasions(calls: Sequence[Call], folder: Path) -> Iterator[tuple[str, Call]]:
    """Yield each call with its occasion. A rank's checkpoints are written by programs that it starts."""
    programs = {call.process for call in calls if call.name == "execve"} - {calls[0].process}
    phase, run = "start", str(folder / "runs" / "tiny")
    for call in calls:
        if call.path.startswith(MARK):
            mark = call.path.removeprefix(MARK)
            phase = mark if mark in PHASES else phase
        elif phase in ("start", "resume", "end"):
            yield phase, call
        elif call.process in programs or call.path.startswith(f"{run}/checkpoints"):
            yield "save", call
        elif call.path.startswith((f"{run}/tb/", f"{run}/metrics.jsonl")) and phase not in ("evaluation", "save"):
            yield "log line", call
        else:
            yield phase, call


def count(calls: Sequence[Call], folder: Path) -> dict[str, dict[str, int]]:
    """Calls by occasion and place, and fsyncs."""
    table: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for occasion, call in occasions(calls, folder):
        table[occasion]["fsync" if call.name in SYNCS else place_of(call.path, folder)] += 1
    return {phase: dict(table[phase]) for phase in PHASES if phase in table}


def show(who: str, table: dict[str, dict[str, int]]) -> None:
    """Print a table of the calls for one step, log line, save or evaluation."""
    columns = (*PLACES, "fsync")
    print(f"{f'calls of {who}':20}" + "".join(f"{column:>14}" for column in columns))
    for phase, counts in table.items():
        times = TIMES.get(phase, 1)
        print(f"  {phase:18}" + "".join(f"{counts.get(column, 0) / times:14,.1f}" for column in columns), flush=True)


def show_opened(calls: Sequence[Call], folder: Path) -> None:
    mine = [call for call in calls if place_of(call.path, folder) == "packages"]
    opened = sum(call.name == "openat" and call.result >= 0 for call in mine)
    print(f"  packages: {opened:,} files opened, {len({os.path.normpath(call.path) for call in mine}):,} names")


def show_names(who: str, calls: Sequence[Call], folder: Path) -> None:
    """Print the calls on datasets and in the run directory by occasion: number, name and file."""
    seen: Counter[tuple[str, str, str]] = Counter()
    for occasion, call in occasions(calls, folder):
        if place_of(call.path, folder) in ("datasets", "run directory"):
            seen[occasion, call.name, re.sub(r"\d{4,}", "N", call.path.removeprefix(str(folder)))] += 1
    print(f"calls of {who}:")
    for (occasion, name, path), times in sorted(seen.items()):
        print(f"  {occasion:12} {times:5} x {name:12} {path}")


def show_packages(calls: Sequence[Call], most: int) -> None:
    found: Counter[str] = Counter()
    for call in calls:
        if "site-packages/" in call.path:
            found[call.path.partition("site-packages/")[2].partition("/")[0]] += 1
        elif "/python3" in call.path:
            found["(standard library)"] += 1
        elif call.path.startswith(str(ROOT)):
            found["(checkout) " + call.path.removeprefix(str(ROOT))[:25]] += 1
        else:
            found["(system) " + "/".join(call.path.split("/")[:3])] += 1
    for name, times in found.most_common(most):
        print(f"  {times:7,}  {name}")


if __name__ == "__main__":
    run_command(main)

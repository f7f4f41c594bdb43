"""Benchmark of planning on a rank: start-up, time per step, memory, resume at 90 % of an epoch, shards that nodes read.

    python tools/bench/bench_plan.py
    python tools/bench/bench_plan.py --samples 1000000000 --ranks 1024 --json plan.json

The benchmark makes an index of the given number of samples (log-normal lengths, no shards). It opens, verifies and
plans this index as one rank of a run does, and measures each figure in a separate process. In a large index only the
rows that the rank reads are written; the file is sparse and has its full size. All files that the benchmark makes are
removed.

The fetch amplification is how often a shard is fetched in an epoch, by all nodes together, if each node keeps the
shards that it has fetched. It is counted for the first index with all samples of an epoch, with its number of shards
and with ten times as many. It is also counted for a sampler that deals the shuffled samples to the nodes.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from bfsys.start import let_signals_end_the_process

    let_signals_end_the_process()

import numpy as np
from numpy.lib.format import open_memmap

from bfsys.data.storage.shards import index_digest, length_quantiles, open_split, write_description
from bfsys.data.storage.tars import SAMPLE, Shard
from bfsys.data.streaming.plan import Plan, lanes_of_rank
from bfsys.errors import UserError, run_command, summary_of

SHARD_SAMPLES = 10_000
MEDIAN_BYTES, SIGMA = 12_000, 0.7
KEY_BYTES = 12
MIB = 2**20
# Up to this number of shards, all rows are written; with more, only the rows that are read.
SMALL_SHARDS = 2_000
AMPLIFICATION_LANES = 64


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=summary_of(__doc__))
    add = parser.add_argument
    add("--samples", type=int, action="append", help="samples of the index (default: 1.3 million and 1 billion)")
    add("--ranks", type=int, action="append", help="ranks of the run, for each --samples (default: 8 and 1,024)")
    add("--lanes-per-rank", type=int, default=1)
    add("--batch-samples", type=int, default=12, help="samples per lane and step")
    add("--steps", type=int, default=2000, help="steps that are planned (default: %(default)s)")
    add("--nodes", type=int, default=8, help="nodes that share the lanes; the shards that each fetches are counted")
    add("--json", type=Path, metavar="OUT")
    args = parser.parse_args(arguments)
    args.samples, args.ranks = args.samples or [1_300_000, 10**9], args.ranks or [8, 1024]
    if len(args.samples) != len(args.ranks):
        raise UserError(f"--samples is given {len(args.samples)} times and --ranks {len(args.ranks)} times")
    least = min(*args.ranks, args.lanes_per_rank, args.batch_samples)
    if min(args.samples) < SHARD_SAMPLES or args.steps < 2 or least < 1:
        raise UserError(f"--samples must be {SHARD_SAMPLES:,} or more, --steps 2 or more, and other numbers 1 or more")
    lanes_of_rank(AMPLIFICATION_LANES, 0, args.nodes)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    rows: list[dict] = []
    amplification = []
    for samples, ranks in zip(args.samples, args.ranks, strict=True):
        with tempfile.TemporaryDirectory(prefix="bfsys-plan-") as folder:
            lanes = ranks * args.lanes_per_rank
            run = {"folder": folder, "ranks": ranks, "lanes": lanes, "batch": args.batch_samples * lanes}
            make_index(Path(folder), samples // SHARD_SAMPLES, run)
            row = {"samples": samples, "ranks": ranks, "lanes": lanes, **in_a_process(measure, run, args.steps)}
            for share in (0.0, 0.9):
                row[f"first_batch_at_{share:.0%}_ms"] = in_a_process(first_batch_ms, run, share)
            show(row)
            if not rows:
                for finer in (1, 10):
                    amplification.append(in_a_process(count_fetches, run, finer, args.nodes))
                    show_fetches(amplification[-1])
            rows.append(row)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "fetch_amplification": amplification}, indent=1) + "\n")
    return 0


def make_index(folder: Path, shards: int, run: dict) -> None:
    """Write dataset.json and the index of a dataset without tars."""
    samples = shards * SHARD_SAMPLES
    index = open_memmap(folder / "sim-train.samples.npy", "w+", SAMPLE, (samples,))
    open_memmap(folder / "sim-train.keys.npy", "w+", np.dtype("u1"), (samples * KEY_BYTES,)).flush()
    index["key_end"][-1] = samples * KEY_BYTES
    described = [Shard(f"sim-train-{n:06d}.tar", SHARD_SAMPLES, 200 * MIB, "0" * 64) for n in range(shards)]
    _describe(folder, samples, described)
    for n in range(shards) if shards <= SMALL_SHARDS else _looked_at(folder, run, shards):
        first = n * SHARD_SAMPLES
        part = index[first : first + SHARD_SAMPLES]
        lengths = np.random.default_rng(n).lognormal(np.log(MEDIAN_BYTES), SIGMA, SHARD_SAMPLES).astype(np.int64)
        part["shard"], part["length"], part["offset"][1:] = n, lengths, np.cumsum(lengths[:-1] + 2048)
        part["key_end"] = (np.arange(first, first + SHARD_SAMPLES) + 1) * KEY_BYTES
        if first:
            index["key_end"][first - 1] = first * KEY_BYTES
    index.flush()
    keys = open_memmap(folder / "sim-train.keys.npy", "r")
    proven = set(range(shards) if shards <= SMALL_SHARDS else range(_rank(run), shards, run["ranks"]))
    for n in sorted(proven):
        first = n * SHARD_SAMPLES
        described[n] = replace(described[n], index_xxh3=index_digest(index, keys, first, first + SHARD_SAMPLES))
    _describe(folder, samples, described)


def _rank(run: dict) -> int:
    return run["ranks"] // 2


def _looked_at(folder: Path, run: dict, shards: int) -> list[int]:
    """The shards whose rows the rank verifies, or reads at the start and at 90 % of an epoch."""
    plan = _plan(run)
    steps = [int(share * shards * SHARD_SAMPLES / run["batch"]) for share in (0, 0.9)]
    lanes = lanes_of_rank(run["lanes"], _rank(run), run["ranks"])
    read = {shard for step in steps for lane in lanes for _, shard in plan.shards_ahead(step, lane)}
    return sorted(read | set(range(_rank(run), shards, run["ranks"])))


def _describe(folder: Path, samples: int, shards: list[Shard]) -> None:
    typical = np.random.default_rng(0).lognormal(np.log(MEDIAN_BYTES), SIGMA, 100_000).astype(np.int64)
    part = {
        "samples": samples,
        "bytes": int(samples * typical.mean()),
        "length_quantiles": length_quantiles(typical),
        "class_counts": {"x": samples},
        "index": {role: _index_file(folder / f"sim-train.{role}.npy") for role in ("samples", "keys")},
        "shards": [asdict(shard) for shard in shards],
    }
    write_description(folder, "sim", ["x"], "as_stored", {"tool": "tools/bench/bench_plan.py"}, {"train": part})


def _index_file(path: Path) -> dict:
    return {"name": path.name, "size_bytes": path.stat().st_size, "sha256": "0" * 64}


def _plan(run: dict) -> Plan:
    split = open_split(run["folder"], "train")
    return Plan([split], [1.0], batch_samples=run["batch"], lanes=run["lanes"], shuffle_block=4096, seed=0)


def measure(run: dict, steps: int) -> dict:
    """Measure start-up, steps and memory of the middle rank."""
    before = _memory_mib()
    began = time.perf_counter()
    split = open_split(run["folder"], "train")
    opened = time.perf_counter()
    problems = split.damaged_index(range(_rank(run), len(split.shards), run["ranks"]))
    assert not problems, problems
    proven = time.perf_counter()
    plan = Plan([split], [1.0], batch_samples=run["batch"], lanes=run["lanes"], shuffle_block=4096, seed=0)
    lanes = lanes_of_rank(run["lanes"], _rank(run), run["ranks"])
    plan.micro_batch(0, lanes[0])
    started = time.perf_counter()
    took, over_mean = [], []
    for step in range(1, steps):
        began_step = time.perf_counter()
        batches = [plan.micro_batch(step, lane) for lane in lanes]
        took.append(time.perf_counter() - began_step)
        over_mean.append(sum(map(plan.bytes_of, batches)) / len(batches) / plan.mean_micro_batch_bytes)
    after = _memory_mib()
    return {
        "open_s": opened - began,
        "prove_index_s": proven - opened,
        "start_s": started - began,
        "step_median_us": 1e6 * float(np.median(took)),
        "step_mean_us": 1e6 * float(np.mean(took)),
        "step_max_us": 1e6 * max(took),
        "memory_mib": after["RssAnon"] - before["RssAnon"],
        "mapped_mib": after["RssFile"] - before["RssFile"],
        "index_gb": split.samples.nbytes / 1e9,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def first_batch_ms(run: dict, share: float) -> float:
    """Time from an open split to the first micro-batch after a share of an epoch."""
    plan = _plan(run)
    step = int(share * len(plan.splits[0]) / run["batch"])
    began = time.perf_counter()
    plan.micro_batch(step, lanes_of_rank(run["lanes"], _rank(run), run["ranks"])[0])
    return 1e3 * (time.perf_counter() - began)


def count_fetches(run: dict, finer: int, nodes: int) -> dict:
    """Count the shards that each node reads in the first epoch, if their size is divided by `finer`."""
    split = open_split(run["folder"], "train")
    per_shard = SHARD_SAMPLES // finer
    split = replace(split, shards=(Shard("", per_shard, 0, ""),) * (len(split) // per_shard))
    batch = run["batch"] // run["lanes"] * AMPLIFICATION_LANES
    plan = Plan([split], [1.0], batch_samples=batch, lanes=AMPLIFICATION_LANES, shuffle_block=4096, seed=0)
    by_plan, seen = [], 0
    for node in range(nodes):
        read = np.zeros(len(split.shards), bool)
        for lane in lanes_of_rank(plan.lanes, node, nodes):
            for step in range(-(-len(split) // batch)):
                micro_batch = plan.micro_batch(step, lane)
                samples = micro_batch.sample[micro_batch.epoch == 0]
                read[samples // per_shard] = True
                seen += len(samples)
        by_plan.append(int(read.sum()))
    assert seen == len(split), seen
    dealt = np.array_split(np.random.default_rng(0).permutation(len(split)), nodes)
    by_chance = [len(np.unique(samples // per_shard)) for samples in dealt]
    return {
        "samples": len(split),
        "shards": len(split.shards),
        "lanes": plan.lanes,
        "nodes": nodes,
        "shards_of_node": by_plan,
        "fetch_amplification": sum(by_plan) / len(split.shards),
        "fetch_amplification_of_shuffled_samples": sum(by_chance) / len(split.shards),
    }


def _memory_mib() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}


def in_a_process(act, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(act, arguments)


def show(row: dict) -> None:
    print(f"{row['samples']:,} samples on {row['ranks']:,} ranks, {row['lanes']:,} lanes; one rank:")
    print(f"  start-up {row['start_s']:.3f} s: opening {row['open_s']:.3f}, proving its share of the index "
          f"{row['prove_index_s']:.3f}, first batch the rest")  # fmt: skip
    print(f"  a step: median {row['step_median_us']:.0f} us, mean {row['step_mean_us']:.0f} us (with new blocks), "
          f"max {row['step_max_us'] / 1e3:.1f} ms")  # fmt: skip
    print(f"  first batch at 0 %: {row['first_batch_at_0%_ms']:.1f} ms, at 90 %: {row['first_batch_at_90%_ms']:.1f} ms")
    print(f"  memory: {row['memory_mib']:.0f} MiB of its own, {row['mapped_mib']:.0f} MiB of {row['index_gb']:.2f} GB "
          "of index mapped")  # fmt: skip


def show_fetches(row: dict) -> None:
    fewest, most = min(row["shards_of_node"]), max(row["shards_of_node"])
    print(f"  {row['nodes']} nodes with {row['lanes']} lanes read {fewest:,} to {most:,} of {row['shards']:,} shards "
          f"each in an epoch: every shard is fetched {row['fetch_amplification']:.3f} times, "
          f"{row['fetch_amplification_of_shuffled_samples']:.3f} times if shuffled samples are dealt out")  # fmt: skip


if __name__ == "__main__":
    run_command(main)

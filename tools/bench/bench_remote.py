"""Benchmark of many nodes that train from one remote dataset: requests, bytes, bursts, retries, and the size of caches.

    python tools/bench/bench_remote.py

A web server on loopback serves a dataset of many small shards, and its answers share a total rate. Each rank is a
process with the training loader, and the ranks of a node share a cache. All ranks start together and begin each step
together, as in training. There are three runs. In the first, no answer fails. In the second, a share of the answers
fails (503, connection reset, end in the middle). In the third, the server refuses all requests at first. The batches of
all runs are compared with those of the local dataset. All files that the benchmark makes are removed.

All nodes request the same URLs. A header, from a .curlrc of each rank, tells the server which rank a request is from.
"""

import argparse
import json
import mmap
import multiprocessing
import os
import random
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from bfsys.start import let_signals_end_the_process

    let_signals_end_the_process()

import numpy as np
import webdataset.gopen  # noqa: F401  for all ranks, which are forked
import xxhash

from bfsys.config import Config, Data, Source, Train
from bfsys.data.storage.remote import Cache
from bfsys.data.storage.shards import write_description, write_split
from bfsys.data.storage.tars import Member, write_shard
from bfsys.data.streaming.datasets import fetch_descriptions
from bfsys.data.streaming.loader import training_batches
from bfsys.data.streaming.run_data import open_run_data
from bfsys.errors import UserError, run_command, summary_of
from bfsys.ranks import Ranks
from tools.bench.command import at_least, positive

SHARD_SAMPLES, MEAN_BYTES = 24, 3_600  # of 100 kB with tar's headers
LANE_SAMPLES = 2  # samples of a lane in a step
BLOCKS = 4  # blocks of a lane's slice of an epoch
CHUNK_BYTES = 16 << 10
WINDOW_S = 0.25  # requests after the outage are counted in windows of this length
WATCH_S = 0.2  # interval at which the size of the caches is measured
FAULTS = ("503", "reset", "truncate")
forked = multiprocessing.get_context("fork")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=summary_of(__doc__))
    add = parser.add_argument
    add("--nodes", type=at_least(1), default=64)
    add("--ranks-per-node", type=at_least(1), default=1)
    add("--shards", type=at_least(1), default=256, help="shards of 100 kB; a multiple of the ranks")
    add("--epochs", type=at_least(2), default=3)
    add("--cache-shards", type=at_least(1), default=8, help="size of a node's cache, in shards")
    add("--rate-mb-s", type=positive, default=12.0, help="total rate of the server's answers")
    add("--failures", type=float, default=0.01, help="share of answers that fail")
    add("--outage-s", type=float, default=5.0, help="how long the server refuses all requests at the start")
    add("--step-s", type=float, default=0.15, help="duration of a step without the wait for data")
    add("--json", type=Path, metavar="OUT")
    args = parser.parse_args(arguments)
    if args.shards % (args.nodes * args.ranks_per_node):
        ranks = args.nodes * args.ranks_per_node
        raise UserError(f"--shards is {args.shards}; a multiple of the {ranks} ranks is allowed")
    return args


@dataclass
class Request:
    rank: int
    path: str
    began: float
    ended: float = 0.0
    sent_bytes: int = 0
    fault: str = ""


@dataclass
class Bucket:
    """A web server of a folder, with a total rate and failures. The first request of an index begins an outage."""

    folder: Path
    rate: float
    failures: float = 0.0
    outage_s: float = 0.0
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        bucket = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                bucket.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 1024

        self._files = {f"/{path.name}": path.read_bytes() for path in self.folder.iterdir() if path.is_file()}
        self._lock, self._free_at, self._random = threading.Lock(), 0.0, random.Random(0)
        self.outage_began = 0.0
        self._http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def start(self) -> None:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        request = Request(int(handler.headers["X-Rank"]), handler.path, time.monotonic())
        with self._lock:
            if request.path.endswith(".npy"):
                self.outage_began = self.outage_began or request.began
            if self.outage_began and request.began - self.outage_began < self.outage_s:
                request.fault = "503"
            elif self._random.random() < self.failures:
                request.fault = self._random.choice(FAULTS)
            self.requests.append(request)
        content = self._files[request.path]
        if request.fault == "503":
            handler.send_error(503)
        else:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            self._send(handler, request, content[: len(content) // 2] if request.fault else content)
        if request.fault == "reset":  # closing with SO_LINGER of 0 s resets the connection
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
        request.ended = time.monotonic()

    def _send(self, handler: BaseHTTPRequestHandler, request: Request, content: bytes) -> None:
        for first in range(0, len(content), CHUNK_BYTES):
            chunk = content[first : first + CHUNK_BYTES]
            with self._lock:
                turn = max(self._free_at, time.monotonic())
                self._free_at = turn + len(chunk) / self.rate
            time.sleep(max(0.0, turn - time.monotonic()))
            handler.wfile.write(chunk)
            request.sent_bytes += len(chunk)


def make_dataset(folder: Path, shards: int) -> None:
    rng = np.random.default_rng(0)
    with mock.patch("os.fsync"):
        written = []
        for shard in range(shards):
            samples = SHARD_SAMPLES + (5 if shard % 2 else -5)  # lanes begin and end within shards
            lengths = rng.lognormal(np.log(MEAN_BYTES) - 0.125, 0.5, samples).astype(int) + 1
            members = [Member(f"{shard}-{i}", "bin", rng.bytes(n), i % 2) for i, n in enumerate(lengths.tolist())]
            written.append(write_shard(folder / f"sim-train-{shard:06}.tar", members))
        part = write_split(folder, "sim", "train", ("x", "y"), written)
    write_description(folder, "sim", ("x", "y"), "bin", {}, {"train": part})


def config_of(location: str, args: argparse.Namespace, cache: Path) -> Config:
    ranks = args.nodes * args.ranks_per_node
    slice_samples = args.shards * SHARD_SAMPLES // ranks
    data = Data(
        sources=(Source(location),),
        lanes=ranks,
        batch_samples=ranks * LANE_SAMPLES,
        shuffle_block=slice_samples // BLOCKS,
        cache_dir=str(cache),
        cache_gb=args.cache_shards * 1e5 / 1e9,
    )
    return Config(data=data, train=Train(steps=args.epochs * slice_samples // LANE_SAMPLES), name="bench")


def digest_of(batch) -> int:
    content = xxhash.xxh3_64()
    for part in (batch.samples, batch.labels, batch.offsets, batch.data):
        content.update(part.numpy())
    return content.intdigest()


def train_as(rank: int, config: Config, args: argparse.Namespace, folder: Path, together, began: np.ndarray) -> None:
    """One rank, without a model. Writes samples and digests of its micro-batches."""
    home = folder / f"rank{rank}"
    home.mkdir()
    (home / ".curlrc").write_text(f'header = "X-Rank: {rank}"\n')
    os.environ["CURL_HOME"] = str(home)
    with open(folder / f"rank{rank}.log", "w") as log:
        os.dup2(log.fileno(), 2)
        local = rank % args.ranks_per_node
        ranks = Ranks(rank, args.nodes * args.ranks_per_node, local, args.ranks_per_node)
        together.wait()
        described = folder / "descriptions"
        if rank == 0:  # it reads the metadata and sends it to all ranks
            described.write_text(json.dumps(fetch_descriptions(config)))
        together.wait()
        data = open_run_data(config, ranks, json.loads(described.read_text()))
        batches = training_batches(config, data.training, data.plan, ranks, first_step=0)
        samples, digests = [], []
        for step in range(config.train.steps):
            together.wait()
            if rank == 0:
                began[step] = time.monotonic()
            batch = next(batches)
            samples.append(batch.samples.numpy().copy())
            digests.append(digest_of(batch))
            time.sleep(args.step_s)
        batches.close()
    np.savez(folder / f"rank{rank}.npz", samples=np.stack(samples), digests=np.array(digests, np.uint64))


def measure(dataset: Path, args: argparse.Namespace, failures: float, outage_s: float) -> dict:
    ranks = args.nodes * args.ranks_per_node
    bucket = Bucket(dataset, args.rate_mb_s * 1e6, failures, outage_s)
    with tempfile.TemporaryDirectory(prefix="bfsys-remote-") as root:
        folder = Path(root)
        caches = [folder / f"node{node}" for node in range(args.nodes)]
        configs = [config_of(bucket.url, args, cache) for cache in caches]
        together = forked.Barrier(ranks)
        began = np.frombuffer(mmap.mmap(-1, 8 * configs[0].train.steps), np.float64)
        processes = [
            forked.Process(
                target=train_as, args=(rank, configs[rank // args.ranks_per_node], args, folder, together, began)
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        bucket.start()
        largest_bytes = 0
        try:
            while any(process.is_alive() for process in processes):
                if any(process.exitcode for process in processes):
                    failed = next(n for n, process in enumerate(processes) if process.exitcode)
                    raise UserError(f"rank {failed} failed: {(folder / f'rank{failed}.log').read_text()[-600:]}")
                largest_bytes = max(largest_bytes, *map(_size_bytes, caches))
                time.sleep(WATCH_S)
        finally:
            for process in processes:
                process.kill()
                process.join()
            bucket.stop()
        results = [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(ranks)]
        row = evaluate_batches(dataset, args, results)
        said = [line for rank in range(ranks) for line in (folder / f"rank{rank}.log").read_text().splitlines()]
    limit_bytes = configs[0].data.cache_gb * 1e9
    row |= {"largest cache, of its limit": largest_bytes / limit_bytes, "lines on standard error": len(said)}
    return row | count_requests(bucket, args, began)


def _size_bytes(folder: Path) -> int:
    with suppress(FileNotFoundError):  # the folder does not exist yet
        return Cache(folder, 1).size_bytes()
    return 0


def evaluate_batches(dataset: Path, args: argparse.Namespace, results: list[dict]) -> dict:
    """Compare with the batches of the local dataset, and count how often each sample was read."""
    config = config_of(str(dataset), args, dataset / "none")
    data = open_run_data(config, Ranks())
    expected = np.array(
        [digest_of(batch) for batch in training_batches(config, data.training, data.plan, Ranks(), first_step=0)],
        np.uint64,
    ).reshape(config.train.steps, -1)
    got = np.stack([result["digests"] for result in results], axis=1)
    reads = np.bincount(np.concatenate([result["samples"].ravel() for result in results]), minlength=1)
    return {
        "batches": expected.size,
        "batches that differ": int((got != expected).sum()),
        "reads of a sample": [int(reads.min()), int(reads.max())],
    }


def count_requests(bucket: Bucket, args: argparse.Namespace, began: np.ndarray) -> dict:
    requests = sorted(bucket.requests, key=lambda request: request.began)
    steps = [r for r in requests if r.path.endswith(".tar") and r.began >= began[0]]
    per_step = np.histogram([r.began for r in steps], [*began, np.inf])[0]
    epoch = len(began) // args.epochs
    block = epoch // BLOCKS
    by_node = Counter(request.rank // args.ranks_per_node for request in requests)
    sent = Counter[str]()
    for request in requests:
        sent[_kind(request)] += request.sent_bytes
    outage_ended = bucket.outage_began + bucket.outage_s
    late = [r.began for r in requests if r.path.endswith(".samples.npy") and r.began >= outage_ended]
    return {
        "requests": dict(Counter(map(_kind, requests))),
        "requests of a node": [min(by_node.values()), max(by_node.values())],
        "failed": dict(Counter(r.fault for r in requests if r.fault)),
        "sent MB": {kind: round(size / 1e6, 1) for kind, size in sent.items()},
        "MB of a node": sum(sent.values()) / 1e6 / args.nodes,
        "amplification": sent["shards"] / args.epochs / sum(p.stat().st_size for p in bucket.folder.glob("*.tar")),
        "shards in a step, mean": float(per_step[block:].mean()),
        "shards in a step, most in the first block": int(per_step[:block].max()),
        "shards in a step, most where an epoch begins": _most_from(per_step, range(epoch, len(began), epoch)),
        "shards in a step, most where a block begins": _most_from(per_step, range(block, len(began), block)),
        "shards at once, most after the first block": _most_at_once([r for r in steps if r.began >= began[block]]),
        "most after the outage": _most_in_a_window(late) if bucket.outage_s else 0,
        "shards in each step": per_step.tolist(),
    }


def _kind(request: Request) -> str:
    return {"json": "dataset.json", "npy": "index", "tar": "shards"}[request.path.rpartition(".")[2]]


def _most_in_a_window(times: list[float]) -> int:
    return int(np.histogram(times, np.arange(times[0], times[-1] + 1, WINDOW_S))[0].max())


def _most_from(per_step: np.ndarray, first: Sequence[int]) -> int:
    """The largest number of requests in one step of `first` or the two steps after it, since requests are delayed."""
    return int(max(per_step[step : step + 3].max() for step in first))


def _most_at_once(requests: list[Request]) -> int:
    changes = sorted([(r.began, 1) for r in requests] + [(r.ended, -1) for r in requests])
    return int(np.cumsum([change for _, change in changes]).max())


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    rows = {}
    with tempfile.TemporaryDirectory(prefix="bfsys-bucket-") as folder:
        make_dataset(Path(folder), args.shards)
        for name, failures, outage_s in (
            ("no failures", 0.0, 0.0), ("failures", args.failures, 0.0), ("outage", 0.0, args.outage_s),
        ):  # fmt: skip
            rows[name] = measure(Path(folder), args, failures, outage_s)
            print(
                f"{name}:",
                *(f"  {key}: {value}" for key, value in rows[name].items() if key != "shards in each step"),
                sep="\n",
            )
            sys.stdout.flush()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)

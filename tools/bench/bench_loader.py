"""Throughput of loaders side by side, in one run and on the same samples.

    python tools/bench/bench_loader.py --json loaders.json --cold

Each loader delivers shuffled batches of 32 files, undecoded, as one uint8 buffer, int64 offsets and labels. The other
loaders read their own formats, and build batches in their worker processes. `raw read` is a plain sequential read of
the shards. Each measurement runs in a separate process. In a first epoch, which is not measured, every sample must
occur exactly once. A new loader is then measured for each repeat. MB/s (of payload) and samples/s are measured from the
first batch to the last. The start is given separately, because epochs are short here and long in training. Data that a
loader has read before its first batch (a shuffle buffer, for example) do not count as time, which favours that loader.

Exit code 0: measured; 1: bfsys or the plain read failed or lost samples; 2: wrong arguments or other wrong input.
Rejected alternative: figures of different runs in one table, because on shared machines runs differ by more than
loaders do.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.shared_memory import SharedMemory
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from bfsys.start import let_signals_end_the_process

    let_signals_end_the_process()

import numpy as np

from bfsys.data.storage.tars import Member, size_in_tar_bytes, write_shard
from bfsys.errors import run_command, summary_of
from bfsys.files import replace_file
from tools.bench.child_process import result_of_child
from tools.bench.report import machine, show

RAW_READ = "raw read"
BATCH_SAMPLES = 32
SHARD_BYTES = 64_000_000
CLIP_BYTES = 32_044  # a second of 16-bit sound at 16 kHz, with its header
LIMIT_S = 900  # limit of one measurement


def sample_lengths(samples: int) -> np.ndarray:
    """int64 [samples]: a quarter are clips, the others are as long as JPEG files (median 12 KB)."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(12_000), 0.7, samples)).astype(np.int64).clip(64)
    lengths[rng.permutation(samples)[: samples // 4]] = CLIP_BYTES
    return lengths


def sample(number: int, lengths: np.ndarray) -> tuple[bytes, int]:
    """Return payload and label. The payload begins with eight bytes of the sample's number; the rest is random."""
    payload = np.random.default_rng([1, number]).bytes(int(lengths[number]) - 8)
    return number.to_bytes(8, "little") + payload, number % 10


def write_tars(folder: Path, lengths: np.ndarray) -> None:
    from bfsys.data.storage.shards import write_description, write_split

    shard_of = np.cumsum([size_in_tar_bytes(length) for length in lengths.tolist()]) // SHARD_BYTES
    shards = []
    for shard in np.unique(shard_of):
        members = (
            Member(f"{i:08}", "wav" if lengths[i] == CLIP_BYTES else "jpg", *sample(i, lengths))
            for i in np.flatnonzero(shard_of == shard).tolist()
        )
        shards.append(write_shard(folder / f"bench-train-{shard:06}.tar", members))
    splits = {"train": write_split(folder, "bench", "train", "0123456789", shards)}
    write_description(folder, "bench", "0123456789", "as_stored", {"tool": "tools/bench/bench_loader.py"}, splits)


def write_mds(folder: Path, lengths: np.ndarray) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"data": "bytes", "label": "int"}, size_limit=SHARD_BYTES) as writer:
        for number in range(len(lengths)):
            writer.write(dict(zip(("data", "label"), sample(number, lengths), strict=True)))


def write_litdata(folder: Path, lengths: np.ndarray) -> None:
    from litdata import optimize

    fn, numbers = partial(sample, lengths=lengths), range(len(lengths))
    optimize(fn, [*numbers], str(folder), chunk_bytes=SHARD_BYTES, num_workers=1, verbose=False)


def bfsys_batches(folder: Path, workers: int, steps: int) -> Iterator[tuple]:
    """Yield an epoch of (data uint8 [bytes], offsets int64 [samples + 1], …), like the functions below."""
    from bfsys.config import Config, Data, Model, Source, Train
    from bfsys.data.streaming.loader import training_batches
    from bfsys.data.streaming.run_data import open_run_data
    from bfsys.dist import Ranks

    knobs = Data(sources=(Source(str(folder)),), batch_samples=BATCH_SAMPLES, lanes=1, workers=workers)
    config = Config(knobs, Model(max_tokens=1_000_000), train=Train(steps=steps))
    data = open_run_data(config, Ranks())
    for batch in training_batches(config, data.training, data.plan, Ranks(), first_step=0):
        yield batch.data, batch.offsets


def webdataset_batches(folder: Path, workers: int, steps: int) -> Iterator[tuple]:
    from webdataset import WebDataset, WebLoader

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(1000)  # as documented
    dataset = dataset.map(lambda fields: (fields.get("jpg") or fields["wav"], int(fields["cls"])))
    dataset = dataset.batched(BATCH_SAMPLES, collation_fn=flat_batch)
    yield from WebLoader(dataset, batch_size=None, collate_fn=lambda batch: batch, **processes(workers))


def mosaicml_batches(folder: Path, workers: int, steps: int) -> Iterator[tuple]:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH_SAMPLES)
    pairs = partial(map, itemgetter("data", "label"))
    yield from DataLoader(dataset, BATCH_SAMPLES, collate_fn=lambda s: flat_batch([*pairs(s)]), **processes(workers))


def litdata_batches(folder: Path, workers: int, steps: int) -> Iterator[tuple]:
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(folder), shuffle=True)
    yield from StreamingDataLoader(dataset, batch_size=BATCH_SAMPLES, collate_fn=flat_batch, **processes(workers))


def processes(workers: int) -> dict[str, Any]:
    """Options of a DataLoader. Forked, because the functions that these loaders use cannot be pickled; since Python
    3.14, fork is not the default."""
    return {"num_workers": workers} | ({"multiprocessing_context": "fork"} if workers else {})


def flat_batch(samples: Sequence[tuple[bytes, int]]) -> tuple:
    """The batches of the other loaders, as arrays: torch is up to twice as slow if a worker passes tensors."""
    offsets = np.zeros(len(samples) + 1, np.int64)
    np.cumsum([len(payload) for payload, _ in samples], out=offsets[1:])
    data = np.concatenate([np.frombuffer(payload, np.uint8) for payload, _ in samples])
    return data, offsets, np.array([label for _, label in samples])


# By loader: the storage format, and the function that yields its batches.
LOADERS: dict[str, tuple[str, Callable[[Path, int, int], Iterator[tuple]] | None]] = {
    RAW_READ: ("tars", None),
    "bfsys": ("tars", bfsys_batches),
    "webdataset": ("tars", webdataset_batches),
    "mosaicml-streaming": ("mds", mosaicml_batches),
    "litdata": ("litdata", litdata_batches),
}


def run_job(job: dict) -> dict:
    record_shared_memory(Path(job["ledger"]))
    folder, lengths, checked = Path(job["folder"]), sample_lengths(job["samples"]), {}
    if "write" in job:
        if not folder.exists():  # it gets its name when it is complete
            part = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            {"tars": write_tars, "mds": write_mds, "litdata": write_litdata}[job["write"]](part, lengths)
            part.rename(folder)
        return {}
    _, batches = LOADERS[job["loader"]]
    if batches is None:
        timed = partial(timed_read, folder, lengths)
        timed()  # warm-up
    else:
        start = partial(batches, folder, job["workers"], len(lengths) // BATCH_SAMPLES)
        checked = check_epoch(start(), lengths)
        timed = partial(timed_epoch, start, lengths, job["seconds"])
    passes = []
    for _ in range(job["repeats"]):
        if job["cold"]:
            forget_pages(folder)
        passes.append(timed())
    problems = [done.pop("problem", None) for done in (checked, *passes)]
    medians = {key: median(done[key] for done in passes) for key in passes[0]}
    return {**checked, **medians, "problem": next(filter(None, problems), None)}


def check_epoch(batches: Iterator[tuple], lengths: np.ndarray) -> dict:
    """Check that each sample of an epoch occurs once and is intact. Returns the share of padding in its batches."""
    numbers, sizes, buffers, padded = [], [], 0, 0
    for data, offsets, *_ in batches:
        data, offsets = np.asarray(data), np.asarray(offsets)
        numbers.append(data[offsets[:-1, None] + np.arange(8)].view("<i8")[:, 0])
        sizes.append(np.diff(offsets))
        buffers += len(data)
        padded += len(sizes[-1]) * int(sizes[-1].max())
    number, size, wanted = np.concatenate(numbers), np.concatenate(sizes), np.arange(len(lengths))
    payload, different, problem = int(size.sum()), len(np.intersect1d(number, wanted)), None
    if not (np.array_equal(np.sort(number), wanted) and np.array_equal(size, lengths[number])):
        problem = f"WRONG: {len(number):,} samples of {len(wanted):,}, {different:,} different ones, {payload:,} bytes"
    return {"padding_share": 1 - payload / buffers, "padded_share": 1 - payload / padded, "problem": problem}


def timed_epoch(start: Callable[[], Iterator[tuple]], lengths: np.ndarray, seconds: float | None) -> dict:
    begin = time.perf_counter()
    samples, size, first, problem = 0, 0, None, None
    for _, offsets, *_ in start():
        now = time.perf_counter()
        samples += len(offsets) - 1
        size += int(offsets[-1])
        if first is None:
            first = now, samples, size
        elif seconds and now - first[0] > seconds:
            break
    else:
        if (samples, size) != (len(lengths), lengths.sum()):
            problem = f"WRONG: {samples:,} samples and {size:,} bytes, not {len(lengths):,} and {lengths.sum():,}"
    assert first is not None, "the loader gave no batch"
    seconds = now - first[0]
    rates = {"mb_per_s": (size - first[2]) / seconds / 1e6, "samples_per_s": (samples - first[1]) / seconds}
    return {**rates, "first_batch_s": first[0] - begin, "epoch_s": now - begin, "problem": problem}


def timed_read(folder: Path, lengths: np.ndarray) -> dict:
    """Time reading every shard from end to end into one buffer. The rate counts only the payload."""
    buffer = bytearray(SHARD_BYTES)  # larger than a core's cache, in which it would fill 1.7 x as fast
    begin = time.perf_counter()
    for path in sorted(folder.glob("*.tar")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    seconds = time.perf_counter() - begin
    return {"mb_per_s": lengths.sum() / seconds / 1e6, "samples_per_s": len(lengths) / seconds, "epoch_s": seconds}


def forget_pages(folder: Path) -> None:
    """Drop the page cache of the shards, so that the next reader reads from the disk."""
    for path in folder.glob("*.tar"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # dirty pages would stay in the cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def record_shared_memory(ledger: Path) -> None:
    """Record the named shared memory of this process and its workers, because mosaicml-streaming may not remove it."""
    original = SharedMemory.__init__

    def recorded(self: SharedMemory, name: str | None = None, create: bool = False, size: int = 0) -> None:
        original(self, name, create, size)
        if create:
            with open(ledger, "a") as file:
                file.write(f"{os.stat(f'/dev/shm/{self.name}').st_ino} /dev/shm/{self.name}\n")

    mock.patch.object(SharedMemory, "__init__", recorded).start()


def in_child(job: dict) -> dict:
    """Do a job in a new process group, and clean up after it. Returns its result, with any problem."""
    with tempfile.TemporaryDirectory(prefix="bench_loader-") as scratch:
        result, ledger = Path(scratch, "result"), Path(scratch, "ledger")
        job = {**job, "result": str(result), "ledger": str(ledger)}
        env = {**os.environ, "TMPDIR": scratch, "LITDATA_DISABLE_VERSION_CHECK": "1"}
        env["DS_ACCELERATOR"] = "cpu"  # otherwise bfsys would pin its batches for a GPU; the peers do not
        try:
            return result_of_child([sys.executable, __file__, "--child", json.dumps(job)], result, LIMIT_S, env)
        finally:
            remove_shared_memory(ledger)


def remove_shared_memory(ledger: Path) -> None:
    """Remove the recorded shared memory that is left, unless another process has made it again by the same name."""
    for line in ledger.read_text().splitlines() if ledger.exists() else ():
        inode, path = line.split(" ", 1)
        if os.path.exists(path) and os.stat(path).st_ino == int(inode):
            os.unlink(path)


def measure_all(args: argparse.Namespace, folder: Path, loaders: Sequence[str]) -> list[dict]:
    """Measure the rows of the table, each in a new process, with their ratios to rows of the same kind, warm or
    cold."""
    from bfsys.data.storage.shards import FORMAT

    stored = f"{{}}-{args.samples}-format{FORMAT}"  # stored samples are not reused after a change of the format
    problems = {}
    for form in dict.fromkeys(LOADERS[name][0] for name in loaders):
        print(f"writing {form} …", file=sys.stderr)
        job = {"write": form, "folder": str(folder / stored.format(form)), "samples": args.samples}
        problems[form] = in_child(job).get("problem")
    rows = []
    asked = {key: getattr(args, key) for key in ("samples", "repeats", "seconds")}
    cases = [(False, name) for name in loaders]
    cases += [(True, name) for name in loaders if args.cold and name in (RAW_READ, "bfsys")]
    for cold, loader in cases:
        form = LOADERS[loader][0]
        for workers in [0] if loader == RAW_READ else args.workers:
            row = {"loader": loader, "workers": workers, "cold": cold}
            print(f"measuring {loader}, {workers} workers{', cold' if cold else ''} …", file=sys.stderr)
            job = {**row, **asked, "folder": str(folder / stored.format(form))}
            failed = problems[form] and {"problem": f"writing its samples failed: {problems[form]}"}
            rows.append({**row, **dict.fromkeys(COLUMNS), **(failed or in_child(job))})
    rates = {(row["loader"], row["workers"], row["cold"]): row["mb_per_s"] for row in rows}
    for row in rows:
        for key, other in (("vs_raw_read", (RAW_READ, 0)), ("vs_webdataset", ("webdataset", row["workers"]))):
            rate = rates.get((*other, row["cold"]))
            row[key] = row["mb_per_s"] / rate if row["mb_per_s"] and rate else None
    return rows


COLUMNS = {
    "mb_per_s": ("MB/s", "{:,.0f}"),
    "samples_per_s": ("samples/s", "{:,.0f}"),
    "first_batch_s": ("first batch, s", "{:.3f}"),
    "epoch_s": ("epoch, s", "{:.3f}"),
    "padding_share": ("padding", "{:.0%}"),
    "padded_share": ("if padded", "{:.0%}"),
    "vs_raw_read": ("to raw read", "{:.2f} x"),
    "vs_webdataset": ("to webdataset", "{:.1f} x"),
    "problem": ("problem", "{}"),
}


def names_of(row: dict) -> tuple[str, str]:
    return row["loader"] + (" (cold)" if row["cold"] else ""), str(row["workers"])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=summary_of(__doc__))
    add = parser.add_argument
    add("--json", type=Path, metavar="OUT", help="write the rows to this file too")
    add("--samples", type=int, default=20_000, help="a multiple of 32, at least 64 (default: 20000, 390 MB)")
    add("--data", type=Path, metavar="FOLDER", help="keep the samples here and use them again (default: a temporary)")
    add("--loaders", default=",".join(LOADERS), metavar="A,B", help="default: %(default)s")
    add("--workers", default="0,1,2", metavar="N,M", help="loader processes (default: %(default)s)")
    add("--repeats", type=int, default=3, help="measured epochs, of which the median counts (default: 3)")
    add("--seconds", type=float, help="end a measured epoch after this time (default: after its last batch)")
    add("--cold", action="store_true", help="measure the plain read and bfsys from disk, too")
    add("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.loaders, args.workers = args.loaders.split(","), args.workers.split(",")
    wrong = [name for name in args.loaders if name not in LOADERS] + [n for n in args.workers if not n.isdecimal()]
    if wrong:
        parser.error(f"got {', '.join(wrong)}; loaders are {', '.join(LOADERS)}, and workers whole numbers such as 0,2")
    if args.samples < 64 or args.samples % BATCH_SAMPLES or args.repeats < 1 or not (args.seconds or 1) > 0:
        parser.error("--samples must be a multiple of 32, at least 64; --repeats and --seconds positive")
    if args.data and args.data.exists() and not args.data.is_dir():
        parser.error(f"--data: {args.data} is not a folder")
    args.workers = [int(number) for number in args.workers]
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.child:
        Path(args.child["result"]).write_text(json.dumps(run_job(args.child)))
        return 0
    os.makedirs(args.json.parent if args.json else ".", exist_ok=True)
    before = machine()
    versions = {"python": platform.python_version()}
    for name in ("torch", "numpy", *LOADERS):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    loaders = [name for name in LOADERS if name in args.loaders]
    for name in [name for name in loaders if name != RAW_READ and name not in versions]:
        print(f"{name}: not installed, left out; to have it: pip install -e '.[bench]'")
        loaders.remove(name)
    with tempfile.TemporaryDirectory(prefix="bench_loader-") as folder:
        rows = measure_all(args, args.data or Path(folder), loaders)
    show(rows, COLUMNS, headings=("loader", "workers"), names_of=names_of)
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        report = {"rows": rows, "samples": args.samples, "machine": before, "versions": versions, "date": date}
        replace_file(args.json, json.dumps(report, indent=1) + "\n")
    return int(any(row["problem"] for row in rows if row["loader"] in (RAW_READ, "bfsys")))


if __name__ == "__main__":
    run_command(main)

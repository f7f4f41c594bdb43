"""Benchmark of the checkpoint of many ranks: its files and bytes, and the times to commit, verify and remove it.

    python tools/bench/bench_checkpoint.py
    python tools/bench/bench_checkpoint.py --ranks 8 1024 --size tiny --folder /dev/shm

The benchmark writes checkpoints in the layout of a run with the given number of ranks, one after the other, and removes
them. A checkpoint holds four states of a model, and each rank has a part of each state. At ZeRO stages 0, 1 and 2 a
rank's part is contiguous in the list of all parameters. At stage 3 it is a part of every parameter.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from bfsys.start import let_signals_end_the_process

    let_signals_end_the_process()

import torch

from bfsys.checkpoint import writer
from bfsys.checkpoint.files import (
    checkpoint_name,
    checkpoints_dir,
    commit,
    cover,
    new_work_dir,
    piece_name,
    problems_of,
    read_manifest,
    remove,
)
from bfsys.config import Model
from bfsys.errors import run_command, summary_of
from bfsys.model.byteformer import ByteFormer
from bfsys.model.sizes import SIZES
from tools.bench.command import at_least

STATES = ("weight", "ema", "exp_avg", "exp_avg_sq")
CLASSES = 1000
MB = 1e6


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=summary_of(__doc__))
    add = parser.add_argument
    add("--ranks", type=at_least(1), nargs="+", default=[8, 128, 1024], metavar="N")
    add("--size", choices=SIZES, default="tiny", help="size of the model (default: %(default)s)")
    add("--folder", type=Path, metavar="DIR", help="folder for the checkpoints (default: a temporary one)")
    add("--json", type=Path, metavar="OUT")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    with torch.device("meta"):
        model = ByteFormer(Model(size=args.size).architecture(), CLASSES)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    rows = []
    print("                          MB beside  manifest     pieces   commit  manifest  verify  remove")
    print("ranks stages   files    MB  numbers        MB  per state   cover s    read s      s       s")
    for ranks in args.ranks:
        for stages, parts in (("0 1 2", contiguous), ("3", of_each)):
            with tempfile.TemporaryDirectory(prefix="bfsys-checkpoint-", dir=args.folder) as folder:
                row = {"ranks": ranks, "stages": stages, **measure(Path(folder), shapes, ranks, parts)}
            rows.append(row)
            print(
                f"{ranks:>5} {stages:<6} {row['files']:>7} {row['mb']:>5.0f} {row['mb_beside_numbers']:>8.1f} "
                f"{row['manifest_mb']:>9.2f} {row['pieces']:>10} {row['commit_s']:>5.2f} {row['cover_s']:>5.2f} "
                f"{row['read_manifest_s']:>6.3f} {row['verify_s']:>6.2f} {row['remove_s']:>7.2f}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({"size": args.size, "rows": rows}, indent=1) + "\n")
    return 0


Parts = Iterator[tuple[str, int, int]]  # (parameter, first element, end)


def contiguous(shapes: dict[str, tuple[int, ...]], ranks: int, rank: int) -> Parts:
    """A rank's part of the concatenated parameters."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    total, start = sum(sizes.values()), 0
    first, end = (total * number // ranks for number in (rank, rank + 1))
    for name, size in sizes.items():
        if first < start + size and end > start:
            yield name, max(0, first - start), min(size, end - start)
        start += size


def of_each(shapes: dict[str, tuple[int, ...]], ranks: int, rank: int) -> Parts:
    """A rank's part of each parameter, as ZeRO stage 3 shards them."""
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        share = -(-size // ranks)
        if rank * share < size:
            yield name, rank * share, min(size, (rank + 1) * share)


def measure(run: Path, shapes: dict[str, tuple[int, ...]], ranks: int, parts: Callable[..., Parts]) -> dict:
    final = checkpoints_dir(run) / checkpoint_name(1)
    work = new_work_dir(final)
    files: dict[str, dict] = {}
    pieces: list[str] = []
    for rank in range(ranks):
        of_rank = list(parts(shapes, ranks, rank))
        names = [piece_name(name, first, end) for name, first, end in of_rank]
        pieces += names
        entries, at = {}, 0
        for name, (_, first, end) in zip(names, of_rank, strict=True):
            entries[name] = ([end - first], at, at := at + 4 * (end - first))
        content = memoryview(torch.rand(at // 4).numpy().tobytes())
        for state in STATES if entries else ():
            name = f"{state}-{rank}-of-{ranks}.safetensors"
            files[name] = writer.write(str(work / name), writer.safetensors(content, entries))
    facts = {"step": 1, "shapes": {name: list(shape) for name, shape in shapes.items()}}
    number_bytes = 4 * len(STATES) * sum(torch.Size(shape).numel() for shape in shapes.values())
    row = {
        "files": len(files) + 1,
        "mb": sum(entry["bytes"] for entry in files.values()) / MB,
        "mb_beside_numbers": (sum(entry["bytes"] for entry in files.values()) - number_bytes) / MB,
        "pieces": len(pieces),
        "cover_s": seconds(lambda: cover(pieces, shapes)),
        "commit_s": seconds(lambda: commit(work, final, facts, files)),
        "manifest_mb": (final / "manifest.json").stat().st_size / MB,
        "read_manifest_s": seconds(lambda: read_manifest(final)),
        "verify_s": seconds(lambda: problems_of(final)),
    }
    assert cover(pieces, shapes)
    assert not problems_of(final)
    return row | {"remove_s": seconds(lambda: remove(final))}


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


if __name__ == "__main__":
    run_command(main)

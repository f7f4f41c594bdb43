"""The samples of a run that could not be read intact, the same on every rank and in every replay.

    quarantine.tsv in the run directory: step, split, source, sample, shard, key, reason

A sample is bad from the first step that failed to read it. Earlier steps read it intact, so a replay of those steps
reads it again. Its replacement is a function of seed, source, sample and epoch (see reader.py), so a resumed run gets
the batches of the uninterrupted run. Rejected alternatives: skipping bad samples silently or without a record, as other
loaders do; and stopping at the first one, because one file in a million would end a long run.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bfsys import dist
from bfsys.errors import UserError, code_of, one_line, some
from bfsys.files import exists, read_regular

FILE = "quarantine.tsv"
# Problems that an error lists; the file lists all of them.
LISTED = 20


class BadSample(NamedTuple):
    """A row of quarantine.tsv."""

    step: int  # number of steps before the sample was drawn
    split: str
    source: str
    sample: int  # number in the split's index
    shard: str
    key: str
    reason: str

    def describe(self) -> str:
        return f"{self.source} {self.split}: {self.shard}: sample {self.key!r} (number {self.sample}) {self.reason}"


HEADING = "\t".join(BadSample._fields).encode()


class Quarantine:
    """The bad samples of a run. Rank 0 writes the file. After `share`, all ranks have the same list."""

    def __init__(self, run_dir: Path | None = None, check_data: Callable[[], None] = lambda: None) -> None:
        """Keep the list in a directory; without one, nothing is written. To read an existing list, use `load`.

        `check_data` raises UserError if the data were replaced, since intact samples of other data look damaged."""
        self.path = run_dir / FILE if run_dir else None
        self._check_data = check_data
        self._rows: dict[tuple[str, str, int], BadSample] = {}
        self._found: list[BadSample] = []
        self._steps: list[int] = []  # steps of the rows, in order

    @classmethod
    def load(cls, run_dir: Path, ranks: dist.Ranks, check_data: Callable[[], None] = lambda: None) -> Quarantine:
        """Load the bad samples that earlier starts of the run found; collective."""
        quarantine = cls(run_dir, check_data)
        quarantine._take(dist.on_rank0(lambda: _read(run_dir / FILE), ranks))
        return quarantine

    def bad_from(self, split: str, source: str) -> dict[int, int]:
        """{sample: first step at which it is bad} of a source."""
        return {row.sample: row.step for (*of, _), row in self._rows.items() if of == [split, source]}

    def count_until(self, step: int) -> int:
        """The number of bad samples that were found in the first `step` steps."""
        return bisect_left(self._steps, step)

    @property
    def news(self) -> int:
        """The number of bad samples that this rank has found since the last `share`."""
        return len(self._found)

    def found(self, rows: Iterable[BadSample]) -> None:
        """Record bad samples that this rank has found."""
        self._found += [row for row in rows if self._is_new(row)]

    def share(self, ranks: dist.Ranks, sizes: dict[tuple[str, str], int], max_bad_share: float) -> list[BadSample]:
        """Share the bad samples of all ranks, add them to the file, and `check`; collective. Returns the new ones."""
        found = sorted({row for rows in dist.gather_to_all(self._found) for row in rows})
        if found:
            dist.on_rank0(self._check_data, ranks)
        self._found = []
        new = self._take(found)
        if new and self.path:
            dist.on_rank0(partial(_append, self.path, new), ranks)
        self.check(sizes, max_bad_share)
        return new

    def check(self, sizes: dict[tuple[str, str], int], max_bad_share: float) -> None:
        """Raise AgreedError with a list if more than `max_bad_share` of a source is bad.

        `sizes` is the number of samples of each (split, source) to check.
        """
        remedy = "Repair the dataset or pack it again."
        if self.path:
            remedy = (
                f"{self.path} lists all of them. Repair the dataset and remove that file, or raise "
                "data.max_bad_share; the same command then resumes."
            )
        for (split, source), count in Counter(key[:2] for key in self._rows).items():
            size = sizes.get((split, source))
            if size is not None and count > max_bad_share * size:
                bad = [row for row in self._rows.values() if (row.split, row.source) == (split, source)]
                raise dist.AgreedError(
                    f"{source}: {count:,} of {size:,} samples of {split} are unreadable or damaged, more than "
                    f"data.max_bad_share {max_bad_share:g} allows. {remedy} The first are",
                    *(row.describe() for row in bad[:LISTED]),
                )

    def _is_new(self, row: BadSample) -> bool:
        known = self._rows.get((row.split, row.source, row.sample))
        return known is None or row.step < known.step

    def _take(self, rows: Iterable[BadSample]) -> list[BadSample]:
        new = []
        for row in rows:
            if self._is_new(row):
                self._rows[row.split, row.source, row.sample] = row
                new.append(row)
        if new:
            self._steps = sorted(row.step for row in self._rows.values())
        return new


def _read(path: Path) -> list[BadSample]:
    """The rows of the file. Invalid rows are reported on standard error and ignored."""
    *lines, torn = read_regular(path).split(b"\n") if exists(path) else [b""]
    rows, unreadable = [], []
    for number, line in enumerate([*lines, torn] if torn and not lines else lines, start=1):
        fields = line.decode(errors="backslashreplace").split("\t")
        if len(fields) == len(BadSample._fields) and fields[0].isdecimal() and fields[3].isdecimal():
            step, split, source, sample, *rest = fields
            rows.append(BadSample(int(step), split, source, int(sample), *rest))
        elif line and not HEADING.startswith(line):
            unreadable.append(str(number))
    if unreadable:
        text = f"{path}: ignored invalid rows (line {some(unreadable, LISTED)}); their samples are read again"
        print(text, file=sys.stderr, flush=True)
    return rows


def _append(path: Path, rows: list[BadSample]) -> None:
    lines = "".join("\t".join(one_line(str(field)) for field in row) + "\n" for row in rows)
    try:
        with open(path, "ab+") as file:
            file.seek(0)
            whole = file.read().rpartition(b"\n")[0]
            file.truncate(len(whole) + 1 if whole else 0)  # drop an incomplete last line
            file.write((b"" if whole else HEADING + b"\n") + lines.encode(errors="backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}", exit_code=code_of(error)) from None

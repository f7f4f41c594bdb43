"""The figures of a run: TensorBoard, metrics.jsonl and a console line, from the same sums.

Each rank collects sums without waiting for the device. They are added up over the ranks every `log_every` steps. A
checkpoint carries the sums since the last line, so a resumed run writes the lines of an uninterrupted run. Lines after
the checkpoint are removed at a resume and written again.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bfsys import dist, typed_yaml
from bfsys.batch import ByteBatch
from bfsys.checkpoint.files import METRICS
from bfsys.config import Config
from bfsys.confusion import Answers
from bfsys.errors import EXIT_CRASHED, EXIT_STORAGE, TRANSIENT_ERRNOS, one_line, remedy_of
from bfsys.files import CHUNK_BYTES, exists, is_dir, open_regular, replacing
from bfsys.json_lines import parse_json_object
from bfsys.locations import without_secrets
from bfsys.loss import COLUMNS, CONTENT, SAMPLES, describe_scores, scores
from bfsys.model.flops import flops_per_step, matrix_peak
from bfsys.model.layout import token_counts
from bfsys.model.peaks import data_sheet_peak
from bfsys.supervision.cockpit import (
    open_board,
    show_embedding,
    show_evaluation,
    show_event,
    show_lengths,
    show_line,
    show_overview,
)
from bfsys.supervision.goodput import Ledger, goodput

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Columns of the counters that are summed over ranks and steps.
FILES, BYTES, TOKENS, ROUNDED_TOKENS, FLOPS, REPLACED, WAIT_S, BUSY_S = range(8)
COUNTER_NAMES = ("files", "bytes", "tokens", "rounded_tokens", "flops", "replaced", "wait_s", "busy_s")
COUNTERS = len(COUNTER_NAMES)
SECONDS = [WAIT_S, BUSY_S]
MIB = 2**20
MOST_LENGTHS, BLOCKS = 1_000_000, 100  # the lengths are read from the index at every start
LINE = {"kind": str, "step": int}  # fields that every line of metrics.jsonl has

BAD_STEP = "bad_step"  # kind of a line


class _Outputs(NamedTuple):
    """The outputs that rank 0 writes."""

    path: Path
    """metrics.jsonl, which users may delete, replace or edit while the run trains."""
    lines: IO[bytes]
    """A file without a name that holds the same lines, and that nobody else can change."""
    tensorboard: SummaryWriter

    def write(self, line: dict) -> None:
        text = json.dumps(line).encode() + b"\n"
        self.lines.write(text)
        self.lines.flush()
        with open(self.path, "ab") as file:
            file.write(text)


class Metrics:
    """Collects and writes the figures of a training run. Writes on rank 0 only."""

    def __init__(
        self,
        config: Config,
        ranks: dist.Ranks,
        source_names: tuple[str, ...],
        num_classes: int,
        *,
        ledger: Ledger,
        first_step: int,
        skipped_steps: Collection[int] = (),
    ) -> None:
        """`skipped_steps` are those that roll-backs skip. metrics.jsonl keeps the lines that name their samples."""
        self.ledger, self.run_dir = ledger, config.run_dir
        self.ranks, self.source_names, self.first_step = ranks, source_names, first_step
        self.architecture, self.mode = config.model.architecture(), config.model.mode
        self.num_classes = num_classes
        self.shows_content_loss = config.content_weight > 0
        precision = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.peak_flops_per_s = data_sheet_peak(ranks.device, precision)  # the peak of a rank
        self.matmul_flops_per_s = matrix_peak(ranks.device, precision)  # measured on this rank
        self.total_steps, self.log_every = config.train.steps, config.train.log_every
        self._started = self._step_began = time.perf_counter()
        self._sums = torch.zeros(len(source_names), COLUMNS, dtype=torch.float64)
        self._counters = torch.zeros(COUNTERS, dtype=torch.float64)
        self._step_sums = torch.zeros_like(self._sums)
        self._steps_in_line = self._skipped = 0
        self.problem, self.problem_code = "", 0  # why rank 0 cannot write, and the exit code for it
        self._outputs: _Outputs | None = None
        opened = dist.on_rank0(lambda: self._open(config, first_step, skipped_steps), ranks)
        self.last_evaluation, self.last_evaluated = opened

    def _open(self, config: Config, first_step: int, skipped_steps: Collection[int]) -> tuple[int, str | None]:
        """Open the outputs of rank 0. Returns the step and the files of the latest evaluation."""
        threading.excepthook = _without_tensorboard(threading.excepthook)
        lines, latest = _open_lines(self.run_dir / METRICS, first_step, skipped_steps)
        tensorboard = open_board(self.run_dir / "tb", first_step, hyperparameters(config))
        show_overview(tensorboard, self.source_names)
        settings = typed_yaml.dump(without_secrets(typed_yaml.to_tree(config)))
        tensorboard.add_text("run/config", f"```yaml\n{settings}```", first_step)
        self._outputs = _Outputs(self.run_dir / METRICS, lines, tensorboard)
        return latest.get("step", -1), latest.get("evaluated")

    def begin_step(self) -> None:
        self._step_began = time.perf_counter()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        before = self.ledger.wait_s
        with self.ledger.waiting_for_data():
            yield
        self._counters[WAIT_S] += self.ledger.wait_s - before

    def count(self, batch: ByteBatch, sums: Tensor) -> None:
        """Add a micro-batch with its `sums` from `training_loss`."""
        lengths = batch.lengths.numpy()
        tokens = token_counts(lengths, self.architecture, self.mode)
        alignment = self.architecture.alignment
        self._counters[FILES] += len(lengths)
        self._counters[BYTES] += int(lengths.sum())
        self._counters[TOKENS] += int(tokens.sum())
        self._counters[ROUNDED_TOKENS] += int((-(-tokens // alignment) * alignment).sum())
        self._counters[FLOPS] += flops_per_step(lengths, self.architecture, self.num_classes).total
        self._counters[REPLACED] += batch.replaced
        self._step_sums = self._step_sums.to(sums.device, non_blocking=True) + sums

    def end_step(
        self, step: int, learning_rate: float, grad_norm: float, bad_files: int, *, is_skipped: bool = False
    ) -> None:
        """End step number `step`; collective if a line is due. `bad_files` is the number of files in quarantine.

        A step whose update `is_skipped` does not count in losses and accuracies, because they may be non-finite.
        """
        self._counters[BUSY_S] += time.perf_counter() - self._step_began
        self._steps_in_line += 1
        self._skipped += is_skipped
        if not is_skipped:
            self._sums = self._sums.to(self._step_sums.device, non_blocking=True) + self._step_sums
        self._step_sums = torch.zeros_like(self._sums)
        if step % self.log_every and step != self.total_steps:
            return
        sums, counters = self._over_ranks()
        files = sums[:, SAMPLES].sum()
        if not files:  # all were skipped
            return
        self.ledger.record_progress(step)
        seconds_by_cause = self.ledger.seconds()
        memory = memory_figures(self.ranks.device)
        flops_per_s = float(counters[FLOPS]) / max(1e-9, float(counters[BUSY_S]))  # the mean of a rank
        seconds = max(1e-9, float(counters[BUSY_S]) / self.ranks.world_size)
        line = {
            "kind": "train",
            "step": step,
            **scores(sums, self.source_names),
            **({"content_loss": float(sums[:, CONTENT].sum() / files)} if self.shows_content_loss else {}),
            "learning_rate": learning_rate,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "step_s": seconds / self._steps_in_line,
            "samples_per_s": float(counters[FILES]) / seconds,
            "bytes_per_s": float(counters[BYTES]) / seconds,
            "tokens_per_s": float(counters[TOKENS]) / seconds,
            "model_tflop_per_s": flops_per_s * self.ranks.world_size / 1e12,
            "mfu": flops_per_s / self.peak_flops_per_s if self.peak_flops_per_s else None,
            "matmul_share": flops_per_s / self.matmul_flops_per_s,
            "padding_share": 1 - float(counters[TOKENS] / counters[ROUNDED_TOKENS]),
            "data_wait_share": float(counters[WAIT_S] / counters[BUSY_S]),
            "bad_files": bad_files,
            "replaced_samples": int(counters[REPLACED]),
            "skipped_steps": self._skipped,
            **dict(zip(memory, dist.agree_on_max(*memory.values()), strict=True)),
            "goodput": goodput(seconds_by_cause),
            "seconds": seconds_by_cause,
        }
        self._sums.zero_()
        self._counters.zero_()
        self._steps_in_line = self._skipped = 0
        self._write(line)
        self.say(self._console_line(line))

    def event(self, kind: str, step: int, facts: dict) -> None:
        """Write a line to metrics.jsonl that is not a measurement, such as a bad step."""
        if self._outputs:
            with self._noting_problems():
                self._outputs.write({"kind": kind, "step": step, **facts})
                show_event(self._outputs.tensorboard, step, kind, facts)

    def show(self, kind: str, step: int, text: str) -> None:
        """Show an event in TensorBoard only, such as a resume."""
        if self._outputs:
            with self._noting_problems():
                show_event(self._outputs.tensorboard, step, kind, {"what": text})

    def show_lengths(self, lengths: Mapping[str, np.ndarray]) -> None:
        """Show the lengths in bytes of the stored training files of each source, or of MOST_LENGTHS of them."""
        if self._outputs:
            for source, values in lengths.items():
                with self._noting_problems():
                    some = _blocks_of(values, MOST_LENGTHS)
                    show_lengths(self._outputs.tensorboard, self.first_step, source, some)

    def show_answers(
        self, step: int, classes: Sequence[str], answers: Answers, key_of: Callable[[int, int], str], embedding: Tensor
    ) -> None:
        """Show pictures and tables of an evaluation; collective. `embedding` is empty if ZeRO 3 shards it."""
        gathered = answers.over_ranks()
        if self._outputs:
            with self._noting_problems():
                show_evaluation(self._outputs.tensorboard, step, classes, gathered, key_of)
                if len(embedding):
                    show_embedding(self._outputs.tensorboard, step, embedding)
                self._outputs.tensorboard.flush()

    def evaluation(self, step: int, result: dict, seconds: float, evaluated: str) -> None:
        """Write the scores that `evaluate` returned for the files `evaluated` (see `RunData`), and remember the step in
        `last_evaluation`."""
        self.last_evaluation = step
        self._write({"kind": "eval", "step": step, **result, "seconds": seconds, "evaluated": evaluated})
        self.say(f"step {step:>{len(str(self.total_steps))}} · evaluation: {describe_scores(result)} · {seconds:.1f} s")

    def say(self, line: str) -> None:
        """Print lines on the console, from rank 0."""
        if self.ranks.is_rank_zero:
            print("\n".join(map(one_line, line.split("\n"))), flush=True)

    def load_state_dict(self, state: dict) -> None:
        """Restore the sums since the last line from a checkpoint."""
        self._steps_in_line, self._skipped = state["steps"], state.get("skipped", 0)
        if self.ranks.is_rank_zero:
            sums = torch.tensor(state["sums"], dtype=torch.float64)
            self._sums[:, : sums.shape[1]] += sums  # earlier checkpoints have no sum of the content loss
            counters = state["counters"]
            counters = counters if isinstance(counters, dict) else {}  # older checkpoints have a list
            self._counters += torch.tensor([counters.get(n, 0) for n in COUNTER_NAMES], dtype=torch.float64)
            self._counters[SECONDS] *= self.ranks.world_size

    def state_dict(self) -> dict:
        """The sums since the last line, for a checkpoint; collective."""
        sums, counters = self._over_ranks()
        counters[SECONDS] /= self.ranks.world_size  # the run may resume with another number of ranks
        return {
            "steps": self._steps_in_line,
            "skipped": self._skipped,
            "sums": sums.tolist(),
            "counters": dict(zip(COUNTER_NAMES, counters.tolist(), strict=True)),
        }

    def restore_lines(self) -> None:
        """Write metrics.jsonl again if it was deleted, or changed or replaced by an editor. Otherwise checkpoints would
        lack lines, and the scores in them decide which checkpoints are kept."""
        if self._outputs is None:
            return
        path, lines, _ = self._outputs
        with self._noting_problems():
            if exists(path) and path.stat().st_size == lines.tell():
                return
            with replacing(path) as restored:
                lines.seek(0)
                shutil.copyfileobj(lines, restored, CHUNK_BYTES)
            self.say(f"{path} was deleted or changed while this run trains, so its lines are written again")

    def close(self) -> None:
        if self._outputs:
            with suppress(OSError):  # a full disk was reported before
                self._outputs.tensorboard.close()
                self._outputs.lines.close()

    def _over_ranks(self) -> tuple[Tensor, Tensor]:
        flat = torch.cat([self._sums.cpu().flatten(), self._counters])
        dist.sum_over_ranks(flat)
        return flat[:-COUNTERS].view(-1, COLUMNS), flat[-COUNTERS:]

    def _write(self, line: dict) -> None:
        if self._outputs is None:
            return
        with self._noting_problems():
            is_last = line["kind"] == "eval"  # a resume evaluates again if the line is missing in metrics.jsonl
            if not is_last:
                self._outputs.write(line)
            show_line(self._outputs.tensorboard, line)
            self._outputs.tensorboard.flush()
            if is_last:
                self._outputs.write(line)

    @contextmanager
    def _noting_problems(self) -> Iterator[None]:
        """Report a write error to the training loop, which ends the run on all ranks."""
        try:
            yield
        except OSError as error:
            what = f"metrics cannot be written: {error.strerror}; {remedy_of(error.errno)}"
            self.problem_code = EXIT_CRASHED if error.errno in TRANSIENT_ERRNOS else EXIT_STORAGE
            if isinstance(error, FileNotFoundError) and is_dir(self.run_dir):  # TensorBoard opens its file each time
                what = "tb was deleted while this run trains; the next start makes it again"
                self.problem_code = EXIT_CRASHED
            self.problem = f"{self.run_dir}: {what}"

    def _console_line(self, line: dict) -> str:
        step, total = line["step"], self.total_steps
        grad_norm = math.nan if line["grad_norm"] is None else line["grad_norm"]
        left_s = (total - step) * (time.perf_counter() - self._started) / max(1, step - self.first_step)
        return (
            f"step {step:>{len(str(total))}}/{total} · {describe_scores(line)} · lr {line['learning_rate']:.1e} · "
            f"grad {grad_norm:.2f} · {line['samples_per_s']:,.0f} samples/s · "
            f"{_rate(line['bytes_per_s'])} · {_clock(left_s)} left"
        )


def _rate(bytes_per_s: float) -> str:
    """0.82 MB/s; small files in kB/s, since they would show 0.00 MB/s"""
    return f"{bytes_per_s / 1e6:.2f} MB/s" if bytes_per_s >= 1e5 else f"{bytes_per_s / 1e3:.2f} kB/s"


def hyperparameters(config: Config) -> dict[str, int | float | str]:
    """The settings that TensorBoard's HParams tab shows for a run: the scalars of its config, by their dotted keys."""
    settings = typed_yaml.flatten(without_secrets(typed_yaml.to_tree(config)))
    parts = ("data.", "model.", "optim.", "train.")
    return {
        key: str(value) if isinstance(value, bool) else value
        for key, value in settings.items()
        if key.startswith(parts) and isinstance(value, int | float | str)
    }


def memory_figures(device: torch.device) -> dict[str, int]:
    """Peak memory of this process so far, on its GPU or in main memory. On a GPU also PyTorch's peak reserved memory,
    and how often PyTorch had to free its cache to find a block."""
    if device.type != "cuda":
        return {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    return {
        "peak_memory_mib": torch.cuda.max_memory_allocated(device) // MIB,
        "reserved_memory_mib": torch.cuda.max_memory_reserved(device) // MIB,
        "allocation_retries": torch.cuda.memory_stats(device)["num_alloc_retries"],
    }


def _open_lines(path: Path, first_step: int, skipped_steps: Collection[int]) -> tuple[IO[bytes], dict]:
    """Remove lines after the checkpoint that the run resumes from, except those of bad steps that are skipped.

    Returns a file without a name that holds the other lines, and the line of the latest evaluation; empty if there is
    none.
    """
    latest: dict = {}
    path.touch()
    copy = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 (until `Metrics.close`)
    with open_regular(path) as lines, replacing(path, durable=False) as kept:
        for text in lines:  # one at a time, since all lines of a long run may not fit into the memory
            line = parse_json_object(text, LINE)
            if line is None:
                continue
            if line["step"] <= first_step or (line["kind"] == BAD_STEP and line["step"] in skipped_steps):
                for file in (kept, copy):
                    file.write(text.removesuffix(b"\n") + b"\n")
                if line["kind"] == "eval" and line["step"] > latest.get("step", -1):
                    latest = line
    return copy, latest


def _without_tensorboard(hook: Callable) -> Callable:
    """Return a `threading.excepthook` that ignores an OSError in TensorBoard's thread, such as a full disk. `Metrics`
    meets the same error, reports it in one line and ends the run."""

    def told(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            hook(args)

    return told


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def _blocks_of(values: np.ndarray, most: int) -> np.ndarray:
    """At most `most` values, in BLOCKS blocks at equal distances, since they are read from a memory-mapped file."""
    if len(values) <= most:
        return values
    size = most // BLOCKS
    return np.concatenate(
        [values[first : first + size] for first in np.linspace(0, len(values) - size, BLOCKS, dtype=int)]
    )

"""Estimates of what a run will need, before it starts: memory of a rank, time, checkpoints, disk.

Operations are counted exactly (bfsys/model/flops.py) for the micro-batches of the first steps, which are planned as in
training. The time is these operations divided by a rate. The rate is that of a measured run (`--like`; it includes
waiting for data and for the slowest rank), or a chosen share of a GPU's peak. bfsys/run_time.py estimates
communication, saves, starts and failures. The memory is the sum of

    weights, gradients, moments and the average (if there is one), by ZeRO stage, with the moments in float32; Muon has
    one moment for its matrices, where AdamW has two
    activations of the largest micro-batch: 16 dim numbers for each token of each layer (what the norms, qkv, attention,
    and the MLP's two products keep for their backward), or dim of each layer and 16 dim of the widest one with
    activation checkpointing; 1.5 dim for each token that is merged; and half as much again as the widest layer keeps,
    while its backward runs

It does not include the memory of CUDA, NCCL and the allocator.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bfsys.checkpoint.files import METRICS
from bfsys.checkpoint.loading import newest_readable
from bfsys.checkpoint.retention import evaluations
from bfsys.config import Config, load_config
from bfsys.data.streaming.plan import lane_groups, lanes_of_rank
from bfsys.data.streaming.run_data import RunData
from bfsys.errors import UserError, counted
from bfsys.files import exists, is_file
from bfsys.json_lines import NUMBER, Fields, read_json_lines_backwards
from bfsys.micro_batches import micro_batches_of
from bfsys.model.byteformer import muon_count, parameter_count
from bfsys.model.flops import flops_per_step
from bfsys.model.layout import token_counts
from bfsys.run_time import RunTime, sent_bytes
from bfsys.supervision.goodput import count_starts, read_seconds

LAST_LINES = 50  # lines of metrics.jsonl whose median is the rate of a measured run
KEPT_PER_TOKEN = 16  # saved numbers per token and layer, divided by dim
KEPT_PER_MERGED = 3  # the same per merged pair: the pair, and the input of the norm
GB = 1e9
REACHED = ((192, 0.10), (384, 0.22), (768, 0.36))  # (dim, share of an H200's peak) of tiny, small and base


@dataclass(frozen=True)
class Estimate:
    """The needs of a run. Figures are per rank unless stated otherwise; memory is in bytes, times are in seconds."""

    ranks: int
    micro_batches: int
    """Number of micro-batches per step on each rank."""
    parameters: int
    """Those of the model that answers, without the content head."""
    state_bytes: int
    """Memory of weights, gradients, moments and average."""
    activation_bytes: int
    sent_bytes: float
    """Bytes that a rank sends in a step, for gradients and weights."""
    step_flops: float
    """Operations of a step on all ranks together, as a mean over the first steps."""
    busiest: float
    """Operations of the busiest rank in a step, relative to the mean of the ranks."""
    step_bytes: float
    """Bytes of files that all ranks together read in a step, as a mean over the first steps."""
    checkpoint_bytes: int
    steps: int

    @property
    def memory_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes

    def step_s(self, flops_per_s: float) -> float:
        """Seconds of a step if a rank computes at this mean rate in FLOP/s."""
        return self.step_flops / self.ranks / flops_per_s

    def describe(self) -> str:
        """A readable summary in one line."""
        who = f"each of {self.ranks:,} ranks" if self.ranks > 1 else "the rank"
        return (
            f"{self.parameters:,} parameters; {who} needs {self.memory_bytes / GB:.2f} GB "
            f"({self.state_bytes / GB:.2f} state, {self.activation_bytes / GB:.2f} activations at most); "
            f"a step is {counted(self.micro_batches, 'micro-batch')} of each rank, "
            f"{self.step_flops / 1e12:.2f} TFLOP and {self.step_bytes / 1e6:.1f} MB of files; "
            f"a rank sends {self.sent_bytes / 1e6:.1f} MB; "
            f"a checkpoint {self.checkpoint_bytes / GB:.2f} GB"
        )


def estimate(data: RunData, ranks: int, *, on_gpu: bool) -> Estimate:
    """Estimate the needs of a run on a number of ranks. Raises UserError if the ranks do not divide the lanes."""
    config = data.config
    lanes_of_ranks = [lanes_of_rank(config.data.lanes, rank, ranks) for rank in range(ranks)]
    architecture, classes = config.model.architecture(), len(data.training.classes)
    trained = parameter_count(architecture, classes, with_content=config.content_weight > 0)
    moments = trained + (trained - muon_count(architecture) if config.optim.name == "muon" else trained)
    steps = data.first_steps()
    tokens = [[int(token_counts(of.lengths, architecture, config.model.mode).sum()) for of in lanes] for lanes in steps]
    micro_batches = micro_batches_of(len(lanes_of_ranks[0]), max(map(max, tokens)), config, on_gpu=on_gpu)
    groups = [group for mine in lanes_of_ranks for group in lane_groups(mine, micro_batches)]
    largest = max(sum(of_step[lane] for lane in group) for of_step in tokens for group in groups)
    # By micro-batch and not by lane, since each computes the stem's table once
    flops = [
        flops_per_step(np.concatenate([lanes[lane].lengths for lane in group]), architecture, classes).total
        for lanes in steps
        for group in groups
    ]
    of_ranks = np.array(flops, np.float64).reshape(len(steps), ranks, -1).sum(2)  # [steps, ranks]
    return Estimate(
        ranks=ranks,
        micro_batches=micro_batches,
        parameters=parameter_count(architecture, classes),
        state_bytes=_state_bytes(config, trained, moments, ranks),
        activation_bytes=_activation_bytes(config, largest),
        sent_bytes=sent_bytes(
            config.train.zero_stage,
            trained,
            ranks,
            micro_batches,
            bf16=config.train.precision == "bf16",
            muon_parameters=muon_count(architecture) if config.optim.name == "muon" else 0,
        ),
        step_flops=float(of_ranks.sum(1).mean()),
        busiest=float(np.mean(of_ranks.max(1) / of_ranks.mean(1))),
        step_bytes=float(np.mean([sum(of.stored_bytes for of in lanes) for lanes in steps])),
        checkpoint_bytes=4 * ((1 + (config.optim.ema_decay > 0)) * trained + moments),
        steps=config.train.steps,
    )


def _state_bytes(config: Config, parameters: int, moments: int, ranks: int) -> int:
    """The bytes of the state on a rank. The optimizer holds float32 weights, moments (`moments` numbers) and the
    average, if the run keeps one: see `bfsys.engine.deepspeed_config`."""
    stage, is_small = config.train.zero_stage, config.train.precision == "bf16" and config.train.zero_stage > 0
    weights = 2 if is_small else 4
    optimizer = 4 * (moments + (is_small + (config.optim.ema_decay > 0)) * parameters)
    share = [1, 1, 1, 1]  # divisors: weights, gradients, gradients that are accumulated in float32, optimizer
    for part in {0: (), 1: (3,), 2: (1, 2, 3), 3: (0, 1, 2, 3)}[stage]:
        share[part] = ranks
    each = (weights * parameters, weights * parameters, 4 * parameters if is_small else 0, optimizer)
    return sum(-(-size // of) for size, of in zip(each, share, strict=True))


def _activation_bytes(config: Config, tokens: int) -> int:
    architecture = config.model.architecture()
    number = 2 if config.train.precision == "bf16" else 4
    of_layers = [
        tokens >> sum(merge < layer for merge in architecture.merge_after) for layer in range(architecture.layers)
    ]
    kept = KEPT_PER_TOKEN * max(of_layers)
    kept = kept + sum(of_layers) if config.model.activation_checkpointing else KEPT_PER_TOKEN * sum(of_layers)
    kept += sum(KEPT_PER_MERGED * of_layers[layer] // 2 for layer in architecture.merge_after)
    return number * architecture.dim * (kept + KEPT_PER_TOKEN * max(of_layers) // 2)


@dataclass(frozen=True)
class Measured:
    """Measurements of a trained run, from which the time of another run is estimated."""

    config: Config
    ranks: int
    flops_per_s: float
    """The rate of a rank: the median of the latest measurements, including waits for data and for the busiest rank."""
    flops_per_byte: float
    """Operations of a step divided by the bytes that it read."""
    checkpoint_bytes: int
    save_s: float
    """The time that training waits for a checkpoint."""
    restart_s: float
    """Time from a start to its first step, as a mean over all starts."""
    evaluation_s: float
    """Median time of an evaluation; 0 if there was none."""


def measured(run: Path) -> Measured:
    """Measurements of a run. Raises UserError if there is no run, or if it has no checkpoint, metrics or record of its
    time."""
    if not is_file(run / "config.yaml"):
        got = "there is no such folder" if not exists(run) else "it has no config.yaml"
        raise UserError(f"--like {run}: {got}; give the folder of a run that was trained, such as runs/NAME")
    config = load_config(run / "config.yaml")
    rates: Fields = {"step": int, "model_tflop_per_s": NUMBER, "bytes_per_s": NUMBER}
    train = list(itertools.islice(read_json_lines_backwards(run / METRICS, rates), LAST_LINES))
    evaluation_s = [one["seconds"] for one in evaluations(run).values() if isinstance(one.get("seconds"), NUMBER)]
    path, *_ = newest_readable(run)
    starts = count_starts(run)
    for is_there, what in ((train, "steps in metrics.jsonl"), (starts, "start in goodput.jsonl"), (path, "checkpoint")):
        if not is_there:
            raise UserError(f"--like {run}: the run has no {what} yet; train it for a few steps and a checkpoint first")
    assert path
    files = list(path.glob("*-of-*.safetensors"))
    ranks = max(int(file.stem.rpartition("-of-")[2]) for file in files)
    flops_per_s = [1e12 * line["model_tflop_per_s"] for line in train]
    seconds = read_seconds(run)
    return Measured(
        config=config,
        ranks=ranks,
        flops_per_s=float(np.median(flops_per_s)) / ranks,
        flops_per_byte=sum(flops_per_s) / max(1.0, sum(line["bytes_per_s"] for line in train)),
        checkpoint_bytes=sum(file.stat().st_size for file in files),
        save_s=seconds["stall"] / max(1.0, train[0]["step"] / config.train.save_every),
        restart_s=seconds["restart"] / starts,
        evaluation_s=float(np.median(evaluation_s)) if evaluation_s else 0.0,
    )


def run_time(plan: Estimate, config: Config, like: Measured | None, step_s: float) -> RunTime:
    """The time of all steps. With `like`, a measured run, it also includes saves (scaled by the bytes per rank),
    evaluations (scaled by the operations per byte) and starts."""
    train = config.train
    if not like:
        return RunTime(steps=train.steps, step_s=step_s, save_every=train.save_every)
    evaluation_s = like.evaluation_s * like.ranks / plan.ranks
    evaluation_s *= plan.step_flops / max(1.0, plan.step_bytes) / like.flops_per_byte
    return RunTime(
        steps=train.steps,
        step_s=step_s,
        save_every=train.save_every,
        save_s=like.save_s * plan.checkpoint_bytes / plan.ranks / (like.checkpoint_bytes / like.ranks),
        evaluations_s=evaluation_s * (-(-train.steps // train.eval_every) if train.eval_every else 1),
        restart_s=like.restart_s,
    )


def usual_utilisation(dim: int) -> float:
    """The share of an H200's peak that training reached on TIFFs in large enough batches (docs/performance.md)."""
    dims, shares = zip(*REACHED, strict=True)
    return float(np.interp(np.log(dim), np.log(dims), shares))

"""DeepSpeed behind five operations: forward, backward, step, read state, write state.

This is the only file that uses DeepSpeed; the local launcher merely imports it before it forks. DeepSpeed's JSON is
made here from the typed config and nowhere else, because DeepSpeed silently ignores misspelt top-level keys.

The gradient of a step is that of the mean loss over the global batch, at every stage and world size. To this end each
micro-batch contributes its *sum* of losses, scaled for the averaging that DeepSpeed does over ranks and micro-batches.
"""

from __future__ import annotations

import importlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bfsys import dist
from bfsys.batch import ByteBatch
from bfsys.config import Config
from bfsys.dist import Ranks
from bfsys.model.byteformer import Block, ByteFormer, Merge
from bfsys.model.flops import synchronize
from bfsys.model.precision import product_dtype
from bfsys.muon import Span
from bfsys.optim import EMA, Held, Optimizer

WEIGHT = "weight"
BUCKET_ELEMENTS = 500_000_000  # gradient elements that are reduced together; DeepSpeed's default
# The square of a greater norm overflows in float32. Stage 3 reports such norms as finite, the other stages do not.
LARGEST_NORM = math.sqrt(torch.finfo(torch.float32).max)


class StateValues(Protocol):
    """Tensors by parameter name: a dict, or tensors that ranks exchange on demand (checkpoint/loading.py)."""

    def __getitem__(self, name: str) -> Tensor: ...


class Engine:
    """A model in training. A step is `micro_batches` pairs of `forward` and `backward`, then one `step`."""

    def __init__(self, model: ByteFormer, config: Config, ranks: Ranks, micro_batches: int | None = None) -> None:
        """Every rank must pass the same model and the same number of `micro_batches` per step (default: one per lane).
        The model is moved to the rank's device and, below fp32, cast."""
        deepspeed = import_deepspeed()
        self.micro_batches = micro_batches or config.data.lanes // ranks.world_size
        self.stage, self.device = config.train.zero_stage, ranks.device
        self.ranks = ranks
        self.uses_autocast = self.stage == 0 and config.train.precision == "bf16"
        self.updates = 0  # steps that changed the weights
        self._loss_scale = ranks.world_size * self.micro_batches / config.data.batch_samples
        self._clip_norm = config.optim.clip_norm
        self.optimizer = Optimizer(model, config.optim)
        if self.stage == 3:  # a block does not call its parts as modules, so its parameters are gathered together
            deepspeed.utils.set_z3_leaf_modules(model, [Block, Merge])
        # A bf16 engine of stage 0 sets this for the whole process. A later engine of stage 3 would then reduce
        # gradients differently.
        deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
        deepspeed.init_distributed(dist_backend="nccl" if self.device.type == "cuda" else "gloo")
        with redirect_stdout(io.StringIO()):  # it prints memory statistics at any log level
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.optimizer,
                config=deepspeed_config(
                    config, ranks.world_size, self.micro_batches, sum(p.numel() for p in model.parameters())
                ),
                dist_init_required=False,
            )
        self._shapes = {name: _whole_shape(p) for name, p in self._engine.module.named_parameters()}
        asked = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        # Nodes may have different processors, but ranks must agree on the dtype, since they exchange operands.
        (is_wide,) = dist.agree_on_max(product_dtype(asked, self.device.type) == torch.float32)
        products = torch.float32 if is_wide else asked
        self.optimizer.init_state(self._updated_together(), list(self._held()), ranks, products)
        if self.stage in (1, 2):
            # DeepSpeed sets up its access to the state by name after the first step; a resume needs it before.
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def forward(self, batch: ByteBatch) -> Any:
        """The model's output for a batch: logits [B, classes], or a pair if it has content; collective at stage 3."""
        return self._engine(batch)

    def backward(self, loss_sum: Tensor) -> None:
        """Add the gradient of a micro-batch's summed loss; NaN if the loss is non-finite."""
        self._engine.backward(loss_sum * (self._loss_scale + 0 * loss_sum.detach()))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the micro-batch; `step` makes the update

    def step(self, learning_rate: float, ema_decay: float) -> float:
        """Update the weights and their average; returns the norm of the global gradient before clipping.

        If the norm is NaN or its square overflows in float32, all ranks return a non-finite norm, and weights, moments
        and average do not change at all.
        """
        norm = None
        if self.stage == 0:  # gradients are whole on every rank, and DeepSpeed reports no norm
            limit = self._clip_norm or float("inf")
            norm = float(nn.utils.clip_grad_norm_(self._engine.module.parameters(), limit))
        self.optimizer.prepare(learning_rate, ema_decay, skips=lambda: self._is_too_large(norm))
        self._engine.step()  # at stages 1 to 3 it skips non-finite norms itself (in fp32 since 0.19.8)
        norm = float(self._engine.get_global_grad_norm()) if norm is None else norm
        norm = math.inf if norm > LARGEST_NORM else norm
        self.updates += math.isfinite(norm)
        return norm

    def _is_too_large(self, norm: float | None) -> bool:
        """Whether a step with this norm of the gradient must change nothing; None if DeepSpeed computes the norm."""
        if self.stage == 3:
            norm = float(self._engine.optimizer._global_grad_norm)
        return norm is not None and not norm <= LARGEST_NORM

    def state_names(self) -> tuple[str, ...]:
        """The state of parameters: the float32 weight and the optimizer's tensors."""
        return (WEIGHT, *self.optimizer.state_names)

    def parameter_shapes(self, state: str) -> dict[str, tuple[int, ...]]:
        """Whole shapes by name of the parameters that have a state, also if this rank holds only parts (stage 3)."""
        has = self.optimizer.has_state
        return {name: shape for name, shape in self._shapes.items() if state == WEIGHT or has(name, state)}

    def read_pieces(self, state: str) -> Iterator[tuple[str, int, Tensor]]:
        """This rank's pieces of a state: (parameter name, number of the first element, float32 [elements]).

        There is no communication. The pieces of all ranks contain each element of the state once.
        """
        names = self.parameter_shapes(state)
        parts = [held for held in self.optimizer.held if held.span.name in names]
        ranks, total, start = self.ranks, sum(held.span.end - held.span.first for held in parts), 0
        share = [total * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1)]
        for held in parts:
            name, first, end = held.span
            value = held.of(self._values(held.tensor, state))
            if self.stage == 0:  # every rank has the whole state; it returns a contiguous share of all parameters
                size = end
                first, end = (min(max(bound - start, 0), size) for bound in share)
                value, start = value[first:end], start + size
            if value.numel():
                yield name, first, value

    def write_state(self, state: str, values: StateValues) -> None:
        """Set whole tensors, `values[parameter name]`, on every rank. Each is looked up once."""
        if self.stage == 3:
            self._drop_gathered()
        held: dict[str, Held] = {part.span.name: part for part in self.optimizer.held}
        for name in self.parameter_shapes(state):
            value = values[name]  # on all ranks, since the look-up may be collective
            if part := held.get(name):
                span = value.flatten()[part.span.first : part.span.end]
                part.of(self._values(part.tensor, state)).copy_(span)
        if state == WEIGHT and self.stage > 0:
            self._copy_to_model(WEIGHT)
        synchronize(self.device)  # the stream on which ZeRO-3 gathers weights does not wait for copies into them

    def _values(self, tensor: Tensor, state: str) -> Tensor:
        return tensor if state == WEIGHT else self.optimizer.state[tensor][state]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context, the model computes with the average of its weights, if the run keeps one. Afterwards its
        weights are restored exactly. Collective."""
        if EMA not in self.optimizer.state_names:
            yield
            return
        parameters = list(self._engine.module.parameters())
        kept = [p.detach().clone() for p in parameters if self.stage == 0]  # of which there is no other copy
        if self.stage == 0:
            for p in parameters:
                p.data.copy_(self.optimizer.state[p][EMA])
        else:
            self._copy_to_model(EMA)
        synchronize(self.device)
        try:
            yield
        finally:
            if self.stage == 0:
                for p, value in zip(parameters, kept, strict=True):
                    p.data.copy_(value)
            else:
                self._copy_to_model(WEIGHT)
            synchronize(self.device)

    def _drop_gathered(self) -> None:
        """Stage 3: drop parameters that were prefetched for the next step, which would keep their old values."""
        self._engine.optimizer.checkpoint_event_prologue()

    def set_step(self, step: int, updates: int) -> None:
        """Continue after `step` steps. The optimizer's bias correction counts the `updates`, without skipped steps."""
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(updates)
        self._engine.global_steps, self.updates = step, updates

    def _updated_together(self) -> list[tuple[bool, list[Tensor]]]:
        """The tensors that one call of the optimizer's step updates, and whether Muon does: the weights, or this rank's
        parts of them in float32."""
        groups, zero = self.optimizer.param_groups, self._engine.optimizer
        if self.stage == 3:
            of_groups = [groups[i] for i in zero.sub_group_to_group_id.values()]
            tensors = zero.fp32_partitioned_groups_flat
            return [(group["is_muon"], [flat]) for group, flat in zip(of_groups, tensors, strict=True)]
        return [(group["is_muon"], group["params"]) for group in groups]

    def _held(self) -> Iterator[Held]:
        """The pieces of each parameter that this rank updates, and where DeepSpeed stores them."""
        parameters = dict(self._engine.module.named_parameters())
        names, zero = {p: name for name, p in parameters.items()}, self._engine.optimizer
        groups = self.optimizer.param_groups
        if self.stage == 0:
            for name, p in parameters.items():
                yield Held(Span(name, 0, p.numel()), p, 0)
        elif self.stage == 3:  # each parameter is divided into equal parts; the last ones are padded
            for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
                offset = 0
                for p in group:
                    length, elements = p.partition_numel(), math.prod(_whole_shape(p))
                    first = self.ranks.rank * length
                    if first < elements:
                        yield Held(Span(names[p], first, min(first + length, elements)), flat, offset)
                    offset += length
        else:  # the parameters of a group are concatenated, and the ranks hold equal parts
            for name, p in parameters.items():
                if mapping := p._hp_mapping:
                    span, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                    (flat,) = groups[mapping.param_group_index]["params"]
                    yield Held(Span(name, span.start, span.start + span.numel), flat, place.start)

    def _copy_to_model(self, state: str) -> None:
        """Round a float32 state to the model's precision, as DeepSpeed does with the weights after a step. Not for
        stage 0."""
        zero = self._engine.optimizer
        if self.stage == 3:
            self._drop_gathered()
            for i, group in enumerate(zero.fp32_partitioned_groups_flat):
                zero.fp16_partitioned_groups_flat[i].data.copy_(self._values(group, state).data)
                zero._unflatten_partitioned_parameters(i)
        else:
            for p in self._engine.module.parameters():
                p.data.copy_(p.get_full_hp_param(None if state == WEIGHT else state))


def _whole_shape(p: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(p, "ds_shape", p.shape))


def deepspeed_config(config: Config, world_size: int, micro_batches: int, parameters: int) -> dict:
    """DeepSpeed's config for a run with `micro_batches` per step and a model with this number of `parameters`."""
    stage, bf16 = config.train.zero_stage, config.train.precision == "bf16"
    result: dict = {
        # DeepSpeed counts batches, not samples, since ragged micro-batches have no fixed size.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": world_size * micro_batches,
        "gradient_clipping": config.optim.clip_norm if stage else 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,  # this is bfsys.optim.Optimizer
        # DeepSpeed allocates buffers of this many elements, by default 2 GB, even for a small model.
        "zero_optimization": {"stage": stage, "reduce_bucket_size": min(BUCKET_ELEMENTS, parameters)},
        # The timer's figures are not used, and it synchronises with the GPU twice per micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
    if bf16 and stage == 0:
        # DeepSpeed's bf16 at stage 0 has no float32 weights; autocast keeps them.
        result["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif bf16:
        result["bf16"] = {"enabled": True}
        result["data_types"] = {"grad_accum_dtype": "fp32"}
        # By default, gradients are summed over ranks in bfloat16, which loses more precision with more ranks.
        result["communication_data_type"] = "fp32"
    return result


def import_deepspeed() -> ModuleType:
    """Import DeepSpeed without its warnings. The first import takes seconds."""
    if not os.environ.get("DS_ACCELERATOR"):
        os.environ.pop("DS_ACCELERATOR", None)  # DeepSpeed rejects an empty value
        if not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 uses names that are deprecated in PyTorch 2.14, at stage 3 several times per step.
    old_names = r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated"
    warnings.filterwarnings("ignore", old_names, FutureWarning)
    import deepspeed

    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # DeepSpeed probes all of its operators when this table is imported. On a GPU, the probe looks for nvcc and
        # prints useless warnings.
        from deepspeed.ops import __compatible_ops__

        # An all-reduce for inference, which training never calls. Its build takes 25 s and needs a compiler.
        __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)  # its warnings are about intended settings
    _import_muon_uncompiled()
    return deepspeed


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which DeepSpeed imports to check the class of an optimizer, without torch.compile.

    Its module compiles a function, which imports PyTorch's compiler: 700 modules, which take 2 s. bfsys has its own
    Muon and never calls the function, so it need not be compiled.
    """
    compiler = torch.compile
    torch.compile = lambda function, *_, **__: function  # type: ignore[assignment]
    try:
        with suppress(ImportError):  # other versions may have another path
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        torch.compile = compiler

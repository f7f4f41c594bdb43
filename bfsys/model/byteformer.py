"""ByteFormer (Horton et al. 2023, arXiv 2306.00238) on ragged batches.

Two modes share all weights. `masked`: padding and window borders never change an answer; a file's logits do
not depend on its neighbours. `as_released`: the arithmetic of Apple's released code on one file at a time
(blank window slots take part, shifts wrap around, a tail shorter than the stride is dropped), for weights
that were trained with it.

Shapes: N tokens of the whole batch, D dim, B files.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from bfsys.batch import ByteBatch
from bfsys.errors import UserError
from bfsys.model.attention import attend
from bfsys.model.chunked import CHUNK_TOKENS, ChunkedMLP, rows_of
from bfsys.model.content_head import ContentHead
from bfsys.model.layout import AS_RELEASED, MASKED, MODES, Layout, Segments, Windows, make_layout
from bfsys.model.norm import add_norm
from bfsys.model.pool import AttentionPool, MeanPool
from bfsys.model.precision import LayerNorm, Linear, is_native_bfloat16
from bfsys.model.sizes import MLP_RATIO, Architecture
from bfsys.model.stem import Stem


class Block(nn.Module):
    """Pre-norm attention and MLP, [N, D] -> [N, D]; rows outside all windows are undefined."""

    def __init__(self, dim: int, heads: int, mode: str) -> None:
        super().__init__()
        self.heads, self.mode = heads, mode
        self.activation_checkpointing = False
        self.norm1 = LayerNorm(dim)
        self.qkv = Linear(dim, 3 * dim)  # rows: all queries, all keys, all values; head by head in each
        self.proj = Linear(dim, dim)
        self.norm2 = LayerNorm(dim)
        self.fc1 = Linear(dim, MLP_RATIO * dim)
        self.fc2 = Linear(MLP_RATIO * dim, dim)

    def forward(self, x: Tensor, where: Segments | Windows) -> Tensor:
        checkpointing = self.activation_checkpointing and torch.is_grad_enabled()
        keeps_nothing = checkpointing or not torch.is_grad_enabled()
        if x.device.type == "cpu" and isinstance(where, Segments) and keeps_nothing:
            trainable = [p for p in self.parameters() if p.requires_grad]
            return _InChunks.apply(x, self, where.in_chunks(CHUNK_TOKENS), *trainable)
        if checkpointing:
            # A block draws no random numbers, so the state of the generator need not be saved.
            return checkpoint(self.compute, x, where, use_reentrant=False, preserve_rng_state=False)
        return self.compute(x, where)

    def compute(self, x: Tensor, where: Segments | Windows) -> Tensor:
        blank_qkv = None
        if self.mode == AS_RELEASED:  # a blank slot enters the block as a zero row, to which the norm is applied
            blank_qkv = self.qkv(self.norm1(x.new_zeros(1, x.shape[1])))[0]
        x, qkv = self.before_attention(x)
        return self.after_attention(x, attend(qkv, where, self.heads, blank_qkv))

    def before_attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, normed = add_norm(self.norm1, x)
        return x, self.qkv(normed)

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        x, normed = add_norm(self.norm2, x, self.proj(attended))
        return x + self.mlp(normed)

    def mlp(self, x: Tensor) -> Tensor:
        if not is_native_bfloat16(x) or torch.compiler.is_compiling():
            return self.fc2(F.gelu(self.fc1(x)))
        weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        with torch.autocast("cpu", enabled=False):
            return ChunkedMLP.apply(x, *(w.to(x.dtype) for w in weights))

    def compile_parts(self) -> None:
        """Compile the parts around attention, for any number of tokens. Blocks of equal shapes share the code."""
        for name in ("before_attention", "after_attention"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=True))


class _InChunks(torch.autograd.Function):
    """`Block.compute` on one chunk of tokens after the other; the backward pass recomputes each chunk.

    The activations inside a block therefore take the memory of one chunk, however long the files are. Gradients of
    weights are summed in at least float32. Rejected alternative: PyTorch's checkpoint on each chunk. Its results
    fragmented the heap of the C library, which then took several times the memory.
    """

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, x: Tensor, block: Block, chunks: tuple[Windows, ...], *trainable: nn.Parameter) -> Tensor:
        ctx.save_for_backward(x)
        ctx.block, ctx.chunks, ctx.trainable = block, chunks, trainable
        out = torch.empty_like(x)
        for rows, chunk in rows_of(chunks):
            out[rows] = block.compute(x[rows], chunk)
        return out

    @staticmethod
    @custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        x_grad, trainable = torch.empty_like(x), ctx.trainable
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trainable]
        for rows, chunk in rows_of(ctx.chunks):
            part = x[rows].detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.block.compute(part, chunk)
            x_grad[rows], *grads = torch.autograd.grad(out, (part, *trainable), grad[rows])
            for total, of_chunk in zip(sums, grads, strict=True):
                total += of_chunk
        return x_grad, None, None, *(total.to(p.dtype) for total, p in zip(sums, trainable, strict=True))


class Merge(nn.Module):
    """Merges pairs of tokens, [N, D] -> [N / 2, D]; the norm comes after the projection, as published."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = Linear(2 * dim, dim, bias=False)
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor, rounding: Tensor) -> Tensor:
        if len(rounding):  # an odd last token must be merged with zeros
            x = x.index_fill(0, rounding, 0)
        return add_norm(self.norm, self.reduction(x.view(len(x) // 2, -1)))[1]


class ByteFormer(nn.Module):
    """ByteBatch of B files -> logits [B, classes]."""

    def __init__(
        self,
        architecture: Architecture,
        num_classes: int,
        mode: str = MASKED,
        activation_checkpointing: bool = False,
        compiled: bool = False,
        init: str = "published",
        with_content: bool = False,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise UserError(f"mode: got {mode!r}; allowed: {', '.join(MODES)}")
        self.architecture, self.mode = architecture, mode
        dim = architecture.dim
        self.stem = Stem(architecture, init)
        blocks = [Block(dim, architecture.heads, mode) for _ in range(architecture.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.merges = nn.ModuleDict({str(layer): Merge(dim) for layer in architecture.merge_after})
        for block in blocks:
            block.activation_checkpointing = activation_checkpointing
            if compiled:
                block.compile_parts()
        self.norm = LayerNorm(dim)
        self.pool = AttentionPool(dim) if architecture.pool == "attention" else MeanPool()
        self.head = nn.Linear(dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Created last, so that the other weights of a seed do not depend on it
        self.content_head = ContentHead(dim) if with_content else None

    def stacks(self) -> dict[str, tuple[int, int, int]]:
        """The parameters that Muon updates, by name, each as a stack of matrices: (number, rows, columns).

        These are the maps between channels of tokens. Queries, keys and values have one matrix each. The stem's kernel
        is one matrix, from all bytes of a token to its channels.
        """
        stacks = {"stem.kernel": (1, len(self.stem.kernel), self.stem.kernel[0].numel())}
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                matrices = 3 if name.endswith(".qkv") else 1
                stacks[f"{name}.weight"] = (matrices, module.out_features // matrices, module.in_features)
        return stacks

    def forward(self, batch: ByteBatch) -> Tensor | tuple[Tensor, Tensor]:
        """Logits; for a batch with content, logits and the content head's error of each file [B]."""
        x, counts = self.last_tokens(batch)
        logits = self.head(self.pool(x, counts))
        if batch.content is None or self.content_head is None:
            return logits
        return logits, self.content_head(x, counts, batch.content)

    def features(self, batch: ByteBatch) -> Tensor:
        """[B, D]: the pooled tokens of each file, which are the input of the head."""
        return self.pool(*self.last_tokens(batch))

    def last_tokens(self, batch: ByteBatch) -> tuple[Tensor, Tensor]:
        """Tokens after the last norm, one file after the other, and how many each file has: [N, D] and [B]."""
        layout = make_layout(batch.lengths, self.architecture, self.mode).to(batch.data.device)
        return self._blocks_and_norm(self.stem(batch.data, layout.files), layout), layout.tokens

    def features_of_tokens(self, x: Tensor, layout: Layout) -> Tensor:
        """[B, D], from the stem's tokens [N, D] of files at the positions in `layout`."""
        return self.pool(self._blocks_and_norm(x, layout), layout.tokens)

    def _blocks_and_norm(self, x: Tensor, layout: Layout) -> Tensor:
        rounding = iter(layout.rounding)
        for layer, block in enumerate(self.blocks):
            x = block(x, layout.layers[layer])
            if str(layer) in self.merges:
                x = self.merges[str(layer)](x, next(rounding))
        return self.norm(x)


def parameter_count(architecture: Architecture, num_classes: int, *, with_content: bool = False) -> int:
    """The number of parameters of such a model. It is not built."""
    with torch.device("meta"):
        model = ByteFormer(architecture, num_classes, with_content=with_content)
    return sum(p.numel() for p in model.parameters())


def muon_count(architecture: Architecture) -> int:
    """The number of parameters that Muon updates, if it is the optimizer."""
    with torch.device("meta"):
        return sum(math.prod(stack) for stack in ByteFormer(architecture, 1).stacks().values())

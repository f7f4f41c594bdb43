"""ByteFormer in its published implementation, with which bench_step.py and check-gpu compare bfsys.

This is the computation of the released code in plain form: a batch padded to its longest file, an embedding, a strided
convolution, whole sequences rolled and cut into windows, score matrices with a float32 softmax, masks added to them,
pairs unfolded and merged. Here the masks have an effect (those of the released code have none, and cost as much), so
the logits equal those of bfsys for the same weights. A batch is padded by up to a kernel more than its longest file, so
that the convolution reaches the last byte as in bfsys.

With `fused_attention`, attention uses `scaled_dot_product_attention`, the most obvious improvement.

Rejected baseline: tests/model/reference.py, which is written for readability; its loops over heads and tokens would
make bfsys look too fast.

    B files   L bytes with padding   T tokens   D channels   H heads   E = D / H
    N windows of all files   W tokens per window
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bfsys.model.sizes import BYTE_VALUES, MLP_RATIO, PAD_BYTE, Architecture

PAD = -1
NEVER = float("-inf")


def pad(files: Sequence[np.ndarray], architecture: Architecture) -> Tensor:
    """Files as int32 [B, L], padded with -1 on the right."""
    stride, kernel = architecture.stride, architecture.kernel
    longest = max(len(file) for file in files)
    padded = np.full((len(files), (-(-longest // stride) - 1) * stride + kernel), PAD, np.int32)
    for row, file in zip(padded, files, strict=True):
        row[: len(file)] = file
    return torch.from_numpy(padded)


class PublishedBlock(nn.Module):
    """Pre-norm attention and MLP on windows, including padding: [N, W, D] -> [N, W, D]."""

    def __init__(self, dim: int, heads: int, fused_attention: bool) -> None:
        super().__init__()
        self.heads, self.fused_attention = heads, fused_attention
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.proj(self.attention(self.qkv(self.norm1(x)), mask))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    def attention(self, qkv: Tensor, mask: Tensor) -> Tensor:  # [N, W, 3D], [N, 1, W, W] -> [N, W, D]
        count, window, _ = qkv.shape
        q, k, v = qkv.reshape(count, window, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [N, H, W, E]
        if self.fused_attention:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.mT + mask  # [N, H, W, W]
            wide = scores if scores.dtype == torch.float64 else scores.float()
            out = wide.softmax(dim=-1).to(scores.dtype) @ v
        return out.transpose(1, 2).reshape(count, window, -1)


class PublishedMerge(nn.Module):
    """Merges pairs of tokens, [B, T, D] -> [B, ceil(T / 2), D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(2 * dim, dim, bias=False)  # features c0t0, c0t1, c1t0, …
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        x = x.masked_fill(padding[:, :, None], 0)
        odd = x.shape[1] % 2
        x, padding = F.pad(x, (0, 0, 0, odd)), F.pad(padding, (0, odd), value=True)
        pairs = x.unfold(1, 2, 2).flatten(2)  # [B, T / 2, 2D]
        return self.norm(self.reduction(pairs)), padding.unfold(1, 2, 2).all(2)


class PublishedForm(nn.Module):
    """Padded bytes, int [B, L] -> logits [B, classes]."""

    def __init__(self, architecture: Architecture, num_classes: int, fused_attention: bool = False) -> None:
        super().__init__()
        self.architecture = a = architecture
        self.embedding = nn.Embedding(BYTE_VALUES + 1, a.dim, padding_idx=PAD_BYTE)
        self.conv = nn.Conv1d(a.dim, a.dim, a.kernel, stride=a.stride, bias=False)
        self.positions = nn.Parameter(torch.randn(a.max_tokens, a.dim) * a.dim**-0.5)
        self.blocks = nn.ModuleList(PublishedBlock(a.dim, a.heads, fused_attention) for _ in range(a.layers))
        self.merges = nn.ModuleDict({str(layer): PublishedMerge(a.dim) for layer in a.merge_after})
        self.norm = nn.LayerNorm(a.dim)
        self.head = nn.Linear(a.dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        stride = self.architecture.stride
        tokens = self.conv(self.embedding(torch.where(x == PAD, PAD_BYTE, x)).mT).mT  # [B, T, D]
        padding = x[:, ::stride][:, : tokens.shape[1]] == PAD  # [B, T]: padding is on the right
        tokens = tokens + self.positions[: tokens.shape[1]]
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, PublishedBlock)
            tokens = self.windowed(block, self.architecture.shifts[layer], tokens, padding)
            if str(layer) in self.merges:
                tokens, padding = self.merges[str(layer)](tokens, padding)
        tokens = self.norm(tokens).masked_fill(padding[:, :, None], 0)
        return self.head(tokens.sum(1) / (~padding).sum(1, keepdim=True))

    def windowed(self, block: PublishedBlock, shift: int, tokens: Tensor, padding: Tensor) -> Tensor:
        files, count, dim = tokens.shape
        window = self.architecture.window
        fill = -count % window
        tokens, padding = F.pad(tokens, (0, 0, 0, fill)), F.pad(padding, (0, fill), value=True)
        if shift:
            tokens, padding = tokens.roll(-shift, dims=1), padding.roll(-shift, dims=1)
        autocast = torch.is_autocast_enabled(tokens.device.type)
        dtype = torch.get_autocast_dtype(tokens.device.type) if autocast else tokens.dtype
        windows = block(tokens.reshape(-1, window, dim), window_mask(padding, window, shift, dtype))
        tokens = windows.reshape(files, count + fill, dim)
        if shift:
            tokens = tokens.roll(shift, dims=1)
        return tokens[:, :count]


def window_mask(padding: Tensor, window: int, shift: int, dtype: torch.dtype) -> Tensor:
    """The mask to add to the scores, 0 or -inf: [N, 1, W, W]."""
    files = len(padding)
    mask = torch.zeros(files, padding.shape[1] // window, window, window, dtype=dtype, device=padding.device)
    shift %= window
    if shift:  # tokens that were shifted from the start to the end form a separate region
        mask[:, -1, : window - shift, -shift:] = NEVER
        mask[:, -1, -shift:, : window - shift] = NEVER
    mask.masked_fill_(padding.view(files, -1, 1, window), NEVER)
    hopeless = (mask == NEVER).all(-1, keepdim=True)  # padding that attends only to padding; its softmax would be NaN
    return mask.masked_fill_(hopeless, 0).flatten(0, 1)[:, None]


def load_bfsys_weights(model: PublishedForm, weights: dict[str, Tensor]) -> None:
    """Load the `state_dict` of a bfsys model into `model`."""
    renamed = {"stem.embedding": "embedding.weight", "stem.kernel": "conv.weight", "stem.positions": "positions"}
    state = {renamed.get(name, name): weight for name, weight in weights.items()}
    for name in [name for name in state if name.endswith("reduction.weight")]:
        first, second = state[name].chunk(2, dim=1)  # the two tokens of each pair, interleaved as published
        state[name] = torch.stack([first, second], dim=2).flatten(1)
    model.load_state_dict(state)

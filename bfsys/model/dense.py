"""ByteFormer on one file, without an index computed outside: the form that is exported.

The model itself computes the positions of tokens with NumPy, once per batch (layout.py), and an exported program cannot
contain this. Here every position is computed from the file's length by tensor operations, and rows without a token are
masked. The weights are the model's own. The stem's table, which the model computes in every step, is computed once.

Two rules serve torch.export. First, tokens are gathered into windows and pairs by index and never reshaped, because
splitting a length that depends on the file would put a condition on that length. Second, no tensor has length one for
any file: lengths 0 and 1 are special cases, and a program for them would not work for other lengths. Each "+ 1" is
there for this reason.

Shapes: n bytes, T tokens at a level, N = T + 1 rows of its buffer, W windows of `width` slots, H heads, D dim,
K bytes per token, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bfsys.model.byteformer import Block, ByteFormer, Merge
from bfsys.model.layout import MASKED
from bfsys.model.sizes import PAD_BYTE


class DenseByteFormer(nn.Module):
    """Bytes of one file, uint8 [n] -> probabilities of its classes, float32 [C].

    n must be at least 1 (masked) or K (as_released). This is not checked.
    """

    table: Tensor
    positions: Tensor

    def __init__(self, model: ByteFormer) -> None:
        super().__init__()
        self.architecture, self.masked = model.architecture, model.mode == MASKED
        with torch.no_grad():
            table = model.stem.table().float().unflatten(0, (model.architecture.kernel, -1))  # [K, 257, D]
        self.register_buffer("table", table.contiguous())
        self.register_buffer("positions", model.stem.positions.detach().float().clone())
        self.blocks, self.merges, self.norm = model.blocks, model.merges, model.norm
        self.pool, self.head = model.pool, model.head

    def forward(self, data: Tensor) -> Tensor:
        a, n = self.architecture, data.shape[0]
        tokens = (n + a.stride - 1) // a.stride if self.masked else (n - a.kernel) // a.stride + 1  # T
        x = self._stem(data, tokens)  # [N, D]
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x = self._block(_blanked(x, tokens), tokens, block, a.shifts[layer] % a.window)
            if str(layer) in self.merges:
                merge = self.merges[str(layer)]
                assert isinstance(merge, Merge)
                first = 2 * torch.arange((tokens + 1) // 2 + 1, device=x.device)  # [N of the next level]
                x = _blanked(x, tokens)
                pairs = torch.cat([x[first.clamp(max=tokens)], x[(first + 1).clamp(max=tokens)]], dim=1)
                x, tokens = merge.norm(merge.reduction(pairs)), (tokens + 1) // 2
        is_token = torch.arange(tokens + 1, device=x.device) < tokens
        pooled = self.pool.of_one(_blanked(self.norm(x), tokens), is_token)  # [D]
        return self.head(pooled).softmax(0)

    def _stem(self, data: Tensor, tokens: int) -> Tensor:
        """uint8 [n] -> [N, D]; the row after the last token is undefined."""
        a = self.architecture
        token = torch.arange(tokens + 1, device=data.device)
        place = token[:, None] * a.stride + torch.arange(a.kernel, device=data.device)  # [N, K]
        inside = place < data.shape[0]
        seen = torch.where(inside, data[torch.where(inside, place, 0)].to(torch.int64), PAD_BYTE)  # [N, K]
        x = self._positions(token)
        for j in range(a.kernel):  # in a loop, since [N, K, D] would be by far the largest tensor
            x = x + self.table[j][seen[:, j]]
        return x

    def _positions(self, token: Tensor) -> Tensor:
        """[N, D]. For longer files, the second half of the table is repeated, as in stem.py."""
        rows = self.architecture.max_tokens
        repeated = (rows + 1) // 2
        return self.positions[torch.where(token < rows, token, rows - repeated + (token - rows) % repeated)]

    def _block(self, x: Tensor, tokens: int, block: Block, shift: int) -> Tensor:
        """One pre-norm block on the buffer of a level, whose last row is zero: [N, D] -> [N, D]."""
        width, dim = self.architecture.window, self.architecture.dim
        lead = width - shift if self.masked and shift else 0  # empty slots before the file
        windows = (tokens + lead + width - 1) // width + 1  # W; the last one is not used
        end = (windows - 1) * width
        slot = torch.arange(windows, device=x.device)[:, None] * width + torch.arange(width, device=x.device)
        token = slot - lead
        if not self.masked:  # the shift wraps around the end of the sequence
            token = torch.where(slot + shift < end, slot + shift, slot + shift - end)
        real = (token >= 0) & (token < tokens)  # [W, width]
        # [W, width, 3 D]; a blank slot holds a row of zeros
        x, qkv = block.before_attention(x)
        qkv = qkv[torch.where(real, token, tokens)]
        q, k, v = qkv.unflatten(2, (3, block.heads, dim // block.heads)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = None
        if self.masked:
            mask = (real | ~real.any(1, keepdim=True))[:, None, None]  # [W, 1, 1, width]; empty windows: all True
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [W, H, width, D / H]
        out = out.transpose(1, 2).flatten(2)  # [W, width, D]
        row = torch.arange(tokens + 1, device=x.device)
        slot = row + lead  # [N]
        if not self.masked:
            slot = torch.where(row >= shift, row - shift, row - shift + end)
        return block.after_attention(x, out[slot // width, slot % width])


def _blanked(x: Tensor, tokens: int) -> Tensor:
    """[N, D], in which the row after the last token is zero."""
    return torch.where(torch.arange(tokens + 1, device=x.device)[:, None] < tokens, x, 0.0)

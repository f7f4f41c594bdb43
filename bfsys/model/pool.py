"""Pooling: how the tokens of a file become one vector, from which the head predicts its class.

The published model takes the mean of the tokens. If a few tokens of a long file decide its class, such as those of its
header, they hardly change the mean. Attention pooling takes a weighted mean and learns the weights: softmax(token ·
query) with one query. The query starts at zero, where the weighted mean equals the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bfsys.model.attention import segment_mean


class MeanPool(nn.Module):
    """Tokens [N, D], one file after the other, and tokens per file [B] -> [B, D]."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return segment_mean(x, counts)

    def of_one(self, x: Tensor, is_token: Tensor) -> Tensor:
        """The tokens of one file and rows of zeros [N, D], and which are tokens, bool [N] -> [D]."""
        return x.sum(0) / is_token.sum()


class AttentionPool(nn.Module):
    """Tokens [N, D], one file after the other, and tokens per file [B] -> [B, D]; computed in float32 at least."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scores = self.scores(wide)
        largest = torch.segment_reduce(scores.detach(), "max", lengths=counts, unsafe=True)  # exp must not overflow
        weights = (scores - largest.repeat_interleave(counts, output_size=len(x))).exp()[:, None]
        return (segment_mean(weights * wide, counts) / segment_mean(weights, counts)).to(x.dtype)

    def of_one(self, x: Tensor, is_token: Tensor) -> Tensor:
        """The tokens of one file and rows of zeros [N, D], and which are tokens, bool [N] -> [D]."""
        return self.scores(x).masked_fill(~is_token, -torch.inf).softmax(0) @ x

    def scores(self, x: Tensor) -> Tensor:
        return (x * self.query).sum(1)  # not by a product, which autocast would round to bfloat16

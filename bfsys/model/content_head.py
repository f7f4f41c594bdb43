"""The content loss: during training, a model also predicts what each part of a file shows.

A class is a few bits per file, while a picture or spectrogram holds far more information. A model that predicts it
learns from far fewer files how bytes become shapes and sounds. Evaluation, prediction and exports have no content head
and decode nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bfsys.batch import CONTENT_COLUMNS as COLUMNS
from bfsys.batch import CONTENT_ROWS as ROWS
from bfsys.model.attention import segment_mean

# A token predicts three rows: the one at its place, and those this many rows (a twelfth of the file) before and after
REACH = 5


class ContentHead(nn.Module):
    """Tokens after the last norm [N, D], tokens per file [B] and tables of content [B, ROWS, COLUMNS] -> mean squared
    error of each file [B], in float32. A file whose table is NaN has error 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.rows = nn.Linear(dim, 3 * COLUMNS)

    def forward(self, x: Tensor, counts: Tensor, content: Tensor) -> Tensor:
        file = torch.repeat_interleave(counts, output_size=len(x))
        place = torch.arange(len(x), device=x.device) - (counts.cumsum(0) - counts)[file]
        row = (2 * place + 1) * ROWS // (2 * counts[file])
        around = REACH * torch.arange(-1, 2, device=x.device)
        wanted = (row[:, None] + around).clamp(0, ROWS - 1)
        target = content[file[:, None], wanted].to(torch.promote_types(x.dtype, torch.float32)).flatten(1)
        error = self.rows(x).to(target.dtype) - target.nan_to_num()
        squared = (error * ~target.isnan()).square().mean(1, keepdim=True)
        return segment_mean(squared, counts)[:, 0]

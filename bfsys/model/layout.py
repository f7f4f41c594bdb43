"""Where every token of a ragged batch lies: one index computation per batch, on the CPU.

Each file's token sequence is rounded up once to a multiple of 2^mergings, so that all mergings are plain
views of the token buffer. Attention runs over segments of a sequence; a shifted layer has other segment
borders, nothing else. The alternatives refused: padding to the longest file (work on nothing, see batch.py)
and rolling padded sequences under a mask (the same arithmetic, more memory traffic).

Shapes: B files, N tokens in the buffer of a level, W windows of `width` slots.
Level 0 is the stem's output; each merging halves a level's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bfsys.errors import UserError
from bfsys.model.sizes import Architecture

MASKED = "masked"
AS_RELEASED = "as_released"
MODES = (MASKED, AS_RELEASED)


@dataclass(frozen=True, eq=False)
class Windows:
    """Tokens of one level sorted into windows, and back.

    index    int64 [W * width]  token in each slot (any token where the slot is blank)
    blank    int64 [slots]      slots without a token
    inverse  int64 [N]          slot of each token (any slot for tokens outside all windows)
    outside  int64 [tokens]     tokens that no window holds: the rounding of the sequences
    mask     bool [W, 1, 1, width] or None: True where a slot may be attended to
    width    slots per window
    """

    index: Tensor
    blank: Tensor
    inverse: Tensor
    outside: Tensor
    mask: Tensor | None
    width: int

    def to(self, device: torch.device) -> Windows:
        move = [
            None if t is None else t.to(device, non_blocking=True)
            for t in (self.index, self.blank, self.inverse, self.outside, self.mask)
        ]
        return Windows(*move, width=self.width)


@dataclass(frozen=True, eq=False)
class Layout:
    """The index tensors of one batch.

    first_byte  int64 [N]   where in the byte buffer each token's window starts
    end_byte    int64 [N]   where its file ends (0 for tokens that only round a sequence up)
    position    int64 [N]   the token's row in the position table
    windows     per layer, the windows that its attention runs over
    rounding    per merging, int64 [tokens] that carry nothing and must enter it as zeros
    tokens      int64 [B]   tokens per file after the last merging, all of them real
    """

    first_byte: Tensor
    end_byte: Tensor
    position: Tensor
    windows: tuple[Windows, ...]
    rounding: tuple[Tensor, ...]
    tokens: Tensor

    def to(self, device: torch.device) -> Layout:
        if device.type == "cpu":
            return self
        moved = {w: w.to(device) for w in set(self.windows)}
        return Layout(
            first_byte=self.first_byte.to(device, non_blocking=True),
            end_byte=self.end_byte.to(device, non_blocking=True),
            position=self.position.to(device, non_blocking=True),
            windows=tuple(moved[w] for w in self.windows),
            rounding=tuple(r.to(device, non_blocking=True) for r in self.rounding),
            tokens=self.tokens.to(device, non_blocking=True),
        )


def token_counts(lengths: np.ndarray, architecture: Architecture, mode: str) -> np.ndarray:
    """Tokens of files of `lengths` bytes, int64 [B].

    masked: ceil(n / stride), so that no byte is lost. as_released: floor((n - kernel) / stride) + 1, the
    convolution without padding that Apple's weights were trained with.
    """
    if mode == MASKED:
        return -(-lengths // architecture.stride)
    return (lengths - architecture.kernel) // architecture.stride + 1


def make_layout(lengths: Tensor, architecture: Architecture, mode: str = MASKED) -> Layout:
    """Index tensors for files of `lengths` bytes (int64 [B], on the CPU).

    Raises UserError for a file that has no byte, has more tokens than the position table has rows, or (as
    released) is shorter than the kernel.
    """
    lengths = lengths.numpy()
    tokens = token_counts(lengths, architecture, mode)
    _check(lengths, tokens, architecture, mode)

    starts = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], out=starts[1:])
    aligned = -(-tokens // architecture.alignment) * architecture.alignment
    file, place = _ragged_range(aligned)
    real = place < tokens[file]
    first_byte = np.where(real, starts[file] + place * architecture.stride, 0)
    end_byte = np.where(real, (starts + lengths)[file], 0)
    position = np.where(real, place, 0)

    windows: list[Windows] = []
    rounding: list[Tensor] = []
    made: dict[int, Windows] = {}  # by shift, at the present level
    for layer, shift in enumerate(architecture.shifts):
        shift %= architecture.window
        if shift not in made:
            made[shift] = _make_windows(file, place, tokens, architecture.window, shift, mode)
        windows.append(made[shift])
        if layer in architecture.merge_after:
            rounding.append(torch.from_numpy(np.flatnonzero(place >= tokens[file])))
            tokens, aligned = -(-tokens // 2), aligned // 2
            file, place = _ragged_range(aligned)
            made = {}
    return Layout(
        first_byte=torch.from_numpy(first_byte),
        end_byte=torch.from_numpy(end_byte),
        position=torch.from_numpy(position),
        windows=tuple(windows),
        rounding=tuple(rounding),
        tokens=torch.from_numpy(tokens),
    )


def _check(lengths: np.ndarray, tokens: np.ndarray, architecture: Architecture, mode: str) -> None:
    assert len(lengths), "an empty batch has no logits"
    shortest = 1 if mode == MASKED else architecture.kernel
    for i in np.flatnonzero(lengths < shortest):
        raise UserError(f"file {i} of the batch has {lengths[i]} bytes; this model needs at least {shortest}")
    for i in np.flatnonzero(tokens > architecture.max_tokens):
        raise UserError(
            f"file {i} of the batch has {lengths[i]:,} bytes, that is {tokens[i]:,} tokens; the model has "
            f"positions for {architecture.max_tokens:,} tokens, {architecture.max_bytes:,} bytes: train with a "
            f"larger model.max_tokens or model.kernel, or leave such files out"
        )


def _ragged_range(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For sequences of `counts` tokens laid end to end: each token's sequence, and its place therein."""
    sequence = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return sequence, np.arange(len(sequence)) - starts[sequence]


def _make_windows(
    file: np.ndarray, place: np.ndarray, tokens: np.ndarray, window: int, shift: int, mode: str
) -> Windows:
    real = place < tokens[file]
    if mode == MASKED:  # the first `shift` tokens are a window of their own, then whole windows follow
        lead = window - shift if shift else 0
        number = (place + lead) // window
        slot = np.where(number == 0, place, (place + lead) % window)
        windows_per_file = (tokens - 1 + lead) // window + 1
        width = int(min(window, np.max(slot[real]) + 1))
    else:  # whole windows over the sequence rounded up to windows, the shift wrapping around its end
        windows_per_file = -(-tokens // window)
        rolled = (place - shift) % (windows_per_file * window)[file]
        number, slot = rolled // window, rolled % window
        width = window
    first = np.cumsum(windows_per_file) - windows_per_file
    target = (first[file] + number) * width + slot
    slots = int(windows_per_file.sum()) * width

    index = np.full(slots, -1, np.int64)
    index[target[real]] = np.flatnonzero(real)
    empty = index < 0
    inverse = np.where(real, target, 0)
    masked = mode == MASKED and empty.any()
    return Windows(
        index=torch.from_numpy(np.where(empty, 0, index)),
        blank=torch.from_numpy(np.flatnonzero(empty)),
        inverse=torch.from_numpy(inverse),
        outside=torch.from_numpy(np.flatnonzero(~real)),
        mask=torch.from_numpy(~empty.reshape(-1, 1, 1, width)) if masked else None,
        width=width,
    )

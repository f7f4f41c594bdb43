"""The positions of the tokens of a ragged batch: one index computation per batch, on the CPU.

Each file's token sequence is rounded up once to a multiple of 2^merges, so that all token merges are plain views of the
token buffer. Attention runs over segments, which are runs of tokens. A shifted layer differs only in its segment
borders. A GPU gets a few numbers per file and per segment, in one transfer. Rejected alternatives: padding to the
longest file (wasted operations, see batch.py) and rolling padded sequences under a mask (the same arithmetic, more
memory traffic).

Shapes: B files, N tokens in the buffer of a level, S segments, W windows of `width` slots.
Level 0 is the stem's output; each merging halves a level's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from bfsys.errors import UserError
from bfsys.model.sizes import Architecture

MASKED = "masked"
AS_RELEASED = "as_released"
MODES = (MASKED, AS_RELEASED)
Record = TypeVar("Record", bound="Files | Segments | Windows")


@dataclass(frozen=True, eq=False)
class Windows:
    """Index tensors that sort the tokens of a level, or of a part of it, into windows of equal width, and back.

    index    int64 [W * width]  token in each slot (any token where the slot is blank)
    blank    int64 [slots]      slots without a token
    inverse  int64 [N]          slot of each token (any slot for tokens outside all windows)
    outside  int64 [tokens]     tokens that no window holds: the rounding of the sequences
    mask     bool [W, width] or None: True where a slot may be attended to
    """

    width: int
    index: Tensor
    blank: Tensor
    inverse: Tensor
    outside: Tensor
    mask: Tensor | None

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.inverse)

    @cached_property
    def added(self) -> Tensor | None:
        """The mask to add to scores, 0 or -inf: [W, 1, 1, width] in float32."""
        if self.mask is None:
            return None
        return torch.zeros(self.mask.shape, device=self.mask.device).masked_fill_(~self.mask, -math.inf)[:, None, None]


@dataclass(frozen=True, eq=False)
class Segments:
    """Runs of tokens that attend to each other, in the order of the buffer; none is empty.

    start    int64 [S]       first token of each segment
    length   int64 [S]       tokens of each segment, at most the model's window
    outside  int64 [tokens]  tokens of no segment: the rounding of the sequences
    width    length of the longest segment
    tokens   N of the level
    on_cpu   copies of start, length and outside on the CPU, from which windows are made on demand
    """

    start: Tensor
    length: Tensor
    outside: Tensor
    width: int
    tokens: int
    on_cpu: tuple[np.ndarray, np.ndarray, np.ndarray]

    @cached_property
    def windows(self) -> Windows:
        """The segments as windows of one width, on the device of the segments."""
        (windows,) = self.in_chunks(self.tokens)
        return _with_tensors(windows, (t.to(self.start.device) for t in _tensors(windows).values()))

    def in_chunks(self, chunk_tokens: int) -> tuple[Windows, ...]:
        """The segments as windows, in parts of at least `chunk_tokens` tokens that cover the level. Cached.

        Rows of a part are numbered from its first token.
        """
        if chunk_tokens not in self._chunks:
            self._chunks[chunk_tokens] = tuple(self._make_chunks(chunk_tokens))
        return self._chunks[chunk_tokens]

    _chunks: dict[int, tuple[Windows, ...]] = field(default_factory=dict, init=False, repr=False)

    def _make_chunks(self, chunk_tokens: int) -> Iterator[Windows]:
        start, length, outside = self.on_cpu
        # A chunk ends at the first segment that begins `chunk_tokens` or more after the start of the chunk.
        first = i = 0
        while i < len(start):
            j = int(np.searchsorted(start, first + chunk_tokens))
            end = int(start[j]) if j < len(start) else self.tokens
            yield _windows_of(start[i:j] - first, length[i:j], _between(outside, first, end) - first, end - first)
            first, i = end, j


@dataclass(frozen=True, eq=False)
class Files:
    """The positions of a batch's files.

    first_byte, end_byte  int64 [B], in the byte buffer
    first_token, tokens   int64 [B], in the token buffer of level 0
    rounded               int64 [B], tokens including the rounding
    places                first_token and tokens of each file as integers, for loops
    total                 N of level 0
    """

    first_byte: Tensor
    end_byte: Tensor
    first_token: Tensor
    tokens: Tensor
    rounded: Tensor
    places: list[tuple[int, int]]
    total: int

    @cached_property
    def file(self) -> Tensor:
        """int64 [N], the file of each token."""
        number = torch.arange(len(self.rounded), device=self.rounded.device)
        return number.repeat_interleave(self.rounded, output_size=self.total)


@dataclass(frozen=True, eq=False)
class Layout:
    """The index tensors of one batch.

    files     positions of files and their tokens
    layers    per layer, the segments (masked) or windows (as_released) of its attention
    rounding  per merge, int64 [tokens] that only round sequences up and must enter the merge as zeros
    tokens    int64 [B]   tokens per file after the last merging, without rounding
    """

    files: Files
    layers: tuple[Segments | Windows, ...]
    rounding: tuple[Tensor, ...]
    tokens: Tensor

    def to(self, device: torch.device) -> Layout:
        """The layout on a device. All index tensors go to a GPU in one asynchronous copy."""
        if self.tokens.device.type == device.type:
            return self
        layers = list(dict.fromkeys(self.layers))
        tensors = [t for record in (self.files, *layers) for t in _tensors(record).values()]
        everything = [*tensors, self.tokens, *self.rounding]
        together = torch.cat(everything)
        together = together.pin_memory() if device.type == "cuda" else together
        parts = iter(together.to(device, non_blocking=True).split([len(t) for t in everything]))
        files = _with_tensors(self.files, parts)
        moved = {layer: _with_tensors(layer, parts) for layer in layers}
        return Layout(files, tuple(moved[layer] for layer in self.layers), tokens=next(parts), rounding=tuple(parts))


def _tensors(record: Files | Segments | Windows) -> dict[str, Tensor]:
    """The fields of a record that are tensors."""
    return {f.name: value for f in fields(record) if isinstance(value := getattr(record, f.name), Tensor)}


def _with_tensors(record: Record, tensors: Iterator[Tensor]) -> Record:
    """The record with its tensors replaced by the next ones, in their order."""
    changes: dict[str, Any] = {name: next(tensors) for name in _tensors(record)}
    return replace(record, **changes)


def token_counts(lengths: np.ndarray, architecture: Architecture, mode: str) -> np.ndarray:
    """Tokens of files of `lengths` bytes, int64 [B].

    masked: ceil(n / stride), so that no byte is lost. as_released: floor((n - kernel) / stride) + 1, the
    convolution without padding that Apple's weights were trained with.
    """
    if mode == MASKED:
        return -(-lengths // architecture.stride)
    return (lengths - architecture.kernel) // architecture.stride + 1


def make_layout(lengths: Tensor, architecture: Architecture, mode: str = MASKED) -> Layout:
    """Index tensors for files of `lengths` bytes (int64 [B], on the CPU), on the CPU.

    Raises UserError for a file that is empty, or (as released) shorter than the kernel.
    """
    sizes = lengths.numpy()
    assert len(sizes), "an empty batch has no logits"
    shortest = 1 if mode == MASKED else architecture.kernel
    for i in np.flatnonzero(sizes < shortest):
        raise UserError(f"file {i} of the batch has {sizes[i]} bytes; this model needs at least {shortest}")
    tokens = token_counts(sizes, architecture, mode)
    aligned = -(-tokens // architecture.alignment) * architecture.alignment
    first_token = _starts(aligned)
    files = Files(
        first_byte=torch.from_numpy(_starts(sizes)),
        end_byte=torch.from_numpy(np.cumsum(sizes)),
        first_token=torch.from_numpy(first_token),
        tokens=torch.from_numpy(tokens),
        rounded=torch.from_numpy(aligned),
        places=list(zip(first_token.tolist(), tokens.tolist(), strict=True)),
        total=int(aligned.sum()),
    )
    layers: list[Segments | Windows] = []
    rounding: list[Tensor] = []
    made: dict[int, Segments | Windows] = {}  # by shift, at the current level
    make = _segments if mode == MASKED else _wrapped_windows
    for layer, shift in enumerate(architecture.shifts):
        shift %= architecture.window
        if shift not in made:
            made[shift] = make(tokens, aligned, architecture.window, shift)
        layers.append(made[shift])
        if layer in architecture.merge_after:
            rounding.append(made[shift].outside)
            tokens, aligned = -(-tokens // 2), aligned // 2
            made = {}
    return Layout(files, tuple(layers), tuple(rounding), tokens=torch.from_numpy(tokens))


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts


def _between(rising: np.ndarray, first: int, end: int) -> np.ndarray:
    """The values of a sorted array in [first, end)."""
    return rising[slice(*np.searchsorted(rising, (first, end)))]


def _ragged_range(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sequence, position in it) of each item of concatenated sequences of `counts` items."""
    sequence = np.repeat(np.arange(len(counts)), counts)
    return sequence, np.arange(len(sequence)) - _starts(counts)[sequence]


def _rounding(tokens: np.ndarray, aligned: np.ndarray) -> np.ndarray:
    """The tokens of the buffer that round sequences of `tokens` tokens up to `aligned` tokens."""
    file, place = _ragged_range(aligned - tokens)
    return (_starts(aligned) + tokens)[file] + place


def _segments(tokens: np.ndarray, aligned: np.ndarray, window: int, shift: int) -> Segments:
    """The segments of each file: its first `shift` tokens, then whole windows, then the rest."""
    lead = np.minimum(tokens, shift)
    counts = (lead > 0) + -(-(tokens - lead) // window)
    file, number = _ragged_range(counts)
    border = number * window - (window - shift if shift else 0)
    begin, end = np.maximum(border, 0), np.minimum(border + window, tokens[file])
    on_cpu = (_starts(aligned)[file] + begin, end - begin, _rounding(tokens, aligned))
    start, length, outside = map(torch.from_numpy, on_cpu)
    return Segments(start, length, outside, width=int(on_cpu[1].max()), tokens=int(aligned.sum()), on_cpu=on_cpu)


def _windows_of(start: np.ndarray, length: np.ndarray, outside: np.ndarray, tokens: int) -> Windows:
    """Segments of a buffer of `tokens` rows as windows, one per segment."""
    width = int(length.max())
    segment, place = _ragged_range(length)
    token, slot = start[segment] + place, segment * width + place
    mask = np.zeros(len(start) * width, bool)
    index, inverse = np.zeros(len(mask), np.int64), np.zeros(tokens, np.int64)
    mask[slot], index[slot], inverse[token] = True, token, slot
    full = bool(mask.all())
    return Windows(
        width=width,
        index=torch.from_numpy(index),
        blank=torch.from_numpy(np.flatnonzero(~mask)),
        inverse=torch.from_numpy(inverse),
        outside=torch.from_numpy(outside),
        mask=None if full else torch.from_numpy(mask).view(-1, width),
    )


def _wrapped_windows(tokens: np.ndarray, aligned: np.ndarray, window: int, shift: int) -> Windows:
    """The windows of the released code: whole windows over the sequence rounded up to windows. The shift wraps around
    its end."""
    windows_per_file = -(-tokens // window)
    file, place = _ragged_range(tokens)
    slot = _starts(windows_per_file)[file] * window + (place - shift) % (windows_per_file * window)[file]
    token = _starts(aligned)[file] + place
    index, inverse = np.full(int(windows_per_file.sum()) * window, -1), np.zeros(int(aligned.sum()), np.int64)
    index[slot], inverse[token] = token, slot
    return Windows(
        width=window,
        index=torch.from_numpy(np.maximum(index, 0)),
        blank=torch.from_numpy(np.flatnonzero(index < 0)),
        inverse=torch.from_numpy(inverse),
        outside=torch.from_numpy(_rounding(tokens, aligned)),
        mask=None,
    )

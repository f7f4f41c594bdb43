"""The shapes of ByteFormer that the paper names, and custom ones.

A size is a row in `SIZES`. `Architecture` holds everything that determines the parameters' shapes. Two models with
equal architectures and class counts can exchange weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from bfsys.errors import UserError

BYTE_VALUES = 256
PAD_BYTE = 256  # row of the embedding for padding: zero, and without gradient
HEAD_DIM = 64
MLP_RATIO = 4  # width of a block's MLP over dim
PUBLISHED_MERGES = (0, 1, 3, 5, 7, 9)
PUBLISHED_SHIFT = 64  # the released configurations also use it with window 32, where it has no effect

# name: (dim, layers, heads). The values are those of the released configurations.
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "huge": (1280, 32, 20),
}


@dataclass(frozen=True)
class Architecture:
    """The values that determine the parameters' shapes and the order of computation.

    kernel       bytes that one token covers; the stride is half of it
    window       length of an attention window in tokens
    shifts       one per layer: shift of the window borders in tokens
    merge_after  layers after which pairs of tokens are merged
    max_tokens   rows of the learned position table
    pool         mean or attention: how the tokens of a file become one vector, see pool.py
    """

    dim: int
    layers: int
    heads: int
    kernel: int
    window: int
    shifts: tuple[int, ...]
    merge_after: tuple[int, ...]
    max_tokens: int
    pool: str = "mean"

    def __post_init__(self) -> None:
        problems = [
            f"model.{name}: got {value}; at least {least} is needed"
            for name, value, least in (
                ("dim", self.dim, 1),
                ("layers", self.layers, 1),
                ("heads", self.heads, 1),
                ("window", self.window, 1),
                ("max_tokens", self.max_tokens, 1),
                ("shift", min(self.shifts, default=0), 0),
            )
            if value < least
        ]
        if self.kernel < 2 or self.kernel % 2:
            problems.append(f"model.kernel: got {self.kernel}; it must be even and at least 2 (stride = kernel/2)")
        if self.heads > 0 and self.dim % self.heads:
            problems.append(f"model.heads: {self.heads} heads do not divide dim {self.dim}")
        if len(self.shifts) != self.layers:
            problems.append(f"model: {len(self.shifts)} shifts for {self.layers} layers")
        if list(self.merge_after) != sorted(set(self.merge_after)) or any(
            not 0 <= i < self.layers for i in self.merge_after
        ):
            problems.append(
                f"model.merge_after: got {list(self.merge_after)}; rising layer numbers below {self.layers} are allowed"
            )
        if problems:
            raise UserError(*problems)

    @property
    def stride(self) -> int:
        """Bytes from one token's first byte to the next token's."""
        return self.kernel // 2

    @property
    def alignment(self) -> int:
        """A sequence is rounded up to a multiple of this number of tokens, so that every merging is a view."""
        return 2 ** len(self.merge_after)

    @property
    def rounding_bytes(self) -> int:
        """A shorter file takes as much memory and time as one of this length."""
        return self.alignment * self.stride

    @property
    def max_bytes(self) -> int:
        """Length of the longest file whose tokens all have different positions; see stem.py for longer files."""
        return self.max_tokens * self.stride


def architecture(
    size: str,
    *,
    kernel: int = 32,
    window: int = 128,
    max_tokens: int = 50_000,
    shift: int = PUBLISHED_SHIFT,
    dim: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    merge_after: tuple[int, ...] | None = None,
    pool: str = "mean",
) -> Architecture:
    """The architecture of a named size, or of `custom` with its own dim, layers and heads.

    Every second layer is shifted. `merge_after` defaults to the published layers that exist. The published
    code cannot build `huge` (its lists are 12 long); here it merges after the same six layers.
    """
    if size == "custom":
        if dim is None or layers is None:
            missing = [name for name, value in (("dim", dim), ("layers", layers)) if value is None]
            raise UserError(f"model.size: custom needs model.{' and model.'.join(missing)} too")
        heads = heads or max(1, dim // HEAD_DIM)
    elif size not in SIZES:
        raise UserError(f"model.size: got {size!r}; allowed: {', '.join(SIZES)}, custom")
    elif (dim, layers, heads) != (None, None, None):
        raise UserError(f"model.size: {size!r} fixes dim, layers and heads; to choose them, use size: custom")
    else:
        dim, layers, heads = SIZES[size]
    if merge_after is None:
        merge_after = tuple(i for i in PUBLISHED_MERGES if i < layers)
    return Architecture(
        dim=dim,
        layers=layers,
        heads=heads,
        kernel=kernel,
        window=window,
        shifts=tuple(shift * (i % 2) for i in range(layers)),
        merge_after=tuple(merge_after),
        max_tokens=max_tokens,
        pool=pool,
    )

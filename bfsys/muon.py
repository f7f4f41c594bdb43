"""Muon's step direction for matrices that ZeRO has divided among ranks (Jordan et al. 2024, "Muon: An optimizer for
hidden layers in neural networks").

A matrix must be whole where it is orthogonalised. Each matrix therefore has an owner among the ranks: the other ranks
send it their pieces, it orthogonalises the matrix, and it sends the pieces back. The owners share the work: the most
expensive matrix goes first to the rank that has least to do. A rank sends its share of all matrices to their owners,
and what it owns to the holders, in the precision of the products. At ZeRO stage 0, where every rank holds all
gradients, an owner broadcasts its results. All stages give the same result up to rounding.

Refused: DeepSpeed's Muon, which in earlier versions did not orthogonalise at stage 0, nor in bf16 with float32
accumulation, and gave no error; torch.optim.Muon, which takes whole 2-D parameters only.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bfsys import dist

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # coefficients of the quintic Newton-Schulz iteration
ITERATIONS = 5
TINY = 1e-7  # added to norms


class Span(NamedTuple):
    """Elements [first, end) of a flattened parameter, which a rank holds."""

    name: str
    first: int
    end: int


class Stack(NamedTuple):
    """The shape of a parameter as a stack of matrices; each matrix is orthogonalised separately."""

    matrices: int
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        return self.matrices * self.rows * self.columns

    @property
    def flops(self) -> int:
        """Floating-point operations to orthogonalise the stack once."""
        short, long = sorted((self.rows, self.columns))
        return self.matrices * ITERATIONS * (4 * short * short * long + 2 * short**3)


def step_scale(shape: Sequence[int]) -> float:
    """Factor on the step of a parameter [rows, …]: sqrt(max(1, rows / columns)), with qkv as one matrix."""
    return max(1.0, shape[0] / math.prod(shape[1:])) ** 0.5


def orthogonalise(x: Tensor) -> Tensor:
    """[n, rows, columns] -> the same, with the singular values of each matrix moved to between about 0.7 and 1.2."""
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT).mT
    a, b, c = COEFFICIENTS
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32) + TINY).to(x.dtype)
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Orthogonaliser:
    """Orthogonalises matrices that lie in pieces on all ranks. Making one is collective, and so is calling it."""

    def __init__(self, stacks: dict[str, Stack], mine: Sequence[Span], ranks: dist.Ranks, dtype: torch.dtype) -> None:
        """`mine` are the spans that this rank holds of the parameters in `stacks`. Products are computed in `dtype`, in
        which pieces are sent, too."""
        self.rank, self.device, self.dtype = ranks.rank, ranks.device, dtype
        self.spans: list[list[Span]] = dist.gather_to_all(list(mine))  # by rank
        names = {span.name for of_rank in self.spans for span in of_rank}
        self.owners = assign({name: stack for name, stack in stacks.items() if name in names}, ranks.world_size)
        self.owned = {name: stacks[name] for name, owner in self.owners.items() if owner == self.rank}
        complete = [
            {span.name for span in of_rank if span.end - span.first == stacks[span.name].elements}
            for of_rank in self.spans
        ]
        self.is_replicated = all(of_rank == names for of_rank in complete)
        # A matrix that its owner holds completely is not sent to it.
        self.sent = [
            [span for span in of_rank if span.name not in complete[self.owners[span.name]]] for of_rank in self.spans
        ]

    def __call__(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """This rank's flat pieces, in the order of `mine` -> the same pieces of the orthogonalised matrices."""
        mine = {span: piece.to(self.dtype) for span, piece in zip(self.spans[self.rank], pieces, strict=True)}
        whole = {span.name: piece for span, piece in mine.items() if span.name in self.owned}
        if any(self.sent):
            whole |= self._collect(mine)
        done = self._orthogonalise(whole)
        if len(self.spans) == 1:
            return [done[span.name] for span in mine]
        return self._broadcast(done) if self.is_replicated else self._hand_out(done)

    def _collect(self, mine: dict[Span, Tensor]) -> dict[str, Tensor]:
        """The matrices that this rank owns and that lie in pieces, flat."""
        send = [[mine[span] for span in spans] for spans in self._by_owner(self.sent[self.rank])]
        receive = [[span for span in of_rank if span.name in self.owned] for of_rank in self.sent]
        whole = {
            span.name: torch.empty(self.owned[span.name].elements, dtype=self.dtype, device=self.device)
            for spans in receive
            for span in spans
        }
        for span, piece in self._exchange(send, receive):
            whole[span.name][span.first : span.end] = piece
        return whole

    def _orthogonalise(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """Matrices of equal shape, or of which one is the other's transposed, are one batch."""
        batches: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name, stack in self.owned.items():
            batches[tuple(sorted(stack[1:]))].append(name)
        done = {}
        with torch.autocast(self.device.type, enabled=False):
            for (short, _), names in batches.items():
                stacks = [whole[name].view(self.owned[name]) for name in names]
                wide = [x if x.shape[1] == short else x.mT for x in stacks]
                results = orthogonalise(torch.cat(wide)).split([len(x) for x in wide])
                for name, x, result in zip(names, stacks, results, strict=True):
                    done[name] = (result if x.shape[1] == short else result.mT).flatten()
        return done

    def _hand_out(self, done: dict[str, Tensor]) -> list[Tensor]:
        """This rank's pieces of all results, in the order of its spans."""
        send = [[done[name][first:end] for name, first, end in of_rank if name in self.owned] for of_rank in self.spans]
        mine = self.spans[self.rank]
        received = dict(self._exchange(send, self._by_owner(mine)))
        return [received[span] for span in mine]

    def _broadcast(self, done: dict[str, Tensor]) -> list[Tensor]:
        """Send all results to every rank, in the order of its spans."""
        mine = self.spans[self.rank]
        results: dict[Span, Tensor] = {}
        for rank, spans in enumerate(self._by_owner(mine)):
            sizes = [span.end for span in spans]
            flat = torch.empty(sum(sizes), dtype=self.dtype, device=self.device)
            if rank == self.rank and spans:
                torch.cat([done[span.name] for span in spans], out=flat)
            parts = dist.broadcast(flat, rank).split(sizes) if spans else ()
            results.update(zip(spans, parts, strict=True))
        return [results[span] for span in mine]

    def _by_owner(self, spans: list[Span]) -> list[list[Span]]:
        return [[span for span in spans if self.owners[span.name] == rank] for rank in range(len(self.spans))]

    def _exchange(self, send: list[list[Tensor]], receive: list[list[Span]]) -> Iterator[tuple[Span, Tensor]]:
        """Send flat tensors to each rank, and split what each rank sends into spans."""
        nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        flat = torch.cat([nothing, *(part for parts in send for part in parts)])
        sent = [sum(len(part) for part in parts) for parts in send]
        counts = [sum(span.end - span.first for span in spans) for spans in receive]
        spans = [span for of_rank in receive for span in of_rank]
        pieces = dist.all_to_all(flat, sent, counts).split([span.end - span.first for span in spans])
        return zip(spans, pieces, strict=True)


def assign(stacks: dict[str, Stack], ranks: int) -> dict[str, int]:
    """An owner for each parameter, such that all ranks have about as much to compute."""
    load, owners = [0] * ranks, {}
    for name, stack in sorted(stacks.items(), key=lambda item: -item[1].flops):
        owners[name] = load.index(min(load))
        load[owners[name]] += stack.flops
    return owners

"""Muon's step direction for matrices that ZeRO has divided among ranks (Jordan et al. 2024, "Muon: An optimizer for
hidden layers in neural networks").

A matrix must be whole where it is orthogonalised. Each matrix therefore has an owner among the ranks: the other ranks
send it their pieces, it orthogonalises the matrix, and it sends the pieces back. The owners share the work: the most
expensive matrix goes first to the rank that has least to do. A rank sends its share of all matrices to their owners,
and what it owns to the holders, in the precision of the products. At ZeRO stage 0, where every rank holds all
gradients, an owner broadcasts its results. All stages give the same result up to rounding.

Rejected alternative: DeepSpeed's Muon, which in earlier versions did not orthogonalise at stage 0, nor in bf16 with
float32 accumulation, and gave no error; torch.optim.Muon, which takes whole 2-D parameters only.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bfsys import dist

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # coefficients of the quintic Newton-Schulz iteration
ITERATIONS = 5
TINY = 1e-7  # added to norms, against division by zero


class Span(NamedTuple):
    """Elements [first, end) of a flattened parameter that a rank holds."""

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
    """Factor of the update of a parameter [rows, …]: sqrt(max(1, rows / columns)), with qkv as one matrix."""
    return max(1.0, shape[0] / math.prod(shape[1:])) ** 0.5


def orthogonalise(x: Tensor) -> Tensor:
    """[n, rows, columns] -> the same, with the singular values of each matrix changed to about 0.7 … 1.2."""
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT).mT
    a, b, c = COEFFICIENTS
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32) + TINY).to(x.dtype)
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Orthogonaliser:
    """Orthogonalises matrices whose pieces are distributed over all ranks. Constructor and call are collective."""

    def __init__(self, stacks: dict[str, Stack], mine: Sequence[Span], ranks: dist.Ranks, dtype: torch.dtype) -> None:
        """`mine` are this rank's spans of the parameters in `stacks`. Products are computed, and pieces are sent, in
        `dtype`."""
        self.rank, self.device, self.dtype = ranks.rank, ranks.device, dtype
        self.spans: list[list[Span]] = dist.gather_to_all(list(mine))  # by rank
        names = {span.name for of_rank in self.spans for span in of_rank}
        self.owners = assign({name: stack for name, stack in stacks.items() if name in names}, ranks.world_size)
        self.owned = {name: stacks[name] for name, owner in self.owners.items() if owner == self.rank}
        self.names: dict[tuple[int, int], list[str]] = defaultdict(list)  # of owned stacks, by shape of their matrices
        for name, (_, rows, columns) in self.owned.items():
            self.names[rows, columns].append(name)
        complete = [
            {span.name for span in of_rank if span.end - span.first == stacks[span.name].elements}
            for of_rank in self.spans
        ]
        self.is_replicated = all(of_rank == names for of_rank in complete)
        # A matrix that its owner holds completely is not sent to it.
        self.sent = [
            [span for span in of_rank if span.name not in complete[self.owners[span.name]]] for of_rank in self.spans
        ]
        self.kept = [span for span in mine if span.name in self.owned and span.name in complete[self.rank]]

    def __call__(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """This rank's flat pieces, in the order of `mine` -> the same pieces of the orthogonalised matrices, in the
        dtype of the products."""
        mine = dict(zip(self.spans[self.rank], pieces, strict=True))
        kept = {span: mine[span] for span in self.kept}
        done = self._orthogonalise(self._join(kept, self._collect(mine) if any(self.sent) else {}))
        if len(self.spans) == 1:
            return [done[span.name] for span in mine]
        return self._broadcast(done) if self.is_replicated else self._return_pieces(done)

    def _collect(self, mine: dict[Span, Tensor]) -> dict[Span, Tensor]:
        """Receive the pieces of matrices that this rank owns but does not hold completely."""
        send = [[mine[span] for span in spans] for spans in self._by_owner(self.sent[self.rank])]
        receive = [[span for span in of_rank if span.name in self.owned] for of_rank in self.sent]
        return self._exchange(send, receive)

    def _join(self, *found: dict[Span, Tensor]) -> dict[tuple[int, int], Tensor]:
        """Join pieces into all matrices that this rank owns, [n, rows, columns] by shape. The pieces in a dict have one
        dtype, so a GPU copies them together."""
        joined: dict[tuple[int, int], Tensor] = {}
        whole: dict[str, Tensor] = {}
        for shape, names in self.names.items():
            matrices = sum(self.owned[name].matrices for name in names)
            joined[shape] = torch.empty(matrices, *shape, dtype=self.dtype, device=self.device)
            whole |= self._by_name(joined[shape])
        for pieces in filter(None, found):
            torch._foreach_copy_([whole[name][first:end] for name, first, end in pieces], list(pieces.values()))
        return joined

    def _by_name(self, matrices: Tensor) -> dict[str, Tensor]:
        """The owned matrices of one shape, [n, rows, columns] -> flat stacks by name."""
        names = self.names[matrices.shape[1], matrices.shape[2]]
        return dict(zip(names, matrices.flatten().split([self.owned[name].elements for name in names]), strict=True))

    def _orthogonalise(self, joined: dict[tuple[int, int], Tensor]) -> dict[str, Tensor]:
        """Orthogonalise matrices. Matrices of equal or transposed shape form one batch."""
        batches: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for shape, matrices in joined.items():
            batches[tuple(sorted(shape))].append(matrices)
        done: dict[str, Tensor] = {}
        with torch.autocast(self.device.type, enabled=False):
            for (short, _), batch in batches.items():
                wide = [x if x.shape[1] == short else x.mT for x in batch]
                results = orthogonalise(torch.cat(wide) if len(wide) > 1 else wide[0].contiguous())
                for x, result in zip(batch, results.split([len(x) for x in batch]), strict=True):
                    done |= self._by_name(result if x.shape[1] == short else result.mT)
        return done

    def _return_pieces(self, done: dict[str, Tensor]) -> list[Tensor]:
        """Send the results' pieces to their ranks. Returns this rank's pieces in the order of its spans."""
        send = [[done[name][first:end] for name, first, end in of_rank if name in self.owned] for of_rank in self.spans]
        mine = self.spans[self.rank]
        received = self._exchange(send, self._by_owner(mine))
        return [received[span] for span in mine]

    def _broadcast(self, done: dict[str, Tensor]) -> list[Tensor]:
        """Broadcast all results to every rank. Returns them in the order of its spans."""
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

    def _exchange(self, send: list[list[Tensor]], receive: list[list[Span]]) -> dict[Span, Tensor]:
        """Send flat tensors to each rank, and split the received ones into spans."""
        parts = [part for of_rank in send for part in of_rank]
        flat = torch.cat(parts) if parts else torch.empty(0, device=self.device)
        sent = [sum(len(part) for part in of_rank) for of_rank in send]
        counts = [sum(span.end - span.first for span in of_rank) for of_rank in receive]
        spans = [span for of_rank in receive for span in of_rank]
        received = dist.all_to_all(flat.to(self.dtype), sent, counts)
        return dict(zip(spans, received.split([span.end - span.first for span in spans]), strict=True))


def assign(stacks: dict[str, Stack], ranks: int) -> dict[str, int]:
    """An owner for each parameter, chosen so that all ranks have about the same work."""
    load, owners = [0] * ranks, {}
    for name, stack in sorted(stacks.items(), key=lambda item: -item[1].flops):
        owners[name] = load.index(min(load))
        load[owners[name]] += stack.flops
    return owners

"""The bytes that decide a file's class, by two independent methods.

Occlusion replaces a window of the file by the bytes that reference files have at the same offsets, and predicts again.
The evidence of a window is the mean drop of the log-probability of the class. Occlusion shows causes, at a coarse
resolution.

Integrated gradients (Sundararajan et al. 2017) follow a straight line from the tokens of a reference to those of the
file. A token is a sum of table rows (model/stem.py), so the change of a token divides exactly among its bytes, and the
attributions of all bytes sum to the difference between the two log-odds of the class. Their resolution is one byte, but
they follow only the gradient on this line. Rejected alternatives: gradients with respect to one-hot bytes, which take
257 numbers per byte; attention weights, which do not say what a change of a token would do.

References have the length of the file, so the length does not influence either method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bfsys.batch import ByteBatch, Sample
from bfsys.data.streaming.plan import within_budget
from bfsys.model.byteformer import ByteFormer
from bfsys.model.layout import make_layout
from bfsys.model.stem import table_rows

WINDOWS = 64  # most windows per file
DRAWS = 4  # references per file
# Nodes of the Gauss-Legendre rule along the path. If a trained model's answer changes abruptly, 12 nodes may miss the
# change, and the error of the sum is then as large as the difference itself.
LEAST_NODES, MOST_NODES = 12, 96
TOLERANCE = 0.02
CHUNK_TOKENS = 1024  # tokens whose table rows are looked up at a time


@dataclass(frozen=True)
class Classifier:
    """A network, and the number of bytes of files that it may compute at once. The network is not changed."""

    network: ByteFormer
    budget_bytes: int

    def log_probabilities(self, files: Iterable[np.ndarray]) -> np.ndarray:
        """float64 [files, classes] of uint8 arrays; only those that are computed together need be in memory."""
        least = self.network.architecture.rounding_bytes
        batches = within_budget(((max(len(data), least), data) for data in files), self.budget_bytes)
        return np.concatenate([self._of_batch(batch) for batch in batches])

    @torch.no_grad()
    def _of_batch(self, files: list[np.ndarray]) -> np.ndarray:
        device = self.network.head.weight.device
        logits = self.network(ByteBatch.from_samples([Sample("", data) for data in files]).to(device))
        return logits.double().log_softmax(1).cpu().numpy()


def windows_of(length: int, stride: int) -> list[tuple[int, int]]:
    """(first byte, end) of at most WINDOWS windows of equal length, a multiple of the stride; the last may be shorter.

    >>> windows_of(1000, 8)[:2], len(windows_of(1000, 8))
    ([(0, 16), (16, 32)], 63)
    """
    size = stride * -(-length // (WINDOWS * stride))
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def occlusion(
    classifier: Classifier,
    data: np.ndarray,
    references: Sequence[np.ndarray],
    index: int,
    windows: list[tuple[int, int]],
) -> np.ndarray:
    """float64 [windows]: the drop of the log-probability of class `index`, as a mean over the references.

    data and each reference: uint8 [n]
    """

    def files() -> Iterator[np.ndarray]:
        yield data
        for first, end in windows:
            for reference in references:
                changed = data.copy()
                changed[first:end] = reference[first:end]
                yield changed

    scores = classifier.log_probabilities(files())[:, index]
    return (scores[0] - scores[1:]).reshape(len(windows), len(references)).mean(1)


def integrated_gradients(
    classifier: Classifier, data: np.ndarray, references: Sequence[np.ndarray], index: int
) -> tuple[np.ndarray, float]:
    """The contribution of each byte to the log-odds of class `index`, float64 [n], a mean over the references; error.

    data and each reference: uint8 [n]. The sum of the contributions is the log-odds of the file minus the mean log-odds
    of the references. For each reference, the number of nodes is doubled until this holds within TOLERANCE, or until
    there are MOST_NODES. The error is the largest remaining one, relative to the difference (or to 1, if that is more).
    """
    total, worst = np.zeros(len(data)), 0.0
    of_file = _log_odds_of(classifier, data, index)
    for reference in references:
        difference = of_file - _log_odds_of(classifier, reference, index)
        nodes = LEAST_NODES
        while True:
            found = _along_path(classifier, data, reference, index, nodes)
            error = abs(float(found.sum()) - difference) / max(1.0, abs(difference))
            if error <= TOLERANCE or nodes == MOST_NODES:
                break
            nodes *= 2
        total += found
        worst = max(worst, error)
    return total / len(references), worst


def _along_path(classifier: Classifier, data: np.ndarray, reference: np.ndarray, index: int, nodes: int) -> np.ndarray:
    """Integrated gradients from one reference, float64 [n], by a quadrature rule with the given number of nodes."""
    network = classifier.network
    at_once = max(1, classifier.budget_bytes // max(len(data), network.architecture.rounding_bytes))
    places, weights = np.polynomial.legendre.leggauss(nodes)
    path = list(zip((places + 1) / 2, weights / 2, strict=True))
    with torch.no_grad():
        start, tokens, table = _tokens(network, reference), _tokens(network, data), network.stem.table()
    gradient = torch.zeros_like(tokens, dtype=torch.promote_types(tokens.dtype, torch.float32))
    for first in range(0, nodes, at_once):
        part = path[first : first + at_once]
        place = torch.tensor([place for place, _ in part], device=tokens.device, dtype=tokens.dtype)
        along = torch.lerp(start[None], tokens[None], place[:, None, None])
        for (_, weight), one in zip(part, _gradient(network, along, len(data), index), strict=True):
            gradient += weight * one
    return _shared_out(network, table, gradient, data, reference)


@torch.no_grad()
def _log_odds_of(classifier: Classifier, data: np.ndarray, index: int) -> float:
    batch = ByteBatch.from_samples([Sample("", data)]).to(classifier.network.head.weight.device)
    return float(log_odds(classifier.network(batch).double(), index))


def log_odds(logits: Tensor, index: int) -> Tensor:
    """[B] of [B, classes]: log(p / (1 - p)); zero where there is one class."""
    others = torch.cat([logits[:, :index], logits[:, index + 1 :]], 1)
    return logits[:, index] - (others.logsumexp(1) if others.shape[1] else logits[:, index])


def _tokens(network: ByteFormer, data: np.ndarray) -> Tensor:
    """[N, D] of one file, with positions, which are constant along the path."""
    device = network.head.weight.device
    batch = ByteBatch.from_samples([Sample("", data)]).to(device)
    return network.stem(batch.data, make_layout(batch.lengths, network.architecture, network.mode).to(device).files)


def _gradient(network: ByteFormer, tokens: Tensor, length: int, index: int) -> Tensor:
    """[B, N, D]: the gradient of the log-odds with respect to the tokens [B, N, D] of files of `length` bytes."""
    lengths = torch.from_numpy(np.full(len(tokens), length))
    layout = make_layout(lengths, network.architecture, network.mode).to(tokens.device)
    flat = tokens.flatten(0, 1).requires_grad_()
    with torch.enable_grad():
        odds = log_odds(network.head(network.features_of_tokens(flat, layout)).float(), index)
        (gradient,) = torch.autograd.grad(odds.sum(), flat)
    return gradient.view_as(tokens)


@torch.no_grad()
def _shared_out(
    network: ByteFormer, table: Tensor, gradient: Tensor, data: np.ndarray, reference: np.ndarray
) -> np.ndarray:
    """float64 [n]: the change of each token times its gradient [N, D], attributed to the bytes that cause it."""
    kernel, stride = network.architecture.kernel, network.architecture.stride
    device = table.device
    files = make_layout(torch.from_numpy(np.array([len(data)])), network.architecture, network.mode).to(device).files
    both = [torch.from_numpy(np.ascontiguousarray(one)).to(device) for one in (data, reference)]
    values = torch.zeros(len(data) + kernel, dtype=torch.float64, device=device)
    ours, theirs = (table_rows(one, files, kernel) for one in both)
    for (chunk, rows), (_, other_rows) in zip(ours, theirs, strict=True):
        for begin in range(0, len(rows), CHUNK_TOKENS):
            part = slice(begin, begin + CHUNK_TOKENS)
            change = table[rows[part].long()] - table[other_rows[part].long()]  # [C, K, D]
            shares = torch.einsum("ckd,cd->ck", change.to(gradient.dtype), gradient[chunk][part]).double()
            token = torch.arange(chunk.start + begin, chunk.start + begin + len(shares), device=device)
            byte = token[:, None] * stride + torch.arange(kernel, device=device)
            # Past the end of the file, both sides have the padding row, so the share is zero.
            values.index_add_(0, byte.clamp_(max=len(values) - 1).flatten(), shares.flatten())
    return values[: len(data)].cpu().numpy()

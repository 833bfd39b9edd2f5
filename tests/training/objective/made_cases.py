"""Batches on which losses are compared with slow references, and what these references share."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from data.batches import IGNORE_LABEL, PADDING

E, K, V = 6, 2, 11
LAGS = (1, 2, 4, 50)
WINDOW = 3


class Case(NamedTuple):
    logits: Tensor  # [B, S, E]
    reference: Tensor  # [B, S, E]
    ids: Tensor  # [B, S, K], heaviest first
    documents: Tensor  # [B, S]
    labels: Tensor  # [B, S]
    logits_vocabulary: Tensor  # [B, S, V]


def make_case(rows: list[list[int]], seed: int = 0) -> Case:
    """`rows` are the lengths of the sequences of every row; a negative one is so much padding."""
    draw = torch.Generator().manual_seed(seed)
    documents = [
        [PADDING if length < 0 else 10 * row + n for n, length in enumerate(lengths) for _ in range(abs(length))]
        for row, lengths in enumerate(rows)
    ]
    document_ids = torch.tensor(documents)
    shape = document_ids.shape
    logits, reference = (2 * torch.randn(*shape, E, generator=draw) for _ in range(2))
    labels = torch.randint(V, shape, generator=draw)
    labels[torch.rand(shape, generator=draw) < 0.3] = IGNORE_LABEL
    labels[document_ids < 0] = IGNORE_LABEL
    ids = logits.topk(K).indices
    return Case(logits, reference, ids, document_ids, labels, torch.randn(*shape, V, generator=draw))


CASES = {
    "several documents a row": [[5, 7], [9, 3]],
    "sequences of one token": [[1, 1, 9, 1], [12]],
    "padding at the end": [[5, 3, -4], [11, -1]],
    "a row of padding": [[-8], [4, 4]],
    "one row, shorter than every long lag": [[3]],
    "no pair at all": [[1, 1], [1, -1]],
    "windows fit exactly": [[3, 6], [9]],
}


def sequences(documents: Tensor) -> Iterator[list[tuple[int, int]]]:
    """The positions (row, column) of every sequence, padding left out."""
    for row, ids in enumerate(documents.tolist()):
        for document in dict.fromkeys(ids):
            if document != PADDING:
                yield [(row, column) for column, other in enumerate(ids) if other == document]


def softmax(values: Tensor) -> list[float]:
    exponents = [math.exp(value) for value in values.double().tolist()]
    return [exponent / sum(exponents) for exponent in exponents]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def assert_equal(found: Tensor, expected: float) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.double), rtol=2e-5, atol=2e-5)


def slow_reuse(case: Case, reusable: Callable[[list[tuple[int, int]], int], set[int]]) -> float:
    """-log of the mean over t >= 2 of (1/K) * sum of P_t over the reusable set, summed over sequences."""
    total = 0.0
    for positions in sequences(case.documents):
        masses = [
            sum(softmax(case.logits[positions[t]])[expert] for expert in reusable(positions, t)) / K
            for t in range(1, len(positions))
        ]
        if masses:
            total -= math.log(sum(masses) / len(masses) + 1e-8)
    return total

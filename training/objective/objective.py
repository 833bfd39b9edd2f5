"""The objective of a micro-batch, and what is recorded beside it.

L = (1 - distill) * L_CE + distill * L_distill + the sum over `TERMS` of ramp(step) * coefficient * term; for `local` the
task loss is a number without a gradient

Pure arithmetic over `terms.py`, `losses.py` and `token_loss.py`; knows nothing of models, optimizers or processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from configs.load import UserError
from data.batches import Batch
from training.model.routers import Routing
from training.objective import losses
from training.objective.terms import Layers, ObjectiveArguments, values_of, weights_at
from training.objective.token_loss import Head, token_sums

STACKED_NUMBERS = 2**20
"""Router logits of layers that are worked on together: where layers are small, calls would cost more than arithmetic."""


def total_counts(args: ObjectiveArguments, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """How many items all micro-batches of one process have; the caller adds them over processes."""
    count = partial(losses.counts, lags=args.lags, window=args.working_set_window)
    parts = [count(batch.document_ids_BS, batch.labels_BS) for batch in batches]
    return {key: torch.stack([part[key] for part in parts]).sum() for key in parts[0]}


@dataclass
class Objective:
    """One micro-batch's share of the global objective; shares add up over micro-batches and processes.

    `loss` is to be differentiated. `terms` (unweighted means, no gradient), `reuse_L` (EOR per layer), `load_LE` (how
    often each expert was chosen) and `hits_C` (LRU hit rate per entry of `cache_slots`) are for the record.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    reuse_L: Tensor
    load_LE: Tensor
    hits_C: Tensor


def objective(
    args: ObjectiveArguments,
    *,
    outputs_BSX: Tensor,
    routings: Sequence[Routing],
    batch: Batch,
    count: Mapping[str, Tensor],
    step: int,
    base_outputs_BSX: Tensor | None = None,
    head: Head | None = None,
) -> Objective:
    """The objective of one micro-batch, every term divided by the **global** `count` of its items; `step` is 0-based.

    `outputs_BSX` are the model's logits, or with a `head` that makes logits of them its last hidden states, and
    `base_outputs_BSX`, needed for distillation only, those of the base.
    """
    _check_slots(args, top_k=max(routing.ids_BSK.shape[-1] for routing in routings))
    weights, distill = weights_at(args, step), args.coefficient("distill_coef")
    groups = []
    for n_layers, stacked in _stacked(routings):
        layers = Layers(args, stacked, n_layers, batch.document_ids_BS, count=count, weights=weights)
        groups.append((values_of(layers, weights), _reuse_rates(layers), _hit_rates(layers)))
    values, reuse_L, hits_C = zip(*groups, strict=True)
    terms = {name: torch.stack([group[name] for group in values]).sum() / len(routings) for name in values[0]}
    assert not distill or base_outputs_BSX is not None, "distillation needs the base's predictions"
    tokens, base_BSX = count["tokens"].clamp(min=1).float(), base_outputs_BSX if distill else None
    shares = ((1.0 - distill) / tokens, distill / tokens)
    task = token_sums(outputs_BSX, batch.labels_BS, base_BSX, head=head, weights=shares)
    loss = torch.stack([task.loss, *(weights[name] * value for name, value in terms.items() if weights[name])]).sum()
    terms["loss"] = task.cross_entropy / tokens
    if distill:
        terms["distill_kl"] = task.distill_kl / tokens
    return Objective(
        loss=loss,
        terms={name: value.detach() for name, value in terms.items()},
        reuse_L=torch.cat(reuse_L),
        load_LE=torch.stack(
            [
                losses.chosen_by_expert(routing.ids_BSK, batch.document_ids_BS, routing.logits_BSE.shape[-1])
                for routing in routings
            ]
        ),
        hits_C=torch.stack(hits_C).sum(0) / len(routings),
    )


def _check_slots(args: ObjectiveArguments, *, top_k: int) -> None:
    if args.rewards_cache and min(args.cache_slots) < top_k:
        raise UserError(
            f"cache_slots={list(args.cache_slots)}: a cache of {min(args.cache_slots)} experts cannot hold the {top_k} "
            f"that one token uses in a layer; write at least {top_k}"
        )


def _stacked(routings: Sequence[Routing]) -> Iterator[tuple[int, Routing]]:
    """Numbers of layers, and these layers as more rows of one; a layer too large to gain from company is not copied."""
    for _, alike in groupby(routings, key=lambda routing: (routing.logits_BSE.shape, routing.ids_BSK.shape)):
        layers = list(alike)
        at_once = max(1, STACKED_NUMBERS // layers[0].logits_BSE.numel())
        for first in range(0, len(layers), at_once):
            some = layers[first : first + at_once]
            yield len(some), some[0] if len(some) == 1 else _joined(some)


def _joined(layers: Sequence[Routing]) -> Routing:
    fields = zip(*layers, strict=True)
    joined: list[Any] = [None if field[0] is None else torch.cat(field) for field in fields]
    return Routing(*joined)


@torch.no_grad()
def _reuse_rates(layers: Layers) -> Tensor:
    """[L] EOR: share of a token's experts that the token before it used too (hard choices)."""
    shared_L = layers.before_BSE.gather(-1, layers.routing.ids_BSK).view(layers.n_layers, -1).sum(1)
    return shared_L / (layers.top_k * layers.count["pairs_1"].clamp(min=1))


@torch.no_grad()
def _hit_rates(layers: Layers) -> Tensor:
    """[C] hit rate of each of the caches, added over these layers: LRUs that start cold with every sequence."""
    ids_BSK = layers.routing.ids_BSK
    hits = [held_BSE.gather(-1, ids_BSK).sum().double() for held_BSE in layers.cached]
    zero = torch.zeros((), dtype=torch.double, device=ids_BSK.device)  # so that there may be no cache
    return torch.stack([*hits, zero])[:-1] / (layers.top_k * layers.count["positions"].clamp(min=1))

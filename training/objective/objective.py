"""The objective: which terms with which coefficients and ramps (ReMoE, arXiv 2605.27081, and our `cache`, `cache_miss`).

L = (1 - distill) * L_CE + distill * L_distill + kl * L_trust + ramp_r(s) * (reuse * L_reuse + miss * L_miss)
  + ramp_c(s) * (smooth * L_smooth + lag * L_lag + ws * L_ws)

Pure arithmetic over `training/objective/losses.py`; knows nothing of models, optimizers or processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from configs.load import UserError
from data.batches import Batch
from training.model.routers import Routing
from training.objective import losses
from training.objective.token_loss import Head, token_sums

# Published coefficients (arXiv 2605.27081). Ours: `cache` replaces the previous token's experts by what an LRU cache
# holds; `cache_miss` counts that cache's misses softly instead of rewarding probability mass, and learns the task mostly
# from the base's own predictions.
_REMOE = {
    "distill_coef": 0.0,
    "miss_coef": 0.0,
    "router_kl_coef": 0.45,
    "reuse_coef": 0.2,
    "smooth_coef": 0.05,
    "lag_coef": 0.05,
    "working_set_coef": 0.01,
}
_NOTHING = dict.fromkeys(_REMOE, 0.0)
STACKED_NUMBERS = 2**20
"""Router logits of layers that are worked on together: where layers are small, calls would cost more than arithmetic."""
PRESETS: dict[str, dict[str, float]] = {
    "ce_only": _NOTHING,
    "remoe": _REMOE,
    "remoe_no_trust": {**_REMOE, "router_kl_coef": 0.0},
    "remoe_no_reuse": {**_REMOE, "reuse_coef": 0.0},
    "remoe_no_consistency": {**_REMOE, "smooth_coef": 0.0, "lag_coef": 0.0, "working_set_coef": 0.0},
    "cache": {**_NOTHING, "router_kl_coef": 0.45, "reuse_coef": 0.2},
    "cache_miss": {**_NOTHING, "distill_coef": 0.9, "router_kl_coef": 0.1, "miss_coef": 0.25},
}


@dataclass
class ObjectiveArguments:
    """What is optimised. A coefficient that is left out has its preset's value."""

    objective: str = "remoe"  # ce_only, remoe, remoe_no_{trust,reuse,consistency}, cache or cache_miss
    distill_coef: float | None = None  # share of the task loss that is the KL to the base's predictions, 0 to below 1
    reuse_coef: float | None = None  # weight of the reuse reward
    miss_coef: float | None = None  # weight of the soft misses of the caches of `cache_slots`
    miss_temperature: float = 0.25  # in router logits: how close a call must be to count as one
    router_kl_coef: float | None = None  # weight of the KL to the original router (trust)
    smooth_coef: float | None = None  # weight of the symmetric KL between neighbours
    lag_coef: float | None = None  # weight of the same at `lags`
    working_set_coef: float | None = None  # weight of the windowed entropy
    router_aux_loss_coef: float = 0.0  # weight of the load-balance loss; only for pretraining
    lags: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    working_set_window: int = 16  # tokens; not published, ours
    cache_slots: list[int] = field(
        default_factory=lambda: [8]
    )  # LRU sizes per layer of `cache` and `cache_miss`, averaged
    reuse_warmup_steps: int = 400  # steps of the linear ramp from 0 of the reuse and miss terms
    consistency_warmup_steps: int = 800  # the same for the smooth, lag and working-set terms

    def __post_init__(self) -> None:
        if self.objective not in PRESETS:
            raise ValueError(f"objective={self.objective!r} is not known; choose one of {', '.join(PRESETS)}")
        for key, value in PRESETS[self.objective].items():
            if getattr(self, key) is None:
                setattr(self, key, value)
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)} is negative; write 0 to switch the term off")
        if _value(self.distill_coef) >= 1:
            raise ValueError(
                f"distill_coef={self.distill_coef} must be below 1: before the first step the base's predictions give no "
                "gradient, so that nothing would show whether the routers train; write 0.9"
            )
        if min([self.working_set_window, *self.lags, *self.cache_slots], default=1) < 1:
            raise ValueError("lags, cache_slots and working_set_window must be at least 1")

    @property
    def rewards_cache(self) -> bool:
        return self.objective in ("cache", "cache_miss")


def ramp(step: int, warmup_steps: int) -> float:
    """Linear from 0 at step 0 to 1 at `warmup_steps`."""
    return 1.0 if warmup_steps <= 0 else min(1.0, step / warmup_steps)


def total_counts(args: ObjectiveArguments, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The items of all micro-batches of one process; the caller adds them over processes."""
    parts = [
        losses.counts(b.document_ids_BS, b.labels_BS, lags=args.lags, window=args.working_set_window) for b in batches
    ]
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
    weights = _weights(args, step)
    groups = [_group(args, stacked, n_layers, batch, count, weights) for n_layers, stacked in _stacked(routings)]
    terms = {key: torch.stack([g.terms[key] for g in groups]).sum() / len(routings) for key in groups[0].terms}
    distill = bool(weights["distill_kl"])
    assert not distill or base_outputs_BSX is not None, "distillation needs the base's predictions"
    tokens = at_least_one(count["tokens"]).float()
    task = token_sums(
        outputs_BSX, batch.labels_BS, base_outputs_BSX if distill else None, head=head,
        weights=(weights["loss"] / tokens, weights["distill_kl"] / tokens),
    )  # fmt: skip
    loss = torch.stack([task.loss, *(weights[key] * value for key, value in terms.items() if weights[key])]).sum()
    terms["loss"] = task.cross_entropy / tokens
    if distill:
        terms["distill_kl"] = task.distill_kl / tokens
    return Objective(
        loss=loss,
        terms={key: value.detach() for key, value in terms.items()},
        reuse_L=torch.cat([group.reuse_L for group in groups]),
        load_LE=torch.stack([_load(routing, batch) for routing in routings]),
        hits_C=torch.stack([group.hits_C for group in groups]).sum(0) / len(routings),
    )


def _weights(args: ObjectiveArguments, step: int) -> dict[str, float]:
    """What every term counts for at this step."""
    distill = _value(args.distill_coef)
    reuse_ramp, consistency_ramp = ramp(step, args.reuse_warmup_steps), ramp(step, args.consistency_warmup_steps)
    return {
        "loss": 1.0 - distill,
        "distill_kl": distill,
        "trust_kl": _value(args.router_kl_coef),
        "reuse_loss": reuse_ramp * _value(args.reuse_coef),
        "miss_loss": reuse_ramp * _value(args.miss_coef),
        "smooth_loss": consistency_ramp * _value(args.smooth_coef),
        "lag_loss": consistency_ramp * _value(args.lag_coef),
        "working_set_loss": consistency_ramp * _value(args.working_set_coef),
        "load_balance_loss": args.router_aux_loss_coef,
    }


def _check_slots(args: ObjectiveArguments, *, top_k: int) -> None:
    if args.rewards_cache and min(args.cache_slots) < top_k:
        raise UserError(
            f"cache_slots={list(args.cache_slots)}: a cache of {min(args.cache_slots)} experts cannot hold the {top_k} "
            f"that one token uses in a layer; write at least {top_k}"
        )


def _stacked(routings: Sequence[Routing]) -> Iterator[tuple[int, Routing]]:
    """How many layers, and these as more rows of one; a layer too large to gain from company comes alone, not copied."""
    for _, alike in groupby(routings, key=lambda routing: (routing.logits_BSE.shape, routing.ids_BSK.shape)):
        layers = list(alike)
        at_once = max(1, STACKED_NUMBERS // layers[0].logits_BSE.numel())
        for first in range(0, len(layers), at_once):
            some = layers[first : first + at_once]
            yield len(some), some[0] if len(some) == 1 else _joined(some)


def _joined(layers: Sequence[Routing]) -> Routing:
    references = [layer.reference_logits_BSE for layer in layers if layer.reference_logits_BSE is not None]
    return Routing(
        logits_BSE=torch.cat([layer.logits_BSE for layer in layers]),
        weights_BSK=torch.cat([layer.weights_BSK for layer in layers]),
        ids_BSK=torch.cat([layer.ids_BSK for layer in layers]),
        reference_logits_BSE=torch.cat(references) if references else None,
    )


class _Group(NamedTuple):
    terms: dict[str, Tensor]
    reuse_L: Tensor
    hits_C: Tensor


def _group(
    args: ObjectiveArguments, routing: Routing, n_layers: int, batch: Batch, count: Mapping[str, Tensor],
    weights: Mapping[str, float],
) -> _Group:  # fmt: skip
    """Sums over some layers: of the terms, without a graph where they count for nothing, and of the rewarded caches' hit rates.

    `routing` holds all of their rows; the EOR is each layer's own.
    """
    documents = batch.document_ids_BS.repeat(n_layers, 1)
    n_experts, top_k = routing.logits_BSE.shape[-1], routing.ids_BSK.shape[-1]
    log_probs = routing.logits_BSE.log_softmax(-1)
    probs = log_probs.exp()
    before = losses.previous_choice(routing.ids_BSK, documents, n_experts)
    slots_C = args.cache_slots if args.rewards_cache else []
    cached = [losses.lru_content(routing.ids_BSK, documents, n_experts, slots) for slots in slots_C]
    reusable = cached or [before]
    lags = sorted({1, *args.lags})
    with torch.set_grad_enabled(torch.is_grad_enabled() and weights["smooth_loss"] + weights["lag_loss"] > 0):
        kl_sums = losses.symmetric_kl_sums(probs, log_probs, documents, lags)
        change = {lag: total / at_least_one(count[f"pairs_{lag}"]) for lag, total in zip(lags, kl_sums, strict=True)}

    def reuse() -> Tensor:
        sums = [losses.reuse_loss_sum(probs, held, documents, top_k) for held in reusable]
        return torch.stack(sums).mean() / at_least_one(count["sequences"])

    def lagged() -> Tensor:
        fitting = [change[lag] for lag in args.lags if count[f"pairs_{lag}"] > 0]
        return torch.stack(fitting).mean() if fitting else probs.new_zeros(())

    def working_set() -> Tensor:
        return losses.working_set_sum(probs, documents, args.working_set_window) / at_least_one(count["windows"])

    def missed() -> Tensor:
        sums = [
            losses.miss_loss_sum(routing.logits_BSE, held, documents, top_k, args.miss_temperature) for held in reusable
        ]
        return torch.stack(sums).mean() / at_least_one(count["positions"])

    def trust() -> Tensor:
        assert routing.reference_logits_BSE is not None, "asked for below only with a reference"
        reference = routing.reference_logits_BSE.log_softmax(-1)
        return losses.trust_kl_sum(probs, log_probs, reference, documents) / at_least_one(count["positions"])

    def balance() -> Tensor:
        layers = zip(probs.chunk(n_layers), routing.ids_BSK.chunk(n_layers), strict=True)
        sums = [losses.load_balance_sum(probs, ids, batch.document_ids_BS) for probs, ids in layers]
        return torch.stack(sums).sum() / at_least_one(count["positions"])

    terms = {"reuse_loss": reuse, "smooth_loss": lambda: change[1], "lag_loss": lagged, "working_set_loss": working_set}
    if args.miss_coef:
        terms["miss_loss"] = missed
    if routing.reference_logits_BSE is not None:
        terms["trust_kl"] = trust
    if args.router_aux_loss_coef:
        terms["load_balance_loss"] = balance
    values = {}
    for key, value in terms.items():
        with torch.set_grad_enabled(torch.is_grad_enabled() and weights[key] != 0):
            values[key] = value().float()
    return _Group(values, _reuse_rates(routing, n_layers, before, count), _hit_rates(routing, cached, count))


@torch.no_grad()
def _reuse_rates(routing: Routing, n_layers: int, before_BSE: Tensor, count: Mapping[str, Tensor]) -> Tensor:
    """[L] EOR: share of a token's experts that the token before it used too (hard choices)."""
    shared_L = before_BSE.gather(-1, routing.ids_BSK).view(n_layers, -1).sum(1)
    return shared_L / (routing.ids_BSK.shape[-1] * at_least_one(count["pairs_1"]))


@torch.no_grad()
def _hit_rates(routing: Routing, held: Sequence[Tensor], count: Mapping[str, Tensor]) -> Tensor:
    """[C] hit rate of each of the caches that hold `held`, added over layers: LRUs that start cold with every sequence."""
    hits = [content.gather(-1, routing.ids_BSK).sum().double() for content in held]
    zero = torch.zeros((), dtype=torch.double, device=routing.ids_BSK.device)  # so that there may be no cache
    return torch.stack([*hits, zero])[:-1] / (routing.ids_BSK.shape[-1] * at_least_one(count["positions"]))


@torch.no_grad()
def _load(routing: Routing, batch: Batch) -> Tensor:
    ids = routing.ids_BSK[batch.document_ids_BS >= 0]
    return torch.bincount(ids.flatten(), minlength=routing.logits_BSE.shape[-1]).double()


def at_least_one(count: Tensor) -> Tensor:
    return count.clamp(min=1)


def _value(coefficient: float | None) -> float:
    assert coefficient is not None, "presets fill every coefficient in"
    return coefficient

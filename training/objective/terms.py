"""The terms of the objective, their coefficients and ramps, and the presets: ReMoE (arXiv 2605.27081), MELINOE, and ours.

A new term is a pure function in `losses.py`, a field of `ObjectiveArguments` and a row of `TERMS`.
Letters: B rows, S sequence, E experts, K chosen; B counts the rows of all layers that are worked on together.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.checks import in_range
from training.model.cache_in_the_loop import HALF_LIVES
from training.model.routers import Routing
from training.objective import losses

# Published coefficients (arXiv 2605.27081). Ours: `cache` replaces the previous token's experts by what an LRU cache
# holds; `cache_miss` counts that cache's misses softly instead of rewarding probability mass, and learns the task mostly
# from the base's own predictions. `in_the_loop` trains routers as they are served with a lever: see `cache_in_the_loop.py`.
_REMOE = {"router_kl_coef": 0.45, "reuse_coef": 0.2, "smooth_coef": 0.05, "lag_coef": 0.05, "working_set_coef": 0.01}
_NOTHING = dict.fromkeys(("distill_coef", "miss_coef", "soft_cache_coef", "rank_coef", *_REMOE), 0.0)
PRESETS: dict[str, dict[str, float]] = {
    "ce_only": _NOTHING,
    "remoe": {**_NOTHING, **_REMOE},
    "remoe_no_trust": {**_NOTHING, **_REMOE, "router_kl_coef": 0.0},
    "remoe_no_reuse": {**_NOTHING, **_REMOE, "reuse_coef": 0.0},
    "remoe_no_consistency": {**_NOTHING, "router_kl_coef": 0.45, "reuse_coef": 0.2},
    "cache": {**_NOTHING, "router_kl_coef": 0.45, "reuse_coef": 0.2},
    "cache_miss": {**_NOTHING, "distill_coef": 0.9, "router_kl_coef": 0.1, "miss_coef": 0.25},
    "melinoe": {**_NOTHING, "soft_cache_coef": 0.1, "rank_coef": 1.0},
    "in_the_loop": {
        **_NOTHING, "distill_coef": 0.9, "router_kl_coef": 0.02, "miss_coef": 0.08, "miss_temperature": 0.02, "lever_delta": 0.06,
        "candidate_experts": 4,
    },
}  # fmt: skip
PRESETS["local"] = {**PRESETS["in_the_loop"], "distill_coef": 0.0, "router_kl_coef": 1.0, "candidate_experts": 0}
LOCAL = "local"
"""No task loss: every router learns from its inputs as they are, without a backward pass through the model (ours)."""
REWARDING_CACHES = ("cache", "cache_miss", "melinoe", "in_the_loop", "local")
"""Objectives whose reuse and miss terms are about LRU caches of `cache_slots` instead of the previous token's experts."""
MISS_TEMPERATURE = 0.25
IN_THE_LOOP = ("lever_delta", "cache_slots", "cache_policy", "candidate_experts", "miss_temperature")
"""What a cache in the loop depends on, whatever the coefficients."""


@dataclass
class ObjectiveArguments:
    """What is optimised. A coefficient that is left out has its preset's value."""

    # ce_only, remoe, remoe_no_{trust,reuse,consistency}, cache, cache_miss, melinoe, in_the_loop or local
    objective: str = "remoe"
    distill_coef: float | None = None  # share of the task loss that is the KL to the base's predictions, 0 to below 1
    reuse_coef: float | None = None  # weight of the reuse reward
    miss_coef: float | None = None  # weight of the soft misses of the caches of `cache_slots`
    # how close a call must be to count as one: in router logits, or with a lever in the loop in mixing weight
    miss_temperature: float | None = None
    # what experts that a cache holds get on top of their mixing weight, in the training pass too; with 0 they are chosen by
    # the router alone, and misses counted in mixing weight; without it there is no cache in the loop
    lever_delta: float | None = None
    router_kl_coef: float | None = None  # weight of the KL to the original router (trust)
    # weight of what is asked for and a soft cache of earlier requests does not hold
    soft_cache_coef: float | None = None
    soft_cache_decay: float = 0.9  # part of that cache that is left after a token
    rank_coef: float | None = None  # weight of pairs of experts that the original router has the other way round
    rank_margin: float = 0.1  # probability by which a pair should be apart
    smooth_coef: float | None = None  # weight of the symmetric KL between neighbouring tokens
    lag_coef: float | None = None  # weight of the symmetric KL between tokens at the distances of `lags`
    working_set_coef: float | None = None  # weight of the entropy of the mean over windows of `working_set_window`
    router_aux_loss_coef: float = 0.0  # weight of the load-balance loss; only for pretraining
    # distances in tokens, over which the lag term is averaged
    lags: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    working_set_window: int = 16  # tokens of a window; not published, ours
    # experts per layer in the caches of `cache` and `cache_miss`, over which their terms are averaged, and of `in_the_loop`,
    # where of several sizes the rows of a batch take one after the other
    cache_slots: list[int] = field(default_factory=lambda: [8])
    # experts beside the chosen ones that are computed with weight 0, so that the task loss has a say in which are chosen
    candidate_experts: int | None = None
    cache_policy: str = "decayed"  # of the cache in the loop: decayed, which engines have, or lru
    reuse_warmup_steps: int = 400  # steps of the linear ramp from 0 of the reuse and miss terms
    consistency_warmup_steps: int = 800  # steps of the linear ramp from 0 of the smooth, lag and working-set terms

    def __post_init__(self) -> None:
        if self.objective not in PRESETS:
            raise ValueError(f"objective={self.objective!r} is not known; choose one of {', '.join(PRESETS)}")
        for key, value in PRESETS[self.objective].items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        self.miss_temperature = MISS_TEMPERATURE if self.miss_temperature is None else self.miss_temperature
        coefficients = dict.fromkeys((*_NOTHING, "router_aux_loss_coef"), (0, math.inf))
        if self.lever_delta is not None:
            coefficients["lever_delta"] = (0, math.inf)
        in_range(self, **coefficients, reuse_warmup_steps=(0, math.inf), consistency_warmup_steps=(0, math.inf))
        in_range(self, **dict.fromkeys(("working_set_window", "lags", "cache_slots"), (1, math.inf)))
        self.candidate_experts = self.candidate_experts or 0
        if self.candidate_experts < 0 or (self.candidate_experts and (not self.is_in_the_loop or self.is_local)):
            raise ValueError(
                f"candidate_experts={self.candidate_experts}: write a number of at least 0; more than 0 has a meaning with "
                "objective=in_the_loop only"
            )
        if not 0 < self.miss_temperature < math.inf:
            raise ValueError(f"miss_temperature={self.miss_temperature}: write a number above 0, as 0.25")
        if self.rewards_cache and not self.cache_slots:
            raise ValueError(f"cache_slots=[]: objective={self.objective} is about caches; write at least one, as [8]")
        if self.is_in_the_loop and not self.rewards_cache:
            raise ValueError(
                f"lever_delta={self.lever_delta} acts on a cache, and so with objective=in_the_loop or local only"
            )
        if self.cache_policy not in HALF_LIVES:
            raise ValueError(f"cache_policy={self.cache_policy!r} is not known; write of {', '.join(HALF_LIVES)}")
        if self.is_local and self.coefficient("distill_coef"):
            raise ValueError(f"distill_coef={self.distill_coef}: objective=local has no task loss; leave it out")
        if self.coefficient("distill_coef") >= 1:
            raise ValueError(
                f"distill_coef={self.distill_coef} must be below 1: before the first step the base's predictions give no "
                "gradient, so that nothing would show whether the routers train; write 0.9"
            )

    @property
    def rewards_cache(self) -> bool:
        return self.objective in REWARDING_CACHES

    @property
    def is_in_the_loop(self) -> bool:
        """Whether a cache, and what a lever makes of it, is part of the training pass."""
        return self.lever_delta is not None

    @property
    def is_local(self) -> bool:
        """Whether there is no task loss, and no gradient but inside each router."""
        return self.objective == LOCAL

    def coefficient(self, key: str) -> float:
        value: float | None = getattr(self, key)
        assert value is not None, "presets fill every coefficient in"
        return value


class Layers:
    """What the terms are made of: the routing of some layers, held as more rows of one.

    Args:
        routing: the rows of one layer after those of the other, `n_layers` of them.
        document_ids_BS: which document each position of one layer's rows is of.
        count: over how many items the terms are averaged, over all micro-batches and processes.
        weights: what each term is multiplied by, by its name.

    Attributes:
        before_BSE: bool: the experts of the token before.
        cached: [B, S, E] bool for each of `cache_slots`, or for the cache in the loop: what it holds; none if the objective is
            not about caches.
        change: lag -> mean symmetric KL between tokens at that distance.
    """

    def __init__(
        self, args: ObjectiveArguments, routing: Routing, n_layers: int, document_ids_BS: Tensor, *,
        count: Mapping[str, Tensor], weights: Mapping[str, float],
    ) -> None:  # fmt: skip
        self.args, self.routing, self.n_layers, self.count = args, routing, n_layers, count
        self.document_ids_BS, self.top_k = document_ids_BS.repeat(n_layers, 1), routing.ids_BSK.shape[-1]
        self.log_probs_BSE = routing.logits_BSE.log_softmax(-1)
        self.probs_BSE = self.log_probs_BSE.exp()
        events = (routing.ids_BSK, self.document_ids_BS, routing.logits_BSE.shape[-1])
        self.before_BSE = losses.previous_choice(*events)
        if routing.resident_BSE is not None:
            self.cached = [routing.resident_BSE & (self.document_ids_BS >= 0).unsqueeze(-1)]
        else:
            sizes = args.cache_slots if args.rewards_cache else []
            self.cached = [losses.lru_content(*events, slots) for slots in sizes]
        lags = sorted({1, *args.lags})
        with torch.set_grad_enabled(torch.is_grad_enabled() and weights["smooth_loss"] + weights["lag_loss"] > 0):
            sums_D = losses.symmetric_kl_sums(self.probs_BSE, self.log_probs_BSE, self.document_ids_BS, lags)
            pairs_D = [count[f"pairs_{lag}"].clamp(min=1) for lag in lags]
            self.change = {lag: total / n for lag, total, n in zip(lags, sums_D, pairs_D, strict=True)}

    def mean_over_reusable(self, sum_of: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of a sum over what is rewarded: what each cache holds, or the experts of the token before."""
        return torch.stack([sum_of(held_BSE) for held_BSE in self.cached or [self.before_BSE]]).mean()


def reuse(layers: Layers) -> Tensor:
    others = (layers.document_ids_BS, layers.top_k)
    return layers.mean_over_reusable(lambda held_BSE: losses.reuse_loss_sum(layers.probs_BSE, held_BSE, *others))


def smooth(layers: Layers) -> Tensor:
    return layers.change[1]


def lagged(layers: Layers) -> Tensor:
    """Over those of `lags` at which there are pairs; the others' sums are 0."""
    lags = layers.args.lags
    fitting = torch.stack([layers.count[f"pairs_{lag}"] > 0 for lag in lags]).sum().clamp(min=1)
    return torch.stack([layers.change[lag] for lag in lags]).sum() / fitting


def working_set(layers: Layers) -> Tensor:
    return losses.working_set_sum(layers.probs_BSE, layers.document_ids_BS, layers.args.working_set_window)


def missed(layers: Layers) -> Tensor:
    """On the scores that decide: logits, or with a cache in the loop mixing weights with what residents get on top."""
    temperature, routing = layers.args.miss_temperature, layers.routing
    assert temperature is not None, "presets and defaults fill it in"
    scores_BSE = routing.logits_BSE if routing.score_BSE is None else routing.score_BSE
    others = (layers.document_ids_BS, layers.top_k, temperature)
    return layers.mean_over_reusable(lambda held_BSE: losses.miss_loss_sum(scores_BSE, held_BSE, *others))


def trust(layers: Layers) -> Tensor | None:
    if layers.routing.reference_logits_BSE is None:
        return None
    reference_BSE = layers.routing.reference_logits_BSE.log_softmax(-1)
    return losses.trust_kl_sum(layers.probs_BSE, layers.log_probs_BSE, reference_BSE, layers.document_ids_BS)


def soft_requests(layers: Layers) -> Tensor:
    """Requests are hard, with the gradient of P_t."""
    args, ids_BSK = layers.args, layers.routing.ids_BSK
    hard_BSE = torch.zeros_like(layers.probs_BSE).scatter_(-1, ids_BSK, 1.0)
    requests_BSE = hard_BSE + layers.probs_BSE - layers.probs_BSE.detach()
    how: dict[str, Any] = {"top_k": layers.top_k, "decay": args.soft_cache_decay}
    return torch.stack([
        losses.soft_request_sum(
            requests_BSE, losses.soft_cache(requests_BSE, layers.document_ids_BS, slots=slots, **how), layers.document_ids_BS
        )
        for slots in args.cache_slots
    ]).mean()  # fmt: skip


def rank(layers: Layers) -> Tensor | None:
    reference_BSE = layers.routing.reference_logits_BSE
    if reference_BSE is None:
        return None
    return losses.margin_rank_sum(
        layers.probs_BSE, reference_BSE, layers.document_ids_BS, margin=layers.args.rank_margin
    )


def load_balance(layers: Layers) -> Tensor:
    parts = (layers.probs_BSE, layers.routing.ids_BSK, layers.document_ids_BS)
    by_layer = zip(*(tensor.chunk(layers.n_layers) for tensor in parts), strict=True)
    return torch.stack([losses.load_balance_sum(*layer) for layer in by_layer]).sum()


class Term(NamedTuple):
    """One term of the objective.

    Attributes:
        name: what it is called in `metrics.jsonl`, after `train/`.
        coefficient: the field of `ObjectiveArguments` that it is multiplied by ...
        ramp: ... and the one with the steps in which that grows from 0; None: it counts from the first step on.
        items: the key of `losses.counts` that the sum is divided by; None: it is a mean already.
        value: the sum over these layers; None if it cannot be computed, for want of the original routers.
        always: whether it is computed for the record where its coefficient is 0.
        settings: further fields of `ObjectiveArguments` that it depends on.
    """

    name: str
    coefficient: str
    ramp: str | None
    items: str | None
    value: Callable[[Layers], Tensor | None]
    always: bool = True
    settings: tuple[str, ...] = ()


REUSE, CONSISTENCY = "reuse_warmup_steps", "consistency_warmup_steps"
TERMS = (  # added up in this order, on which last bits depend
    Term("reuse_loss", "reuse_coef", REUSE, "sequences", reuse, settings=("cache_slots",)),
    Term("smooth_loss", "smooth_coef", CONSISTENCY, None, smooth),
    Term("lag_loss", "lag_coef", CONSISTENCY, None, lagged, settings=("lags",)),
    Term("working_set_loss", "working_set_coef", CONSISTENCY, "windows", working_set, settings=("working_set_window",)),
    Term(
        "miss_loss",
        "miss_coef",
        REUSE,
        "positions",
        missed,
        False,
        ("miss_temperature", "cache_slots"),
    ),
    Term(
        "soft_cache_loss",
        "soft_cache_coef",
        REUSE,
        "positions",
        soft_requests,
        False,
        ("soft_cache_decay", "cache_slots"),
    ),
    Term("rank_loss", "rank_coef", None, "positions", rank, False, ("rank_margin",)),
    Term("trust_kl", "router_kl_coef", None, "positions", trust),
    Term("load_balance_loss", "router_aux_loss_coef", None, "positions", load_balance, False),
)


def ramp(step: int, warmup_steps: int) -> float:
    """Linear from 0 at step 0 to 1 at `warmup_steps`."""
    return 1.0 if warmup_steps <= 0 else min(1.0, step / warmup_steps)


def weights_at(args: ObjectiveArguments, step: int) -> dict[str, float]:
    """What every term is multiplied by at this step, by its name."""
    grown: dict[str | None, float] = {key: ramp(step, getattr(args, key)) for key in (REUSE, CONSISTENCY)}
    return {term.name: grown.get(term.ramp, 1.0) * args.coefficient(term.coefficient) for term in TERMS}


def objective_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those keys of a training config, with their values, that decide what was optimised.

    They are the coefficients that are not 0, and the ramps and settings of their terms.
    """
    keys = ["distill_coef"] * bool(config["distill_coef"])
    for term in TERMS:
        if config[term.coefficient]:
            keys += [term.coefficient, *term.settings, *([term.ramp] if term.ramp else [])]
    if config.get("lever_delta") is not None:
        keys += IN_THE_LOOP
    without = set() if config["objective"] in REWARDING_CACHES else {"cache_slots"}
    return {key: config[key] for key in dict.fromkeys(keys) if key not in without}


def values_of(layers: Layers, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The means of the terms, added over these layers; without a graph where they count for nothing."""
    values = {}
    for term in TERMS:
        if not term.always and not layers.args.coefficient(term.coefficient):
            continue
        with torch.set_grad_enabled(torch.is_grad_enabled() and weights[term.name] != 0):
            total = term.value(layers)
            if total is not None:
                items = layers.count[term.items].clamp(min=1) if term.items else 1
                values[term.name] = (total / items).float()
    return values

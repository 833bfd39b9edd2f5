"""The cache prior: residents get a bonus when experts are chosen, and the chosen ones are mixed by their own weights.

In logits (Cache-Prior, arXiv 2412.00099): experts are chosen by z + delta * spread * m. m is 1 for residents and for the
router's own `keep` best, and spread is the running mean of max(z) - min(z) in the layer. In probability (ours): by
p + delta * m, where p is the mixing weight that an expert has or would have. There a swap costs what it takes from the
mixture, while equal gaps of logits may be worth little or much.
Bounds, of a token in a layer (ours): swaps are made cheapest first, as long as what they take from the mixture adds up to
at most `regret`, and at most `swaps` of them. With delta=inf every swap that the bounds allow is made.
Axes: T tokens, E experts, K chosen.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from evaluation.engine.levers.scores import Array, Ids, Mask, Scores, number_of
from training.model.compiled import compiled

if TYPE_CHECKING:  # options are read where torch is not loaded
    from torch import Tensor

TIE = 1e-12
"""What the router has chosen stays where others are as good."""
Strength = Annotated[float, Field(ge=0)]


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class Prior:
    """What a user decides about it."""

    delta: (
        Strength | tuple[Strength, ...]
    )  # strength: of the mixing weight, or lambda; one for each layer: 0.02/0.04/...
    space: Literal["probability", "logits"] = "probability"
    keep: Annotated[int, Field(ge=0)] = 0  # that many of the router's own best get the bonus too; the paper has 1
    regret: Strength = math.inf  # mixing weight that a token may lose in a layer at most
    swaps: Annotated[int, Field(ge=0)] | None = None  # experts of a token that may be swapped in a layer at most
    prefill: bool = False  # in prompts too

    @property
    def is_bounded(self) -> bool:
        """Whether what a token may lose has a bound."""
        return self.regret < math.inf or self.swaps is not None

    def of_layer(self, layer: int, layers: int) -> "LayerPrior":
        """The rule of one layer; a `ValueError` if strengths are given for another number of layers."""
        return LayerPrior(self, number_of(self.delta, "delta", layer, layers))


@dataclass
class LayerPrior:
    """The rule of one layer, which in logits remembers their spread."""

    prior: Prior
    delta: float
    _spread: list[float] = field(default_factory=lambda: [0.0, 0.0])  # sum, tokens

    def see(self, logits_TE: "Tensor") -> None:
        """Take note of a call, of prompts too."""
        if self.prior.space == "logits":
            self._spread[0] += float((logits_TE.amax(1) - logits_TE.amin(1)).float().sum())
            self._spread[1] += len(logits_TE)

    def choose(self, scores: Scores, resident_TE: Mask) -> Ids:
        """The experts [T, K], in no order."""
        prior, own_TK = self.prior, scores.ids_TK
        preferred_TE = _with_best(resident_TE, own_TK, scores.decisive_TE, prior.keep) if prior.keep else resident_TE
        score_TE, bonus = scores.decisive_TE, self.delta
        if prior.space == "logits":
            score_TE, bonus = scores.logits_TE, self.delta * self._spread[0] / max(1.0, self._spread[1])
        if math.isinf(self.delta):  # no larger than what puts the least before the best: inf plus inf is no order
            finite = score_TE[np.isfinite(score_TE)]
            bonus = 1.0 + float(finite.max() - finite.min())
        # what decides rises with the logits: without bias and groups these decide alone, and nothing is lost by rounding
        if prior.space == "logits" and scores.decisive_TE is not scores.mass_TE:
            score_TE, bonus = scores.decided(score_TE + bonus * preferred_TE), 0.0
        ids_TK = _largest(score_TE, preferred_TE, bonus, own_TK)
        if prior.is_bounded:
            _bound(
                ids_TK, own_TK, scores.mass_TE, prior.regret, own_TK.shape[1] if prior.swaps is None else prior.swaps
            )
        return ids_TK


@compiled
def _with_best(resident_TE: Mask, own_TK: Ids, decisive_TE: Array, keep: int) -> Mask:
    """[T, E]: residents, and the router's own `keep` best."""
    tokens, top_k = own_TK.shape
    preferred_TE = np.empty(decisive_TE.shape, dtype=np.bool_)
    for t in range(tokens):
        preferred_TE[t] = resident_TE[t % len(resident_TE)]
        order_K = np.argsort(-decisive_TE[t][own_TK[t]], kind="mergesort")
        for k in range(min(keep, top_k)):
            preferred_TE[t, own_TK[t, order_K[k]]] = True
    return preferred_TE


@compiled
def _largest(score_TE: Array, preferred_TE: Mask, bonus: float, own_TK: Ids) -> Ids:
    """The ids [T, K] of the largest scores, the preferred ones with a bonus."""
    tokens, experts = score_TE.shape
    top_k = own_TK.shape[1]
    ids_TK = np.empty((tokens, top_k), dtype=np.int64)
    raised_E = np.empty(experts)
    for t in range(tokens):
        row = t % len(preferred_TE)
        for e in range(experts):
            raised_E[e] = score_TE[t, e] + (bonus if preferred_TE[row, e] else 0.0)
        for k in range(top_k):
            raised_E[own_TK[t, k]] += TIE
        for k in range(top_k):
            best = np.argmax(raised_E)
            ids_TK[t, k] = best
            raised_E[best] = -np.inf
    return ids_TK


@compiled
def _bound(ids_TK: Ids, own_TK: Ids, mass_TE: Array, regret: float, swaps: int) -> None:
    """Leave of the swaps that lead from the router's own choice to `ids_TK` the cheapest, as far as the bounds allow.

    The one that loses least leaves first, for the best of those that come: so each sum of losses is the smallest possible.
    """
    for t in range(len(ids_TK)):
        leaving = np.array([e for e in own_TK[t] if e not in ids_TK[t]], dtype=np.int64)
        coming = np.array([e for e in ids_TK[t] if e not in own_TK[t]], dtype=np.int64)
        leaving = leaving[np.argsort(mass_TE[t][leaving], kind="mergesort")]
        coming = coming[np.argsort(-mass_TE[t][coming], kind="mergesort")]
        ids_TK[t], lost = own_TK[t], 0.0
        for n in range(min(len(leaving), swaps)):
            lost += mass_TE[t, leaving[n]] - mass_TE[t, coming[n]]
            if lost > regret:
                break
            for k in range(ids_TK.shape[1]):
                if ids_TK[t, k] == leaving[n]:
                    ids_TK[t, k] = coming[n]

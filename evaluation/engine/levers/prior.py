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

from evaluation.engine.levers.scores import Array, Ids, Mask, Scores, among, largest, number_of

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
        experts, k = scores.mass_TE.shape[1], scores.ids_TK.shape[1]
        preferred_TE = resident_TE
        if self.prior.keep:
            best_TK = np.argsort(-np.take_along_axis(scores.decisive_TE, scores.ids_TK, 1), axis=1)[
                :, : self.prior.keep
            ]
            preferred_TE = resident_TE | among(np.take_along_axis(scores.ids_TK, best_TK, 1), experts)
        own_TE = among(scores.ids_TK, experts)
        ids_TK = largest(self._with_bonus(scores, preferred_TE) + TIE * own_TE, k)
        if self.prior.is_bounded:
            ids_TK = _bounded(
                scores, ids_TK, regret=self.prior.regret, swaps=k if self.prior.swaps is None else self.prior.swaps
            )
        return ids_TK

    def _with_bonus(self, scores: Scores, preferred_TE: Mask) -> Array:
        if self.prior.space == "probability":
            return _raised(scores.decisive_TE, preferred_TE, self.delta)
        bonus = self.delta * self._spread[0] / max(1.0, self._spread[1]) if self.delta else 0.0
        raised_TE = _raised(scores.logits_TE, preferred_TE, bonus)
        # what decides rises with the logits: without bias and groups these decide alone, and nothing is lost by rounding
        if scores.decisive_TE is scores.mass_TE:
            return raised_TE
        return scores.decided(raised_TE.astype(np.float32))


def _raised(scores_TE: Array, preferred_TE: Mask, bonus: float) -> Array:
    """The scores with a bonus, which need be no larger than what puts the least before the best: inf plus inf is no order."""
    if math.isinf(bonus):
        finite = scores_TE[np.isfinite(scores_TE)]
        bonus = 1.0 + float(finite.max() - finite.min())
    return scores_TE + bonus * preferred_TE.astype(np.float64)


def _bounded(scores: Scores, ids_TK: Ids, *, regret: float, swaps: int) -> Ids:
    """The swaps that lead from the router's own choice to `ids_TK`, cheapest first, as far as the bounds allow.

    The one that loses least leaves first, for the best of those that come: so each sum of losses is the smallest possible.
    """
    mass_TE, experts = scores.mass_TE, scores.mass_TE.shape[1]
    own_TE, new_TE = among(scores.ids_TK, experts), among(ids_TK, experts)
    k = ids_TK.shape[1]
    leaves_TE, comes_TE = own_TE & ~new_TE, new_TE & ~own_TE
    leaving_TK = np.argsort(np.where(leaves_TE, mass_TE, np.inf), axis=1, kind="stable")[:, :k]
    coming_TK = np.argsort(np.where(comes_TE, -mass_TE, np.inf), axis=1, kind="stable")[:, :k]
    is_swap_TK = np.arange(k) < leaves_TE.sum(1, keepdims=True)
    lost_TK = np.take_along_axis(mass_TE, leaving_TK, 1) - np.take_along_axis(mass_TE, coming_TK, 1)
    within_TK = is_swap_TK & (np.cumsum(np.where(is_swap_TK, lost_TK, 0), axis=1) <= regret) & (np.arange(k) < swaps)
    within_TK = np.logical_and.accumulate(within_TK, axis=1)  # what is cheapest first stays first
    final_TE = own_TE.copy()
    token, place = within_TK.nonzero()
    final_TE[token, leaving_TK[token, place]] = False
    final_TE[token, coming_TK[token, place]] = True
    return final_TE.nonzero()[1].reshape(len(mass_TE), k)

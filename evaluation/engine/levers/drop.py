"""Dropping: a missing expert that would be mixed in with little weight is left out, and nothing takes its place.

The others keep the weight that the model was trained with: they are made to add up to 1 only where its router does that
(arXiv 2610.41366). The heaviest expert of a token is never dropped.
Axes: T tokens, E experts, K chosen.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from evaluation.engine.levers.scores import Ids, Mask, Scores, number_of

if TYPE_CHECKING:  # options are read where torch is not loaded
    from torch import Tensor

DROPPED = -1


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class Drop:
    """What a user decides about it."""

    below: (
        Annotated[float, Field(ge=0)] | tuple[Annotated[float, Field(ge=0)], ...]
    )  # mixing weight; one for each layer: 0.02/0.04/...
    prefill: bool = False  # in prompts too

    def of_layer(self, layer: int, layers: int) -> "LayerDrop":
        """The rule of one layer; a `ValueError` if thresholds are given for another number of layers."""
        return LayerDrop(number_of(self.below, "below", layer, layers))


@dataclass
class LayerDrop:
    """The rule of one layer."""

    below: float

    def see(self, logits_TE: "Tensor") -> None:
        """It needs to know of no call."""

    def choose(self, scores: Scores, resident_TE: Mask) -> Ids:
        """The experts [T, K], `DROPPED` in place of some."""
        mass_TK = np.take_along_axis(scores.mass_TE, scores.ids_TK, 1)
        is_missing_TK = ~np.take_along_axis(np.broadcast_to(resident_TE, scores.mass_TE.shape), scores.ids_TK, 1)
        is_heaviest_TK = np.arange(mass_TK.shape[1]) == mass_TK.argmax(1)[:, None]
        return np.where(is_missing_TK & (mass_TK < self.below) & ~is_heaviest_TK, DROPPED, scores.ids_TK)

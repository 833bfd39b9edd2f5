"""What a layer's router says of tokens, in the unit in which its experts are mixed, for levers to decide by.

Axes: T tokens, E experts, K chosen.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
Ids = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]


class Scores(NamedTuple):
    """One call of a layer's router.

    Attributes:
        logits_TE: its logits.
        mass_TE: the mixing weight that each expert has, or would have beside the router's own choice; before any scale that the
            model multiplies all of them by.
        decisive_TE: what the router chooses by, in the same unit: `mass_TE`, with a correction bias where there is one, and
            -inf for experts of groups that it has ruled out.
        ids_TK: what it chose.
        decided: from other logits to what they would decide by, within the same groups.
    """

    logits_TE: Array
    mass_TE: Array
    decisive_TE: Array
    ids_TK: Ids
    decided: Callable[[Array], Array]


def probabilities(z_TE: Array, scoring: str) -> Array:
    """`softmax` or `sigmoid` of logits."""
    if scoring == "sigmoid":
        return 1 / (1 + np.exp(-z_TE))
    raised_TE = np.exp(z_TE - z_TE.max(1, keepdims=True))
    return raised_TE / raised_TE.sum(1, keepdims=True)


def largest(scores_TE: Array, k: int) -> Ids:
    """The ids [T, k] of the largest scores, in no order."""
    return np.argpartition(scores_TE, -k, axis=1)[:, -k:]


def among(ids_TK: Ids, experts: int) -> Mask:
    """[T, E]: which experts these are."""
    chosen_TE = np.zeros((len(ids_TK), experts), dtype=bool)
    chosen_TE[np.arange(len(ids_TK))[:, None], ids_TK] = True
    return chosen_TE


def number_of(given: float | tuple[float, ...], name: str, layer: int, layers: int) -> float:
    """The number of one layer; a `ValueError` if there are some for another number of layers."""
    if not isinstance(given, tuple):
        return given
    if len(given) != layers:
        raise ValueError(f"{name} has {len(given)} numbers, the model {layers} layers with experts")
    return given[layer]

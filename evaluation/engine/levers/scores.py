"""What a layer's router says of tokens, in the unit in which its experts are mixed, for levers to decide by.

Axes: T tokens, E experts, K chosen.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from training.model.compiled import compiled

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


@compiled
def mixing_mass(z_TE: Array, ids_TK: Ids, is_sigmoid: bool, is_normalised: bool) -> tuple[Array, Array]:
    """The mass [T, E] of experts, and [T, 1] what it was divided by."""
    mass_TE, own_T1 = np.empty(z_TE.shape), np.ones((len(z_TE), 1))
    for t in range(len(z_TE)):
        z_E = z_TE[t].astype(np.float64)
        mass_TE[t] = 1 / (1 + np.exp(-z_E)) if is_sigmoid else np.exp(z_E - z_E.max())
        if not is_sigmoid:
            mass_TE[t] /= mass_TE[t].sum()
        if is_normalised:
            own_T1[t, 0] = mass_TE[t][ids_TK[t]].sum()
            mass_TE[t] /= own_T1[t, 0]
    return mass_TE, own_T1


def number_of(given: float | tuple[float, ...], name: str, layer: int, layers: int) -> float:
    """The number of one layer; a `ValueError` if there are some for another number of layers."""
    if not isinstance(given, tuple):
        return given
    if len(given) != layers:
        raise ValueError(f"{name} has {len(given)} numbers, the model {layers} layers with experts")
    return given[layer]

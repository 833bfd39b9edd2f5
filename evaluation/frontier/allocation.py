"""A strength for each layer: layers differ in what a swap costs and in what it saves, so that one strength for all wastes some.

Each layer alone is given the lever at a few strengths. What a layer saves and costs adds up over layers, as long as it is
little (on the shipped model to a hundredth); so the strengths that save most within a price follow from these curves: those
at which one more load saved costs the same everywhere.
Letters: L layers, D strengths that were tried, G a fine grid of strengths.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.interpolate import PchipInterpolator
from scipy.optimize import nnls

Array = npt.NDArray[np.float64]
GRID = 200
HALVINGS = 60


def allocate(deltas: Sequence[float], cost_LD: Array, saved_LD: Array, *, within: float) -> list[float]:
    """The strength of each layer, at most the largest tried, that saves most for a cost of at most `within` in all.

    Costs are noisy: they are taken as a x delta + b x delta^2, neither below 0. Savings go through their points.

    Args:
        deltas: rising, above 0.
        cost_LD, saved_LD: of one layer alone.
    """
    grid_G = np.linspace(0, deltas[-1], GRID + 1)
    cost_LG = np.stack([_smooth(np.array(deltas), cost_D, grid_G) for cost_D in cost_LD])
    at = np.array([0.0, *deltas])
    saved_LG = np.stack([PchipInterpolator(at, np.maximum.accumulate([0.0, *saved_D]))(grid_G) for saved_D in saved_LD])
    too_dear, cheap_enough = 0.0, float(saved_LG.max() / max(cost_LG[:, 1:].min(), 1e-12)) + 1.0
    for _ in range(HALVINGS):  # what one unit of cost is held to be worth, in loads
        worth = (too_dear + cheap_enough) / 2
        best_L = (saved_LG - worth * cost_LG).argmax(1)
        if cost_LG[np.arange(len(best_L)), best_L].sum() > within:
            too_dear = worth
        else:
            cheap_enough = worth
    return [float(grid_G[best]) for best in (saved_LG - cheap_enough * cost_LG).argmax(1)]


def _smooth(deltas_D: Array, cost_D: Array, grid_G: Array) -> Array:
    powers_D2 = np.stack([deltas_D, deltas_D**2], 1)
    weights_D1 = 1 / deltas_D[:, None]  # or the dearest point alone would decide
    factors, _ = nnls(powers_D2 * weights_D1, cost_D * weights_D1[:, 0])
    smooth: Array = np.stack([grid_G, grid_G**2], 1) @ factors
    return smooth

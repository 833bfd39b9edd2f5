"""A lever inside the training forward pass: experts are chosen as they will be when they are served from a cache.

All logits of a layer are known at once, but which experts are resident depends on the choices before. So positions are
gone through one after the other, all rows side by side, without a graph: an expert is chosen by p + delta * resident, p the
weight with which it is, or would be, mixed in (`evaluation/engine/levers/prior.py`), and each document has an LRU cache that
starts empty. Mixing weights then follow from the logits of the chosen experts, with a graph.
Letters: B rows, S positions, T = B S tokens, E experts, K chosen.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.model.router_kind import Weighing

TIE = 1e-12
"""What the router itself has chosen stays where others are as good."""


class Choice(NamedTuple):
    """What is chosen of one layer's experts, in the forms in which its router gives weights, ids and logits."""

    weights: Tensor  # with the graph of the logits
    ids: Tensor  # heaviest first
    mass: Tensor  # the weight with which each expert is, or would be, mixed in, with the graph


class CacheInTheLoop(NamedTuple):
    """Which lever acts on which cache, and where documents begin.

    Attributes:
        delta: what a resident gets on top of its mixing weight.
        slots: experts of a layer that its LRU cache holds.
        starts_BS: bool: a document begins here, with an empty cache; rows always begin with one.
    """

    delta: float
    slots: int
    starts_BS: npt.NDArray[np.bool_]

    def choose(self, logits: Tensor, weights: Tensor, ids: Tensor, *, weighing: Weighing | None) -> Choice:
        """What is chosen where a router, which takes the largest logits, gives these logits, weights and ids."""
        assert weighing is not None, "whoever asks for a cache in the loop has looked"
        logits_TE, own_TK = (part.reshape(-1, part.shape[-1]) for part in (logits.float(), ids))
        mass_TE, shape = mixing_mass(logits_TE, own_TK, weighing), (*self.starts_BS.shape, -1)
        mass_BSE, own_BSK = (part.detach().cpu().numpy().reshape(shape) for part in (mass_TE, own_TK))
        chosen_BSK = served(mass_BSE, own_BSK, self.starts_BS, slots=self.slots, delta=self.delta)
        new_TK = torch.from_numpy(chosen_BSK).to(ids).reshape(own_TK.shape)
        new_weights = weighing.weights(logits_TE, new_TK).to(weights.dtype)
        return Choice(new_weights.reshape(weights.shape), new_TK.reshape(ids.shape), mass_TE.reshape(logits.shape))


def mixing_mass(logits_TE: Tensor, ids_TK: Tensor, weighing: Weighing) -> Tensor:
    """[T, E]: the weight with which each expert is mixed in, or would be beside the router's own choice; before any scale."""
    mass_TE = logits_TE.softmax(-1) if weighing.scoring == "softmax" else logits_TE.sigmoid()
    return mass_TE / mass_TE.gather(1, ids_TK).sum(-1, keepdim=True) if weighing.normalised else mass_TE


def served(
    mass_BSE: npt.NDArray[np.floating], own_BSK: npt.NDArray[np.integer], starts_BS: npt.NDArray[np.bool_], *,
    slots: int, delta: float,
) -> npt.NDArray[np.int64]:  # fmt: skip
    """[B, S, K]: the choices, heaviest first, of all rows side by side and one position after the other.

    What an event-atomic LRU holds is the `slots` experts with the latest last use; of one event the heavier is the later.
    """
    rows, positions, experts = mass_BSE.shape
    top_k = own_BSK.shape[-1]
    mass_SBE = np.ascontiguousarray(mass_BSE.swapaxes(0, 1), dtype=np.float64)
    own_SBE = np.zeros((positions, rows, experts))
    np.put_along_axis(own_SBE, own_BSK.swapaxes(0, 1), TIE, axis=-1)
    score_SBE = mass_SBE + own_SBE
    chosen_SBK = np.empty((positions, rows, top_k), dtype=np.int64)
    last_use_BE = np.zeros((rows, experts), dtype=np.int64)
    resident_BE = np.zeros((rows, experts), dtype=bool)
    row_B1, later_K = np.arange(rows)[:, None], np.arange(top_k, 0, -1)
    for s in range(positions):
        if s and (begins_B := starts_BS[:, s]).any():
            last_use_BE[begins_B] = 0
            resident_BE[begins_B] = False
        ids_BK = np.argpartition(score_SBE[s] + delta * resident_BE, experts - top_k, axis=1)[:, experts - top_k :]
        ids_BK = ids_BK[row_B1, (-mass_SBE[s][row_B1, ids_BK]).argsort(axis=1)]
        chosen_SBK[s] = ids_BK
        last_use_BE[row_B1, ids_BK] = s * top_k + later_K
        least_B1 = (
            np.partition(last_use_BE, experts - slots, axis=1)[:, experts - slots, None] if slots < experts else 0
        )
        resident_BE = (last_use_BE >= least_B1) & (last_use_BE > 0)
    return chosen_SBK.swapaxes(0, 1)

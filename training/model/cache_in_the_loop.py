"""A cache inside the training forward pass: experts are chosen as they will be when they are served from it, with a lever.

All logits of a layer are known at once, but which experts are resident depends on the choices before. So positions are
gone through one after the other, by a compiled loop and without a graph: an expert is chosen by what its router decides by
in the unit of mixing weights, plus delta if it is resident (`evaluation/engine/levers/prior.py`), and each document has a
cache that starts empty. Mixing weights then follow from the logits of the chosen experts, with a graph.
Letters: B rows, S positions, T = B S tokens, E experts, K chosen, C candidates.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.model.compiled import compiled
from training.model.router_kind import RouterKind
from training.model.soft_choice import soft_choice

TIE = 1e-12
"""What the router itself has chosen stays where others are as good."""
HALF_LIVES = {"lru": 0.0, "decayed": 32.0}
"""Policies of caches in the loop, by the calls after which a use counts half (`evaluation/engine/cache/policies.py`)."""
RULED_OUT = -1e4
"""The score of experts in groups that a router has ruled out: finite, as differences are taken."""


class Choice(NamedTuple):
    """What is chosen of one layer's experts, in the forms in which its router gives weights, ids and logits."""

    weights: Tensor  # with the graph of the logits; of candidates 0
    ids: Tensor  # heaviest first, then candidates
    top_k: int  # how many are chosen
    score: Tensor  # what experts are chosen by, with the graph
    resident: Tensor  # bool: which experts the cache holds before the choice


class CacheInTheLoop(NamedTuple):
    """Which lever acts on which cache, and where documents begin.

    Attributes:
        delta: what a resident gets on top of its mixing weight.
        slots: experts of a layer that a cache holds; of several sizes the rows take one after the other.
        policy: of `HALF_LIVES`.
        starts_BS: bool: a document begins here, with an empty cache; rows always begin with one.
        candidates: so many of the next best experts are computed too, with weight 0: then the loss has a gradient for whether
            an expert is chosen, and not only for its weight.
        temperature: how close a call must be for that, in mixing weight.
    """

    delta: float
    slots: tuple[int, ...]
    policy: str
    starts_BS: npt.NDArray[np.bool_]
    candidates: int = 0
    temperature: float = 0.02

    def choose(
        self, logits: Tensor, weights: Tensor, ids: Tensor, *, kind: RouterKind, bias_E: Tensor | None
    ) -> Choice:
        """What is chosen where a router of this kind, with this correction bias, gives these logits, weights and ids."""
        assert kind.weighing is not None, "whoever asks for a cache in the loop has looked"
        logits_TE, own_TK = (part.reshape(-1, part.shape[-1]) for part in (logits.float(), ids))
        mass_TE, decisive_TE = scores(logits_TE, own_TK, kind, bias_E)
        shape = (*self.starts_BS.shape, -1)
        mass_BSE, decisive_BSE, own_BSK = (
            part.detach().cpu().numpy().reshape(shape) for part in (mass_TE, decisive_TE, own_TK)
        )
        chosen_BSK, resident_BSE = served(
            mass_BSE, decisive_BSE, own_BSK, self.starts_BS, slots=self.slots, delta=self.delta, policy=self.policy
        )
        new_TK = torch.from_numpy(chosen_BSK).to(ids).reshape(own_TK.shape)
        weights_TK, top_k = kind.weighing.weights(logits_TE, new_TK), own_TK.shape[1]
        resident_TE = torch.from_numpy(resident_BSE).to(ids.device).reshape(logits_TE.shape)
        score_TE = decisive_TE + self.delta * resident_TE
        if self.candidates and torch.is_grad_enabled():
            # of value 0, so that weights stay what they are
            swaps_TE = soft_choice(score_TE, top_k, self.temperature)
            swaps_TE = swaps_TE - swaps_TE.detach()
            next_TC = (
                score_TE.detach()
                .scatter(1, new_TK, -torch.inf)
                .topk(min(self.candidates, score_TE.shape[1] - top_k), dim=1)
                .indices
            )
            would_have_TC = kind.weighing.scale * mass_TE.detach().gather(1, next_TC)
            weights_TK = torch.cat(
                [weights_TK * (1 + swaps_TE.gather(1, new_TK)), would_have_TC * swaps_TE.gather(1, next_TC)], dim=1
            )
            new_TK = torch.cat([new_TK, next_TC.to(new_TK)], dim=1)
        shaped = (*ids.shape[:-1], -1)
        return Choice(
            weights_TK.to(weights.dtype).reshape(shaped), new_TK.reshape(shaped), top_k, score_TE.reshape(logits.shape),
            resident_TE.reshape(logits.shape),
        )  # fmt: skip


def scores(logits_TE: Tensor, ids_TK: Tensor, kind: RouterKind, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """[T, E] twice: the weight with which each expert is mixed in, or would be beside the router's own choice, before any
    scale; and what experts are chosen by, in the same unit."""
    assert kind.weighing is not None
    assert kind.choosing is not None
    mass_TE = logits_TE.softmax(-1) if kind.weighing.scoring == "softmax" else logits_TE.sigmoid()
    own_T1 = (
        mass_TE.gather(1, ids_TK).sum(-1, keepdim=True) if kind.weighing.normalised else torch.ones_like(mass_TE[:, :1])
    )
    mass_TE = mass_TE / own_T1
    if kind.choosing.is_plain:
        return mass_TE, mass_TE
    decisive_TE = kind.choosing.scores(logits_TE, bias_E)
    allowed_TE = kind.choosing.allowed(decisive_TE.detach())
    return mass_TE, (decisive_TE / own_T1).where(allowed_TE, RULED_OUT)


def served(
    mass_BSE: npt.NDArray[np.floating], decisive_BSE: npt.NDArray[np.floating], own_BSK: npt.NDArray[np.integer],
    starts_BS: npt.NDArray[np.bool_], *, slots: tuple[int, ...], delta: float, policy: str,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:  # fmt: skip
    """[B, S, K] the choices, heaviest first, and [B, S, E] what was resident before each."""
    slots_B = np.resize(np.array(slots, dtype=np.int64), len(mass_BSE))
    mass, decisive = (np.ascontiguousarray(part, dtype=np.float64) for part in (mass_BSE, decisive_BSE))
    own, starts = np.ascontiguousarray(own_BSK, dtype=np.int64), np.ascontiguousarray(starts_BS)
    return _serve(mass, decisive, own, starts, slots_B, delta, HALF_LIVES[policy])


@compiled
def _serve(
    mass_BSE: npt.NDArray[np.float64], decisive_BSE: npt.NDArray[np.float64], own_BSK: npt.NDArray[np.int64],
    starts_BS: npt.NDArray[np.bool_], slots_B: npt.NDArray[np.int64], delta: float, half_life: float,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:  # fmt: skip
    rows, positions, experts = mass_BSE.shape
    top_k = own_BSK.shape[2]
    chosen_BSK = np.empty((rows, positions, top_k), dtype=np.int64)
    resident_BSE = np.zeros((rows, positions, experts), dtype=np.bool_)
    worth_E = np.empty(experts)  # the lowest leaves: the time of the last use, or the logarithm of decayed uses
    time_E = np.empty(experts, dtype=np.int64)  # of the last use, to decide among equals
    held_E, score_E, taken_E = np.empty(experts, dtype=np.bool_), np.empty(experts), np.empty(experts, dtype=np.bool_)
    for row in range(rows):
        calls, time, held = 0, 0, 0
        for s in range(positions):
            if s == 0 or starts_BS[row, s]:
                worth_E[:], time_E[:], held_E[:] = -np.inf, 0, False
                calls, time, held = 0, 0, 0
            resident_BSE[row, s] = held_E
            score_E[:] = decisive_BSE[row, s]
            for k in range(top_k):
                score_E[own_BSK[row, s, k]] += TIE
            for expert in range(experts):
                if held_E[expert]:
                    score_E[expert] += delta
            taken_E[:] = False
            for k in range(top_k):
                best = -1
                for expert in range(experts):
                    if not taken_E[expert] and (best < 0 or score_E[expert] > score_E[best]):
                        best = expert
                taken_E[best] = True
                place = k  # heaviest first
                while place > 0 and mass_BSE[row, s, chosen_BSK[row, s, place - 1]] < mass_BSE[row, s, best]:
                    chosen_BSK[row, s, place] = chosen_BSK[row, s, place - 1]
                    place -= 1
                chosen_BSK[row, s, place] = best
            calls += 1
            now = calls / half_life if half_life else 0.0
            for k in range(top_k - 1, -1, -1):  # of one event the heaviest is the latest
                expert = chosen_BSK[row, s, k]
                time += 1
                time_E[expert] = time
                worth_E[expert] = now + math.log2(1 + 2.0 ** (worth_E[expert] - now)) if half_life else time
                held += not held_E[expert]
                held_E[expert] = True
            while held > slots_B[row]:
                victim = -1
                for expert in range(experts):
                    if not held_E[expert] or taken_E[expert]:
                        continue
                    if victim < 0 or (worth_E[expert], time_E[expert]) < (worth_E[victim], time_E[victim]):
                        victim = expert
                held_E[victim] = False
                held -= 1
    return chosen_BSK, resident_BSE

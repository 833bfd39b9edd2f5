"""Levers at work: hooks on the routers of a model, which let what is resident have a say.

Axes: T tokens, E experts, K chosen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.load import UserError
from evaluation.engine.levers.drop import DROPPED, Drop, LayerDrop
from evaluation.engine.levers.prior import LayerPrior, Prior
from evaluation.engine.levers.scorer import Scorer
from evaluation.engine.levers.scores import Array, Ids, Mask, Scores
from evaluation.engine.stats import ReadCounts
from training.model.compiled import compiled
from training.model.router_kind import kind_of
from training.model.routers import ask_routers, router_kind


def attach(
    model: PreTrainedModel, levers: Sequence[Prior | Drop], *, resident: Callable[[int, int], Mask],
    is_decode: Callable[[], bool], counts: ReadCounts,
) -> None:  # fmt: skip
    """Let every router of `model` follow these levers, one after the other.

    Args:
        resident: position of a layer, number of its experts -> which are resident: [1, E], or [T, E] where each token has a
            cache of its own.
        is_decode: whether the running call is one more token of known sequences; others are prompts.
        counts: where it is counted what was swapped while decoding.

    Raises:
        UserError: the model has no routers that are known, or they choose or weigh experts in an unknown way; or the levers
            are for another number of layers.
    """
    routers = list(ask_routers(model).values())
    router_kind(model)  # is found out by a copy of a router, which could not be made any more of one with a hook
    for layer, asked in enumerate(routers):
        kind = kind_of(asked, hidden_size=model.config.get_text_config().hidden_size)
        try:
            rules = [(lever.of_layer(layer, len(routers)), lever.prefill) for lever in levers]
        except ValueError as error:
            raise UserError(f"lever: {error}") from error
        hook = LeveredRouter(Scorer.of(asked, kind), rules, partial(resident, layer), is_decode, counts)
        asked.module.register_forward_hook(hook)


@dataclass(eq=False)
class LeveredRouter:
    """The hook of one layer's router."""

    scorer: Scorer
    rules: Sequence[tuple[LayerPrior | LayerDrop, bool]]  # and whether each acts in prompts too
    resident: Callable[[int], Mask]
    is_decode: Callable[[], bool]
    counts: ReadCounts

    def __call__(self, module: nn.Module, given: object, output: tuple[Tensor, ...]) -> tuple[Any, ...]:
        logits, weights, ids, *rest = output
        logits_TE, ids_TK = logits.reshape(-1, logits.shape[-1]), ids.reshape(-1, ids.shape[-1])
        for rule, _ in self.rules:
            rule.see(logits_TE)
        is_decode = self.is_decode()
        active = [of_layer for of_layer, in_prompts in self.rules if is_decode or in_prompts]
        if not active:
            return output
        own_TK, resident_TE = ids_TK.cpu().numpy(), self.resident(logits_TE.shape[1])
        if _all_resident(own_TK, resident_TE):
            return output
        scores = self.scorer.scores(logits_TE, own_TK)
        chosen_TK = _chosen(active, scores, resident_TE)
        assert self.scorer.kind.weighing is not None
        new_TK, weights_TK, changed_T, swapped, lost_weight = _mixed(
            chosen_TK, own_TK, scores.mass_TE, self.scorer.kind.weighing.normalised, self.scorer.kind.weighing.scale
        )
        if not swapped:
            return output
        if is_decode:
            self.counts.swapped += swapped
            self.counts.lost_weight += lost_weight
        new_ids = torch.from_numpy(new_TK).to(ids).reshape(ids.shape)
        new_weights = torch.from_numpy(weights_TK).to(weights).reshape(weights.shape)
        if not changed_T.all():  # the others keep their own bits
            changed = torch.from_numpy(changed_T).to(ids.device).reshape(*ids.shape[:-1], 1)
            new_ids, new_weights = new_ids.where(changed, ids), new_weights.where(changed, weights)
        return logits, new_weights, new_ids, *rest


@compiled
def _all_resident(ids_TK: Ids, resident_TE: Mask) -> bool:
    for t in range(len(ids_TK)):
        for expert in ids_TK[t]:
            if not resident_TE[t % len(resident_TE), expert]:
                return False
    return True


@compiled
def _mixed(
    chosen_TK: Ids, own_TK: Ids, mass_TE: Array, is_normalised: bool, scale: float
) -> tuple[Ids, Array, Mask, int, float]:
    """Ids and weights of what is chosen, heaviest first; tokens whose choice is another; how many experts and how much mass
    their own choice had more."""
    tokens, top_k = own_TK.shape
    ids_TK, weights_TK = np.empty((tokens, top_k), dtype=np.int64), np.empty((tokens, top_k))
    changed_T, swapped, lost = np.zeros(tokens, dtype=np.bool_), 0, 0.0
    for t in range(tokens):
        mass_K = np.array([0.0 if e == DROPPED else mass_TE[t, e] for e in chosen_TK[t]])
        order_K = np.argsort(-mass_K, kind="mergesort")
        ids_TK[t], weights_TK[t] = chosen_TK[t][order_K], mass_K[order_K] * scale
        for k in range(top_k):
            if ids_TK[t, k] == DROPPED:  # with no weight, and nothing to be read
                ids_TK[t, k] = ids_TK[t, 0]
        if is_normalised:
            weights_TK[t] /= mass_K.sum()
        lost -= mass_K.sum()
        for expert in own_TK[t]:
            lost += mass_TE[t, expert]
            if expert not in chosen_TK[t]:
                swapped += 1
                changed_T[t] = True
    return ids_TK, weights_TK, changed_T, swapped, lost


def _chosen(rules: Sequence[LayerPrior | LayerDrop], scores: Scores, resident_TE: Mask) -> Ids:
    for rule in rules:
        scores = scores._replace(ids_TK=rule.choose(scores, resident_TE))
    return scores.ids_TK

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
        if resident_TE[0 if len(resident_TE) == 1 else np.arange(len(own_TK))[:, None], own_TK].all():
            return output
        scores = self.scorer.scores(logits_TE, own_TK)
        chosen_TK = _chosen(active, scores, resident_TE)
        stays_TK = (own_TK[:, :, None] == chosen_TK[:, None, :]).any(2)
        if stays_TK.all():
            return output
        mass_TK = np.where(chosen_TK == DROPPED, 0, scores.mass_TE[np.arange(len(own_TK))[:, None], chosen_TK])
        if is_decode:
            own_mass_TK = scores.mass_TE[np.arange(len(own_TK))[:, None], own_TK]
            self.counts.swapped += int(stays_TK.size - stays_TK.sum())
            self.counts.lost_weight += float(own_mass_TK.sum() - mass_TK.sum())
        return logits, *self._mixed(weights, ids, chosen_TK, mass_TK, ~stays_TK.all(1)), *rest

    def _mixed(
        self, weights: Tensor, ids: Tensor, chosen_TK: Ids, mass_TK: Array, changed_T: Mask
    ) -> tuple[Tensor, Tensor]:
        """Weights and ids, heaviest first where the choice is another, else the router's own bits."""
        weighing = self.scorer.kind.weighing
        assert weighing is not None
        order_TK = np.argsort(-mass_TK, axis=1, kind="stable")
        rows_T1 = np.arange(len(mass_TK))[:, None]
        chosen_TK, mass_TK = chosen_TK[rows_T1, order_TK], mass_TK[rows_T1, order_TK]
        chosen_TK = np.where(
            chosen_TK == DROPPED, chosen_TK[:, :1], chosen_TK
        )  # with no weight, and nothing to be read
        if weighing.normalised:
            mass_TK = mass_TK / mass_TK.sum(1, keepdims=True)
        new = (
            torch.from_numpy(weighing.scale * mass_TK).to(weights.device, weights.dtype),
            torch.from_numpy(chosen_TK).to(ids),
        )
        if changed_T.all():
            return new[0].reshape(weights.shape), new[1].reshape(ids.shape)
        changed = torch.from_numpy(changed_T).to(ids.device)
        changed = changed.reshape(*ids.shape[:-1], 1)
        return torch.where(changed, new[0].reshape(weights.shape), weights), torch.where(
            changed, new[1].reshape(ids.shape), ids
        )


def _chosen(rules: Sequence[LayerPrior | LayerDrop], scores: Scores, resident_TE: Mask) -> Ids:
    for rule in rules:
        scores = scores._replace(ids_TK=rule.choose(scores, resident_TE))
    return scores.ids_TK

"""Cache-aware routing (Cache-Prior, arXiv 2412.00099): a router prefers experts that are resident. It changes outputs.

While decoding, z' = z + strength * spread * m chooses the experts: m is 1 for resident experts and for the router's own
`keep` best, 0 for others; spread is the running mean of max(z) - min(z) in the layer. The mixing weights are what the
router gives the chosen experts from its own z. Prompts are routed as always.
Axes: T tokens, E experts, K chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from configs.load import UserError
from training.model.router_kind import Weighing, kind_of
from training.model.routers import ask_routers


def attach_cache_prior(
    model: PreTrainedModel,
    *,
    strength: float,
    keep: int,
    resident: Callable[[int], list[int]],
    is_decode: Callable[[], bool],
) -> None:
    """Let every router of `model` prefer what `resident(layer)` names, in calls for which `is_decode()`.

    Args:
        strength: lambda; 0 changes nothing.
        keep: how many of the router's own best experts are preferred as much, so that they cannot be displaced.

    Raises:
        UserError: the model has no routers that are known, or they choose or weigh experts in an unknown way.
    """
    for layer, asked in enumerate(ask_routers(model).values()):
        kind, router = kind_of(asked, hidden_size=model.config.get_text_config().hidden_size), asked.module
        if kind.weighing is None or not kind.takes_largest:
            raise UserError(
                f"{type(router).__name__} {'weighs' if kind.takes_largest else 'chooses'} experts in a way that a cache prior "
                f"does not know ({kind}); leave --cache-prior out"
            )
        preference = Preference(kind.weighing, partial(resident, layer), is_decode, strength=strength, keep=keep)
        router.register_forward_hook(preference)


@dataclass(eq=False)
class Preference:
    """The hook of one layer's router."""

    weighing: Weighing
    resident: Callable[[], list[int]]
    is_decode: Callable[[], bool]
    strength: float
    keep: int
    _spread_sum: float = 0.0
    _tokens: int = 0

    def __call__(self, _: nn.Module, __: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits_TE, weights_TK, ids_TK, *rest = output
        z_TE = logits_TE.float()
        self._spread_sum += float((z_TE.amax(-1) - z_TE.amin(-1)).sum())
        self._tokens += len(z_TE)
        if not self.is_decode():
            return output
        bonus = self.strength * self._spread_sum / self._tokens
        preferred_TE = torch.zeros_like(z_TE)
        preferred_TE[:, self.resident()] = bonus
        preferred_TE.scatter_(1, z_TE.topk(self.keep, dim=-1).indices, bonus)
        chosen_TK = (z_TE + preferred_TE).topk(ids_TK.shape[1], dim=-1).indices
        new_weights_TK, order_TK = self.weighing.weights(z_TE, chosen_TK).sort(dim=-1, descending=True)
        chosen_TK = chosen_TK.gather(1, order_TK)
        same_T1 = (chosen_TK.sort(-1).values == ids_TK.sort(-1).values).all(-1, keepdim=True)
        new_weights_TK = torch.where(same_T1, weights_TK, new_weights_TK.to(weights_TK.dtype))
        return logits_TE, new_weights_TK, torch.where(same_T1, ids_TK, chosen_TK), *rest

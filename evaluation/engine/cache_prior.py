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
        UserError: routers are not known to transformers' recording interface, or weigh experts in an unknown way.
    """
    for layer, router in enumerate(routers_of(model)):
        weighing = _weighing(router, model.config.get_text_config().hidden_size)
        preference = Preference(weighing, partial(resident, layer), is_decode, strength=strength, keep=keep)
        router.register_forward_hook(preference)


def routers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The routers, in layer order.

    Raises:
        UserError: they are not known to transformers' recording interface.
    """
    recorded = (getattr(model.base_model, "_can_record_outputs", None) or {}).get("router_logits")
    router_class = getattr(recorded, "target_class", recorded)
    routers = [m for m in model.modules() if router_class is not None and isinstance(m, router_class)]
    if not routers:
        raise UserError(
            f"{type(model).__name__}: no routers were found, so that neither a cache prior nor reading ahead can act on them"
        )
    return routers


class Preference:
    """The hook of one layer's router."""

    def __init__(
        self,
        weighing: "Weighing",
        resident: Callable[[], list[int]],
        is_decode: Callable[[], bool],
        *,
        strength: float,
        keep: int,
    ) -> None:
        self._weighing, self._resident, self._is_decode = weighing, resident, is_decode
        self._strength, self._keep = strength, keep
        self._spread_sum, self._tokens = 0.0, 0

    def __call__(
        self, _: nn.Module, __: object, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE, weights_TK, ids_TK = output
        z_TE = logits_TE.float()
        self._spread_sum += float((z_TE.amax(-1) - z_TE.amin(-1)).sum())
        self._tokens += len(z_TE)
        if not self._is_decode():
            return output
        bonus = self._strength * self._spread_sum / self._tokens
        preferred_TE = torch.zeros_like(z_TE)
        preferred_TE[:, self._resident()] = bonus
        preferred_TE.scatter_(1, z_TE.topk(self._keep, dim=-1).indices, bonus)
        chosen_TK = (z_TE + preferred_TE).topk(ids_TK.shape[1], dim=-1).indices
        new_weights_TK, order_TK = self._weighing.weights(z_TE, chosen_TK).sort(dim=-1, descending=True)
        chosen_TK = chosen_TK.gather(1, order_TK)
        same_T1 = (chosen_TK.sort(-1).values == ids_TK.sort(-1).values).all(-1, keepdim=True)
        new_weights_TK = torch.where(same_T1, weights_TK, new_weights_TK.to(weights_TK.dtype))
        return logits_TE, new_weights_TK, torch.where(same_T1, ids_TK, chosen_TK)


@dataclass(frozen=True)
class Weighing:
    """How a router makes mixing weights of logits: softmax over all experts, or over the chosen ones, times a scale."""

    normalised: bool
    scale: float = 1.0

    def weights(self, z_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        """The weights TK of these experts."""
        weights_TK = z_TE.softmax(-1).gather(1, ids_TK)
        return self.scale * (weights_TK / weights_TK.sum(-1, keepdim=True) if self.normalised else weights_TK)


@torch.no_grad()
def _weighing(router: nn.Module, hidden_size: int) -> Weighing:
    """Told by what the router does with some random hidden states."""
    parameter = next(router.parameters())
    hidden_TH = torch.randn(64, hidden_size, generator=torch.Generator().manual_seed(0)).to(parameter)
    logits_TE, weights_TK, ids_TK = router(hidden_TH)
    for normalised in (False, True):
        plain_TK = Weighing(normalised).weights(logits_TE.float(), ids_TK)
        found = Weighing(normalised, float(weights_TK.float().sum() / plain_TK.sum()))
        if torch.allclose(weights_TK.float(), found.scale * plain_TK, rtol=2e-2, atol=1e-4):
            return found
    raise UserError(
        f"{type(router).__name__} weighs experts in a way a cache prior does not know (neither softmax over all experts "
        "nor over the chosen ones); leave --cache-prior out"
    )

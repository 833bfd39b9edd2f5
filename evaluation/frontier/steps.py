"""Texts read token by token, many side by side, each with an expert cache of its own: what a lever costs and saves.

A lever's choice depends on what is resident, and so on all tokens before: one pass over a whole text cannot show it. Here
every text takes one step at a time, as in decoding, from an empty cache on and with the text's own next token, and levers act
from the first token on. Caches and levers are the engine's own; the weights lie in memory, as only choices are counted.
Letters: R texts, S tokens of each, L layers, E experts, K chosen, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evaluation.engine.cache.counts import DECODE
from evaluation.engine.cache.policies import ONLINE
from evaluation.engine.cache.pool import ExpertCache, event_order
from evaluation.engine.levers.attach import attach
from evaluation.engine.levers.drop import Drop
from evaluation.engine.levers.prior import Prior
from evaluation.engine.stats import ReadCounts
from training.model.routers import find_routers

MOST_TOKENS = 2**14
"""Tokens of all texts together that are read side by side at most: their keys and values lie in memory."""


class Steps(NamedTuple):
    """What was found of every text, in their order.

    Attributes:
        losses_R: cross entropy in nats, summed over its tokens but the first.
        loads_R: experts that were not in its cache when they were asked for.
        accesses_R: experts that were asked for.
        swapped: experts that levers replaced or dropped, of all texts.
        lost_weight: mixing weight that went with them.
    """

    losses_R: npt.NDArray[np.float64]
    loads_R: npt.NDArray[np.int64]
    accesses_R: npt.NDArray[np.int64]
    swapped: int
    lost_weight: float


@dataclass(frozen=True)
class CacheKind:
    """Which cache each text has."""

    slots: int  # of each layer
    policy: str = "lru"
    scope: str = "per_layer"  # or global: slots x layers for all of them together

    def make(self, layers: int) -> ExpertCache:
        """An empty one."""
        slots = self.slots * layers if self.scope == "global" else self.slots
        return ExpertCache(slots, layers, scope=self.scope, make_policy=ONLINE[self.policy])


def read_in_steps(
    model: PreTrainedModel, texts_RS: npt.NDArray[np.integer], levers: Sequence[Prior | Drop], cache: CacheKind
) -> Steps:
    """Read texts of equal length side by side; levers that are made of one model's layers suit it alone.

    Raises:
        UserError: levers cannot act on this model's routers.
    """
    together = max(1, MOST_TOKENS // texts_RS.shape[1])
    parts = [
        _read(model, texts_RS[start : start + together], levers, cache) for start in range(0, len(texts_RS), together)
    ]
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in ("losses_R", "loads_R", "accesses_R")
    }
    swapped, lost_weight = sum(part.swapped for part in parts), sum(part.lost_weight for part in parts)
    return Steps(**joined, swapped=swapped, lost_weight=lost_weight)


def _read(
    model: PreTrainedModel, texts_RS: npt.NDArray[np.integer], levers: Sequence[Prior | Drop], kind: CacheKind
) -> Steps:
    ids_RS, counts = torch.from_numpy(texts_RS.astype(np.int64)).to(model.device), ReadCounts()
    losses_R = torch.zeros(len(ids_RS), dtype=torch.float64)
    with cached(model, len(texts_RS), levers, kind, counts) as caches:
        for step, logits_RV in stepped(model, ids_RS):
            losses_R += _loss(logits_RV, ids_RS[:, step + 1])
    totals = [cache.counts.total() for cache in caches]
    loads_R, accesses_R = (np.array([getattr(total, name) for total in totals]) for name in ("misses", "accesses"))
    return Steps(losses_R.numpy(), loads_R, accesses_R, counts.swapped, counts.lost_weight)


@torch.no_grad()
def stepped(model: PreTrainedModel, ids_RS: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Step after step the position that was read and the logits [R, V] of what comes next, of all but the last.

    What stands at later positions may be written meanwhile: so texts are generated.
    """
    past = None
    for step in range(ids_RS.shape[1] - 1):
        outputs: Any = model(input_ids=ids_RS[:, step : step + 1], past_key_values=past, use_cache=True)
        past = outputs.past_key_values
        yield step, outputs.logits[:, -1]


def _loss(logits_RV: Tensor, next_R: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_RV.float(), next_R, reduction="none").double().cpu()


@contextmanager
def cached(
    model: PreTrainedModel, texts: int, levers: Sequence[Prior | Drop], kind: CacheKind, counts: ReadCounts
) -> Iterator[list[ExpertCache]]:
    """Inside, every text's choices go to a cache of its own, one text for each row, and levers look at that."""
    routers = find_routers(model)
    caches = [kind.make(len(routers)) for _ in range(texts)]
    hooks: Mapping[str, set[int]] = {name: set(router._forward_hooks) for name, router in routers.items()}

    def resident(layer: int, experts: int) -> npt.NDArray[np.bool_]:
        return np.array([cache.holds(layer, experts) for cache in caches])

    def serve(layer: int, _: nn.Module, __: object, output: tuple[Tensor, ...]) -> None:
        weights_RK, ids_RK = (part.reshape(texts, -1) for part in output[1:3])
        order_RK = weights_RK.float().argsort(dim=-1, descending=True, stable=True)
        ranked_RK = ids_RK.gather(1, order_RK).cpu().numpy()
        for cache, ranked_K in zip(caches, ranked_RK, strict=True):
            cache.serve(layer, [(layer, expert) for expert in event_order(ranked_K[None])], phase=DECODE)

    try:
        attach(model, levers, resident=resident, is_decode=lambda: True, counts=counts)
        for layer, router in enumerate(routers.values()):
            router.register_forward_hook(partial(serve, layer))
        yield caches
    finally:
        for name, router in routers.items():
            for number in set(router._forward_hooks) - hooks[name]:
                del router._forward_hooks[number]

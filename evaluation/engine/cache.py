"""Which experts are resident, and in which slot: the one set of rules that the live engine and the replay share.

An event is what one forward call brings to one layer: its distinct experts, in event order (`event_order`).
1. Lookups are against the cache as it was before the event. An access is one distinct expert of one event.
2. All experts of the event are resident together while it is served; victims come from outside the event.
3. An event larger than its pool is split into events that fit: first the residents together with as many misses as
   there is room for, then the remaining misses in event order, a pool-full at a time. Each expert is read once.
This file knows no model, no bytes and no torch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evaluation.engine.accounting import CacheCounts
from evaluation.engine.policies import Key, Policy

SCOPES = ("global", "per_layer")


class Group(NamedTuple):
    """Experts that are resident together: what one pass over an event, or over a part of it, may use."""

    keys: Sequence[Key]  # in event order
    slots: list[int]  # where each of them lies
    missing: list[Key]  # those that must be read into their slots first, in event order


def event_order(expert_ids_TK: npt.NDArray[np.integer]) -> list[int]:
    """Distinct experts of one call, the one to be considered most recent last.

    Args:
        expert_ids_TK: choices of T tokens, heaviest router weight first.

    Tokens follow each other; inside a token the heavier expert is the more recent; an expert counts where it is last.
    """
    recent_first = expert_ids_TK[::-1].ravel().tolist()
    return list(dict.fromkeys(recent_first))[::-1]


class Pool:
    """`slots` equal slots, numbered from `first_slot`, under one policy."""

    def __init__(self, slots: int, policy: Policy, *, first_slot: int = 0) -> None:
        self.slots = slots
        self._policy = policy
        self._slot_of: dict[Key, int] = {}
        self._free = list(range(first_slot + slots - 1, first_slot - 1, -1))

    @property
    def resident(self) -> frozenset[Key]:
        """The experts that are in a slot now."""
        return frozenset(self._slot_of)

    def serve(self, event: Sequence[Key]) -> list[Group]:
        """Make the experts of one event resident; more than one group only when they do not fit together.

        Groups must be used in order: admitting a later one may have taken the slots of an earlier one.
        """
        if len(event) <= self.slots:
            return [self._admit(event)]
        return [self._admit(part) for part in self._parts(event)]

    def _parts(self, event: Sequence[Key]) -> list[Sequence[Key]]:
        missing = [key for key in event if key not in self._slot_of]
        room = self.slots - (len(event) - len(missing))
        later = missing[room:]
        waiting = set(later)
        first = [key for key in event if key not in waiting]
        return [first, *(later[start : start + self.slots] for start in range(0, len(later), self.slots))]

    def _admit(self, keys: Sequence[Key]) -> Group:
        slot_of, free = self._slot_of, self._free
        missing = [key for key in keys if key not in slot_of]
        self._policy.touch(keys)
        for key in missing:
            if not free:
                free.append(slot_of.pop(self._policy.evict(keys)))
            slot_of[key] = free.pop()
        return Group(keys, [slot_of[key] for key in keys], missing)


class ExpertCache:
    """All layers' experts in one pool (`global`), or each layer's in its own (`per_layer`), with counters.

    Args:
        slots: of the one pool, or of each layer's pool.
        layers: number of MoE layers.
        scope: `global` or `per_layer`.
        make_policy: called once per pool, again after every `reset`.
    """

    def __init__(self, slots: int, layers: int, *, scope: str, make_policy: Callable[[], Policy]) -> None:
        assert scope in SCOPES, f"scope {scope!r} is not one of {SCOPES}"
        self.slots, self.layers, self.scope = slots, layers, scope
        self._make_policy = make_policy
        self.counts = CacheCounts(layers)
        self.reset()

    @property
    def total_slots(self) -> int:
        """Slots of all pools together."""
        return self.slots if self.scope == "global" else self.slots * self.layers

    def reset(self) -> None:
        """Empty the cache: a cold start. Counters stay."""
        self._seen: set[Key] = set()
        if self.scope == "global":
            self._pools = [Pool(self.slots, self._make_policy())] * self.layers
        else:
            self._pools = [
                Pool(self.slots, self._make_policy(), first_slot=layer * self.slots) for layer in range(self.layers)
            ]

    def resident(self) -> frozenset[Key]:
        """The experts that are in a slot now."""
        return frozenset().union(*(pool.resident for pool in self._pools))

    def serve(self, layer: int, event: Sequence[Key], *, phase: int) -> list[Group]:
        """Serve and count one event of `layer` (position among the MoE layers); see `Pool.serve`."""
        groups = self._pools[layer].serve(event)
        misses = first_touches = 0
        for group in groups:
            misses += len(group.missing)
            for key in group.missing:
                if key not in self._seen:
                    self._seen.add(key)
                    first_touches += 1
        self.counts.add(phase, layer, len(event), misses, first_touches)
        return groups

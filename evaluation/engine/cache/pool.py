"""Which experts are resident, and in which slot: the one set of rules that the live engine and the replay share.

An event is what one forward call brings to one layer: its distinct experts, in event order (`event_order`).
1. Lookups are against the cache as it was before the event. An access is one distinct expert of one event.
2. All experts of an event that fits are resident together while it is served; victims come from outside the event.
3. Of an event larger than its pool, those stay that the policy keeps when it has seen the whole event; the others are
   used in passing. With LRU a larger cache therefore always holds what a smaller one holds.
This file knows no model, no bytes and no torch.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evaluation.engine.cache.counts import CacheCounts
from evaluation.engine.cache.policies import Key, Policy

SCOPES = ("global", "per_layer")


class Service(NamedTuple):
    """How the experts of one event are to be brought in and used; each is in one of the four, in event order."""

    leaving: dict[Key, int]  # resident ones that do not stay, and their slots: to be used before `coming` is read
    staying: dict[Key, int]  # resident before and after
    coming: dict[Key, int]  # to be read into their slots, to stay
    passing: list[Key]  # to be read and not to stay: only of an event larger than its pool

    @property
    def misses(self) -> list[Key]:
        return [*self.coming, *self.passing]


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
        self._retired: list[int] = []
        self._held: dict[
            int, npt.NDArray[np.bool_]
        ] = {}  # layer -> of each expert; of those layers that were asked for

    def empty(self, policy: Policy) -> None:
        """Go on with the same slots, empty, under a new policy."""
        self._policy = policy
        self._free += self._slot_of.values()
        self._slot_of.clear()
        self._held.clear()

    def resize(self, slots: int) -> list[int]:
        """Use this many slots, at most as many as there were at first; return those that are not used from now on."""
        kept = len(self._retired)
        while self.slots < slots and self._retired:
            self._free.append(self._retired.pop())
            self.slots += 1
        while self.slots > slots:
            if not self._free:
                victim = self._policy.evict(())
                self._free.append(self._slot_of.pop(victim))
                self._note([victim], False)
            self._retired.append(self._free.pop())
            self.slots -= 1
        return self._retired[kept:]

    @property
    def resident(self) -> frozenset[Key]:
        """The experts that are in a slot now."""
        return frozenset(self._slot_of)

    def holds(self, layer: int, experts: int) -> npt.NDArray[np.bool_]:
        """[experts]: whether each of the first so many of a layer is in a slot; kept up to date, and not to be written into."""
        if layer not in self._held:
            self._held[layer] = np.array([(layer, expert) in self._slot_of for expert in range(experts)])
        return self._held[layer]

    def _note(self, keys: Iterable[Key], is_held: bool) -> None:
        for layer, expert in keys:
            if layer in self._held:
                self._held[layer][expert] = is_held

    def serve(self, event: Sequence[Key]) -> Service:
        """Decide what stays of one event and what it pushes out."""
        slot_of, evict = self._slot_of, self._policy.evict
        resident = {key: slot_of[key] for key in event if key in slot_of}
        self._policy.touch(event)
        excess = len(slot_of) + len(event) - len(resident) - self.slots
        pinned = event if len(event) <= self.slots else ()
        victims = dict.fromkeys(evict(pinned) for _ in range(excess))
        self._free += [slot_of.pop(key) for key in victims if key in slot_of]
        coming = {key: self._free.pop() for key in event if key not in resident and key not in victims}
        slot_of.update(coming)
        if self._held:
            self._note((key for key in victims if key not in slot_of), False)
            self._note(coming, True)
        return Service(
            leaving={key: slot for key, slot in resident.items() if key in victims},
            staying={key: slot for key, slot in resident.items() if key not in victims},
            coming=coming,
            passing=[key for key in event if key in victims and key not in resident],
        )


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
        self._seen: set[Key] = set()
        if scope == "global":
            self._pools = [Pool(slots, make_policy())] * layers
        else:
            self._pools = [Pool(slots, make_policy(), first_slot=layer * slots) for layer in range(layers)]

    @property
    def total_slots(self) -> int:
        """Slots of all pools together."""
        return self.slots if self.scope == "global" else self.slots * self.layers

    def reset(self) -> None:
        """Empty the cache: a cold start. Counters stay."""
        self._seen = set()
        for pool in dict.fromkeys(self._pools):
            pool.empty(self._make_policy())

    def resize(self, slots: int) -> list[int]:
        """Use this many slots of each pool, at most as many as at first; return those that are not used from now on."""
        unused = [slot for pool in dict.fromkeys(self._pools) for slot in pool.resize(slots)]
        self.slots = self._pools[0].slots
        return unused

    def resident(self) -> frozenset[Key]:
        """The experts that are in a slot now."""
        return frozenset().union(*(pool.resident for pool in self._pools))

    def resident_experts(self, layer: int) -> list[int]:
        """The experts of `layer` that are in a slot now."""
        return [expert for at, expert in self._pools[layer].resident if at == layer]

    def holds(self, layer: int, experts: int) -> npt.NDArray[np.bool_]:
        """[experts]: whether each of `layer`, which has so many, is in a slot; kept up to date, and not to be written into."""
        return self._pools[layer].holds(layer, experts)

    def serve(self, layer: int, event: Sequence[Key], *, phase: int) -> Service:
        """Serve and count one event of `layer` (position among the MoE layers); see `Pool.serve`."""
        service = self._pools[layer].serve(event)
        misses = service.misses
        first_touches = [key for key in misses if key not in self._seen]
        self._seen.update(first_touches)
        self.counts.add(phase, layer, len(event), len(misses), len(first_touches))
        return service

"""Replacement policies: the order in which residents leave, nothing else.

A policy sees whole events, never single accesses. For every event the cache first calls `touch` with the experts of
the event in event order (those that are not resident come in), then `evict` once for each slot that is missing.
`pinned` are the experts of that event, which are in use and must not be chosen; an event that does not fit pins nothing.
All policies share one section order: state, touch, evict. Which experts are looked up, and in which slot they lie, is
the cache's business.
"""

import heapq
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

Key = tuple[int, int]
"""(layer, expert): the layer counted among the MoE layers, from 0; the expert id inside that layer."""

NEVER = sys.maxsize
"""The next use of an expert that is not used again."""


class Policy(Protocol):
    """What a cache asks of a policy."""

    def touch(self, event: Sequence[Key]) -> None:
        """These experts are used now, in this order; the last one is the most recent."""

    def evict(self, pinned: Collection[Key]) -> Key:
        """Choose a resident outside `pinned`, forget it and return it."""


class Lru:
    """Least recently used leaves."""

    def __init__(self) -> None:
        self._order: OrderedDict[Key, None] = OrderedDict()

    def touch(self, event: Sequence[Key]) -> None:
        for key in event:
            self._order[key] = None
            self._order.move_to_end(key)

    def evict(self, pinned: Collection[Key]) -> Key:
        victim, _ = self._order.popitem(last=False)
        assert victim not in pinned, "the event was touched last, so its experts cannot be the oldest"
        return victim


class Fifo:
    """The one that came in first leaves; being used does not help."""

    def __init__(self) -> None:
        self._queue: dict[Key, None] = {}

    def touch(self, event: Sequence[Key]) -> None:
        for key in event:
            self._queue.setdefault(key)

    def evict(self, pinned: Collection[Key]) -> Key:
        victim = next(key for key in self._queue if key not in pinned)
        del self._queue[victim]
        return victim


class Lfu:
    """The one used least often since it came in leaves; among equals the least recently used.

    The heap holds one entry per resident, brought up to date only when it surfaces: uses and time only grow, so an
    outdated entry can surface too early but never too late.
    """

    def __init__(self) -> None:
        self._uses: dict[Key, tuple[int, int]] = {}  # number of uses, time of the last one
        self._heap: list[tuple[int, int, Key]] = []
        self._time = 0

    def touch(self, event: Sequence[Key]) -> None:
        for key in event:
            self._time += 1
            known = self._uses.get(key)
            if known is None:
                heapq.heappush(self._heap, (1, self._time, key))
            self._uses[key] = (known[0] + 1 if known else 1, self._time)

    def evict(self, pinned: Collection[Key]) -> Key:
        held = []
        while True:
            entry = heapq.heappop(self._heap)
            victim = entry[2]
            current = (*self._uses[victim], victim)
            if entry != current:
                heapq.heappush(self._heap, current)
            elif victim in pinned:
                held.append(entry)
            else:
                break
        for entry in held:
            heapq.heappush(self._heap, entry)
        del self._uses[victim]
        return victim


class Belady:
    """The one whose next use is farthest away leaves (MIN): the optimum, for replay only, since it knows the future.

    `next_uses[key]` yields, at the n-th use of `key`, the time of the use after it, and `NEVER` at the last one.
    """

    def __init__(self, next_uses: Mapping[Key, Iterator[int]]) -> None:
        self._next_uses = next_uses
        self._next: dict[Key, int] = {}
        self._heap: list[tuple[int, Key]] = []  # farthest first; may hold outdated entries

    def touch(self, event: Sequence[Key]) -> None:
        for key in event:
            self._next[key] = time = next(self._next_uses[key])
            heapq.heappush(self._heap, (-time, key))
        if len(self._heap) > 4 * len(self._next) + 64:
            self._heap = [(-time, key) for key, time in self._next.items()]
            heapq.heapify(self._heap)

    def evict(self, pinned: Collection[Key]) -> Key:
        held = []
        while True:
            entry = heapq.heappop(self._heap)
            victim = entry[1]
            if self._next.get(victim) != -entry[0]:
                continue
            if victim not in pinned:
                break
            held.append(entry)
        for entry in held:
            heapq.heappush(self._heap, entry)
        del self._next[victim]
        return victim


ONLINE: Mapping[str, Callable[[], Policy]] = {"lru": Lru, "fifo": Fifo, "lfu": Lfu}
"""The policies that need no future: the live engine's choice and `replay`'s; `belady` is `replay`'s alone."""

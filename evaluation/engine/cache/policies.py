"""Replacement policies: the order in which residents leave, nothing else.

A policy sees whole events, never single accesses. For every event the cache first calls `touch` with the experts of
the event in event order (those that are not resident come in), then `evict` once for each slot that is missing.
`pinned` are the experts of that event, which are in use and must not be chosen; an event that does not fit pins nothing.
All policies share one section order: state, touch, evict. Which experts are looked up, and in which slot they lie, is
the cache's business.
"""

import heapq
import math
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

Key = tuple[int, int]
"""(layer, expert): the layer counted among the MoE layers, from 0; the expert id inside that layer."""

NEVER = sys.maxsize
"""The next use of an expert that is not used again."""


class Policy(Protocol):
    """What a cache needs of a policy."""

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


class Ranked:
    """The one of lowest rank leaves, for policies whose ranks only change when an expert is used."""

    def __init__(self) -> None:
        self._rank: dict[Key, tuple[float, ...]] = {}  # of the residents
        self._heap: list[tuple[tuple[float, ...], Key]] = []  # may hold outdated entries
        self._time = 0  # uses so far, to decide among equals

    def rank(self, key: Key, before: float | None) -> tuple[float, ...]:
        """The rank of `key`, which is used now; `before` is its first number at its last use, None if it comes in."""
        raise NotImplementedError

    def touch(self, event: Sequence[Key]) -> None:
        for key in event:
            self._time += 1
            known = self._rank.get(key)
            self._rank[key] = rank = self.rank(key, known[0] if known else None)
            heapq.heappush(self._heap, (rank, key))
        if len(self._heap) > 4 * len(self._rank) + 64:
            self._heap = [(rank, key) for key, rank in self._rank.items()]
            heapq.heapify(self._heap)

    def evict(self, pinned: Collection[Key]) -> Key:
        held = []
        while True:
            rank, victim = entry = heapq.heappop(self._heap)
            if self._rank.get(victim) != rank:
                continue
            if victim not in pinned:
                break
            held.append(entry)
        for entry in held:
            heapq.heappush(self._heap, entry)
        del self._rank[victim]
        return victim


class Lfu(Ranked):
    """The one used least often since it came in leaves; among equals the least recently used."""

    def rank(self, key: Key, before: float | None) -> tuple[float, ...]:
        return 1 + (before or 0), self._time


class Static(Ranked):
    """The one used least in a profile leaves; among equals the least recently used.

    Once they have come in, the experts the profile uses most stay; what else is used passes through the slots that an
    event needs, since its experts are resident together.
    """

    def __init__(self, uses: Mapping[Key, int]) -> None:
        super().__init__()
        self._uses = uses

    def rank(self, key: Key, before: float | None) -> tuple[float, ...]:
        return self._uses.get(key, 0), self._time


class Decayed:
    """The expert of least decayed use leaves; in a shared pool uses count less, the later the turn of their layer comes.

    A use counts half after every `HALF_LIFE` calls, also of an expert that was out in between (LRFU: Lee et al., IEEE ToC
    50:12, 2001, but for that memory). The sum of 2 ** (-age / HALF_LIFE) over an expert's uses keeps its order in a
    layer while time passes, so each layer has a heap by the logarithm of that sum with ages counted from the start.
    In a pool of several layers an expert can next be of use when its layer comes, in at most one call: the sum is
    multiplied by 1 - `TURN` x that part of a call. Both constants: see the table in the engine's README.
    """

    HALF_LIFE, TURN = 32, 0.9

    def __init__(self) -> None:
        self._worth: dict[Key, tuple[float, int]] = {}  # logarithm, time of the last use; also of those that left
        self._resident: set[Key] = set()
        self._heaps: dict[int, list[tuple[float, int, Key]]] = {}  # residents by layer; outdated entries are too low
        self._lowest: dict[int, float] = {}  # what the lowest resident of a layer is worth now
        self._changed: set[int] = set()  # layers whose lowest may be another
        self._calls: Counter[int] = Counter()  # events so far, by layer: every call brings one to each
        self._layer, self._time = 0, 0
        self._turns: list[float] = []  # logarithm of the factor for the next layer, the one after it, ...

    def touch(self, event: Sequence[Key]) -> None:
        self._layer = event[0][0]
        self._calls[self._layer] += 1
        self._changed.add(self._layer)
        now = self._calls[self._layer] / self.HALF_LIFE
        for key in event:
            self._time += 1
            worth, _ = self._worth.get(key, (-math.inf, 0))
            self._worth[key] = (now + math.log2(1 + 2 ** (worth - now)), self._time)
            if key not in self._resident:
                self._resident.add(key)
                heapq.heappush(self._heaps.setdefault(self._layer, []), (*self._worth[key], key))

    def evict(self, pinned: Collection[Key]) -> Key:
        held = [entry for layer in self._changed for entry in self._bring_up_to_date(layer, pinned)]
        layers = max(self._calls) + 1
        if len(self._turns) != layers:
            self._turns = [math.log2(1 - self.TURN * (turn + 1) / layers) for turn in range(layers)]
        first = self._layer + 1
        layer = min(self._lowest, key=lambda layer: self._lowest[layer] + self._turns[(layer - first) % layers])
        victim = heapq.heappop(self._heaps[layer])[2]
        for entry in held:
            heapq.heappush(self._heaps[entry[2][0]], entry)
        self._changed = {layer, self._layer}
        self._resident.remove(victim)
        return victim

    def _bring_up_to_date(self, layer: int, pinned: Collection[Key]) -> Iterator[tuple[float, int, Key]]:
        """Find the lowest resident of a layer outside `pinned`; yield the entries of pinned ones that were in its way."""
        heap = self._heaps[layer]
        while heap:
            current = (*self._worth[heap[0][2]], heap[0][2])
            if heap[0] != current:
                heapq.heapreplace(heap, current)
            elif current[2] in pinned:
                yield heapq.heappop(heap)
            else:
                break
        self._lowest[layer] = heap[0][0] - self._calls[layer] / self.HALF_LIFE if heap else math.inf


class Lfru:
    """The one with the least uses / (age + 1) leaves, uses since it came in and age in calls since the last one."""

    def __init__(self) -> None:
        self._last: dict[Key, tuple[int, int]] = {}  # uses, call of the last one
        self._by_uses: dict[int, OrderedDict[Key, None]] = {}  # oldest first: only the oldest can leave
        self._calls: Counter[int] = Counter()

    def touch(self, event: Sequence[Key]) -> None:
        self._calls[event[0][0]] += 1
        for key in event:
            uses = self._forget(key) + 1
            self._last[key] = (uses, self._calls[key[0]])
            self._by_uses.setdefault(uses, OrderedDict())[key] = None

    def evict(self, pinned: Collection[Key]) -> Key:
        oldest = (next((key for key in keys if key not in pinned), None) for keys in self._by_uses.values())
        victim = min((key for key in oldest if key is not None), key=self._worth)
        self._forget(victim)
        return victim

    def _worth(self, key: Key) -> tuple[float, int]:
        uses, last = self._last[key]
        return uses / (self._calls[key[0]] - last + 1), last

    def _forget(self, key: Key) -> int:
        """Drop `key` and return its uses, 0 if it was unknown."""
        uses, _ = self._last.pop(key, (0, 0))
        if uses:
            del self._by_uses[uses][key]
            if not self._by_uses[uses]:
                del self._by_uses[uses]
        return uses


class Belady(Ranked):
    """The one whose next use is farthest away leaves (MIN): the optimum, for replay only, since it knows the future.

    `next_uses[key]` yields, at the n-th use of `key`, the time of the use after it, and `NEVER` at the last one.
    """

    def __init__(self, next_uses: Mapping[Key, Iterator[int]]) -> None:
        super().__init__()
        self._next_uses = next_uses

    def rank(self, key: Key, before: float | None) -> tuple[float, ...]:
        return (-next(self._next_uses[key]),)


ONLINE: Mapping[str, Callable[[], Policy]] = {"lru": Lru, "fifo": Fifo, "lfu": Lfu, "lfru": Lfru, "decayed": Decayed}
"""The policies that need to know nothing, which a live engine runs; `static` needs a profile and `belady` the future, which only
a replay has."""

DEFAULT = "decayed"
"""The one that misses least on the shipped model's and on made traces; see the table in the engine's README."""

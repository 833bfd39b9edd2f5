"""Reading ahead by the next layer's router. It costs reads and changes no result.

While a layer decodes, the router of the next one is asked with this layer's input, and those of the heaviest it names that
are not resident are read into slots of their own, behind the layer's own reads: the disk stays busy while attention and
router need nothing of it. What the next layer then misses is there already, or on its way; the others were read in vain.
The cache and its rules know nothing of it.

Where nothing is missing, asking routers is time lost. `auto` compares, every so many calls, the time that asking took with
the time in which what was missed can be read.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from evaluation.engine.cache.counts import DECODE
from evaluation.engine.cache.policies import Key
from evaluation.engine.slot_memory import SlotMemory
from evaluation.engine.stats import ReadCounts
from evaluation.engine.store.reader import Reader, Request
from training.model.router_calls import AskedRouter

EXPERTS = 3
"""How many experts of a layer to guess unless told otherwise."""
TRUSTED = 2 / 3
"""The share of the experts a router names that guesses are taken from, the heaviest. Of a made model's 8 they are chosen in 95,
89, 84, 74 and 67 % of the cases, at any size of the cache; the lighter third in 58, 48 and 41 %, which would be read in vain too
often (`README.md`, reading ahead)."""
SLOTS_PER_EXPERT_AHEAD = 32
"""Slots of a cache that `auto` wants for each expert that it guesses: they take slots that the cache would have."""
CALLS = 16
"""Calls after which `auto` decides anew."""
WORTH = 2
"""So many times as long as asking must what is missed take to read: at most that much of it is hidden."""
SLOTS_PER_GUESS = 2
"""Slots for each guess: the next guesses are read while pieces of the last ones still are."""


class ReadAhead(NamedTuple):
    """One expert on its way into a slot, or there."""

    slot: int
    request: Request


def experts_ahead(wanted: int | str, slots: int, *, pools: int, top_k: int) -> int:
    """How many experts of a layer to guess with so many slots in all pools; none where a token's hardly fit."""
    if isinstance(wanted, int):
        return wanted
    return min(EXPERTS, slots // SLOTS_PER_EXPERT_AHEAD) if slots // pools >= 2 * top_k else 0


class Prefetch:
    """Guesses, and what came of them.

    Attributes:
        is_on: whether it guesses now.

    Args:
        routers: of all MoE layers, in order.
        experts: how many to guess, at most, for a layer.
        layer_ids: the checkpoint's numbers of these layers.
        resident: position of a layer -> its experts that are in a slot.
        counts: where what was read ahead is counted, and what was read in all.
        misses: how many experts decode calls missed until now; None: it always guesses.
    """

    def __init__(
        self, routers: Sequence[AskedRouter], memory: SlotMemory, reader: Reader, *, experts: int, layer_ids: Sequence[int],
        resident: Callable[[int], Sequence[int]], counts: ReadCounts, misses: Callable[[], int] | None = None,
    ) -> None:  # fmt: skip
        self.is_on = True
        self._misses, self._calls, self._before = misses, 0, (0, 0, 0.0)
        self._asking_seconds, self._call_seconds, self._read_seconds = 0.0, 0.0, 0.0  # lately, of a call, of an expert
        self._routers, self._memory, self._reader, self._layer_ids = routers, memory, reader, layer_ids
        self._experts, self._resident, self._counts = experts, resident, counts
        self._free = deque(memory.ahead_slots)
        self._guessed: dict[Key, ReadAhead] = {}
        self._dropped: deque[ReadAhead] = deque()  # wrong guesses of which a piece was still being read

    @torch.no_grad()
    def guess(self, layer: int, hidden_TH: torch.Tensor) -> None:
        """Start to read what the layer after `layer` is likely to miss; called once the layer's own reads are started."""
        started = time.perf_counter()
        wanted = self._wanted(layer + 1, hidden_TH) if self.is_on and layer + 1 < len(self._routers) else []
        self._asking_seconds += time.perf_counter() - started
        self._drop([key for key in self._guessed if key not in wanted])
        for key in wanted:
            if key not in self._guessed and self._free:
                self._guessed[key] = self._read(key, self._free.popleft())

    def call_done(self) -> None:
        """A decode call is over; after some of them `auto` decides."""
        self._counts.ahead_calls += self.is_on
        self._calls += 1
        if self._misses is None or self._calls % CALLS:
            return
        now = self._misses(), self._counts.bytes_read[DECODE], self._counts.reading_seconds[DECODE]
        missed, read_bytes, reading_seconds = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        if missed < 0 or read_bytes < 0:  # counts were reset
            return
        if self.is_on:
            self._call_seconds = self._asking_seconds / CALLS
        if read_bytes:
            self._read_seconds = reading_seconds * self._memory.expert_bytes / read_bytes
        self._asking_seconds = 0.0
        self.is_on = missed * self._read_seconds > WORTH * CALLS * self._call_seconds

    def take(self, key: Key) -> ReadAhead | None:
        """The read of this expert, if it was guessed; whoever takes it gives a slot back."""
        ahead = self._guessed.pop(key, None)
        if ahead is not None:
            self._counts.prefetch_used += 1
            self._count(ahead.request)
        return ahead

    def give_back(self, slot: int) -> None:
        """`slot`, one of the memory's for this purpose, may be read into again."""
        self._free.append(slot)

    def _wanted(self, layer: int, hidden_TH: torch.Tensor) -> list[Key]:
        """The heaviest first."""
        _, weights_TK, ids_TK = self._routers[layer].ask(hidden_TH)
        weights_TN, place_TN = weights_TK.topk(max(1, int(TRUSTED * weights_TK.shape[-1])))
        order = weights_TN.flatten().argsort(descending=True, stable=True)
        resident = set(self._resident(layer))
        ids = dict.fromkeys(ids_TK.gather(-1, place_TN).flatten()[order].tolist())
        return [(layer, expert) for expert in ids if expert not in resident][: self._experts]

    def _read(self, key: Key, slot: int) -> ReadAhead:
        layer_id = self._layer_ids[key[0]]
        spans = self._memory.spans(slot, layer_id, key[1])
        return ReadAhead(slot, self._reader.start(key, spans, None, what=f"layer {layer_id} expert {key[1]}"))

    def _drop(self, wrong: Sequence[Key]) -> None:
        """Read no more of these; their slots are free once what has begun is read."""
        for key in wrong:
            self._dropped.append(self._guessed.pop(key))
            self._dropped[-1].request.drop()
        for _ in range(len(self._dropped)):
            slot, request = ahead = self._dropped.popleft()
            if request.is_done:
                self.give_back(slot)
                self._counts.device_bytes_read[DECODE] += request.device_bytes
                self._count(request)
            else:
                self._dropped.append(ahead)

    def _count(self, request: Request) -> None:
        self._counts.prefetched += request.wanted_bytes > 0
        self._counts.bytes_read[DECODE] += request.wanted_bytes

"""The reads of one event that are under way: started all at once, used as they land.

Experts that stay go straight into their slots. Experts that pass through, and all experts if they must be converted
after reading, take turns in the passing slots, as many at a time as there are passing slots.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import NamedTuple

from evaluation.engine.cache.policies import Key
from evaluation.engine.prefetch import Prefetch, ReadAhead
from evaluation.engine.slot_memory import SlotMemory
from evaluation.engine.store.reader import Reader, Request


class _Reading(NamedTuple):
    read_into: int  # a slot
    meant_for: int | None  # the slot it stays in
    matrix: str | None  # the one that is read; None: all


class Flight(AbstractContextManager["Flight"]):
    """Reads of experts of one layer; a context manager that waits for what is under way when it is left early.

    Args:
        prefetch: what has begun some of the reads already.

    Attributes:
        stall_seconds: time `landings` waited for a read.
        bytes_read: bytes of experts that were read; `device_bytes` counts the whole pages they lie in.
    """

    def __init__(self, memory: SlotMemory, reader: Reader, *, layer_id: int, prefetch: Prefetch | None = None) -> None:
        self._memory, self._reader, self._layer_id, self._prefetch = memory, reader, layer_id, prefetch
        self._landed: SimpleQueue[Request] = SimpleQueue()
        self._under_way: dict[Key, _Reading] = {}
        self._waiting: deque[tuple[Key, int | None, str | None]] = deque()
        self._free = deque(memory.passing_slots)
        self.stall_seconds, self.bytes_read, self.device_bytes = 0.0, 0, 0

    def __exit__(self, *_: object) -> None:
        self._waiting.clear()
        while self._under_way:
            self._free_after_use(self._under_way.pop(self._landed.get().key).read_into)

    def start(self, wanted: Mapping[Key, int | None], *, matrix: str | None = None) -> None:
        """Read these experts, or one of their matrices, into these slots; None: into any passing slot."""
        for key, slot in wanted.items():
            ahead = self._prefetch.take(key) if self._prefetch is not None and matrix is None else None
            if ahead is not None:
                self._take_over(key, slot, ahead)
            elif slot is None or self._memory.converts:
                self._waiting.append((key, slot, matrix))
            else:
                self._read(key, slot, slot, matrix)
        self._fill_passing_slots()

    def landings(self) -> Iterator[dict[Key, int]]:
        """Every started expert and its slot, as they land, together those that have; or `UserError`. What passes through stays
        only until the next."""
        while self._under_way:
            landed, read_into = dict[Key, int](), list[int]()
            try:
                for request in self._landed_by_now():
                    reading = self._under_way.pop(request.key)
                    read_into.append(reading.read_into)
                    self.device_bytes += request.device_bytes
                    if request.error is not None:
                        raise request.error
                    landed[request.key] = self._placed(reading)
                yield landed
            finally:
                for slot in read_into:
                    self._free_after_use(slot)
            self._fill_passing_slots()

    def _landed_by_now(self) -> Iterator[Request]:
        """The next one and whatever else there is; it alone if it is converted: what passes through has one place then."""
        started = time.perf_counter()
        request = self._landed.get()
        self.stall_seconds += time.perf_counter() - started
        yield request
        while not self._memory.converts and not self._landed.empty():
            yield self._landed.get()

    def _placed(self, reading: _Reading) -> int:
        """The slot in which what was read is used."""
        if not self._memory.converts:
            return reading.read_into
        return self._memory.convert(reading.read_into, reading.meant_for, reading.matrix)

    def _fill_passing_slots(self) -> None:
        while self._free and self._waiting:
            key, slot, matrix = self._waiting.popleft()
            self._read(key, self._free.popleft(), slot, matrix)

    def _free_after_use(self, slot: int) -> None:
        """Where what was read does not stay, something else may be read."""
        if slot in self._memory.passing_slots:
            self._free.append(slot)
        elif slot in self._memory.ahead_slots:
            assert self._prefetch is not None
            self._prefetch.give_back(slot)

    def _take_over(self, key: Key, slot: int | None, ahead: ReadAhead) -> None:
        """What is read ahead already lands here; if it stays, in the place of what was in its slot."""
        read_into = ahead.slot
        if slot is not None and not self._memory.converts:
            self._memory.swap(slot, ahead.slot)
            self._free_after_use(ahead.slot)
            read_into = slot
        self._under_way[key] = _Reading(read_into, slot, None)
        self._reader.wait_for(ahead.request, self._landed)

    def _read(self, key: Key, read_into: int, meant_for: int | None, matrix: str | None) -> None:
        spans = self._memory.spans(read_into, self._layer_id, key[1], matrix)
        self._reader.start(key, spans, self._landed, what=f"layer {self._layer_id} expert {key[1]}")
        self._under_way[key] = _Reading(read_into, meant_for, matrix)
        self.bytes_read += sum(len(span.target) for span in spans)

"""Reading ahead by the next layer's router: an ablation, off unless asked for. It costs reads and changes no result.

While a layer decodes, the router of the next one is asked with this layer's input, and experts it names that are not
resident are read into memory of their own. Of those, the ones the next layer then misses are copied from there instead of
being read; the others were read in vain. The cache and its rules know nothing of it.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from evaluation.engine.accounting import DECODE, ReadCounts
from evaluation.engine.policies import Key
from evaluation.engine.reader import Bytes, Reader, Request, Span
from evaluation.engine.store import ExpertStore

BUFFERS_PER_CHOICE = 2
"""Memory for so many times the experts of one token in one layer: for those that are used, and for those on their way."""


class ReadAhead:
    """One expert that is read, or was, into memory of its own; a reader's landing place."""

    def __init__(self, buffer: Bytes) -> None:
        self.buffer = buffer
        self.parts: list[Span] = []
        self._done = threading.Event()
        self._error: Exception | None = None

    def put(self, request: Request) -> None:
        """The reader is done."""
        self._error = request.error
        self._done.set()

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def copy_to(self, span: Span) -> None:
        """Fill the span's target with what the file has there; waits for the read.

        Raises:
            Exception: the read's.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        part = next(p for p in self.parts if p.shard == span.shard and 0 <= span.offset - p.offset < len(p.target))
        start = span.offset - part.offset
        np.copyto(span.target, part.target[start : start + len(span.target)])


class Prefetch:
    """Guesses, and what came of them.

    Args:
        routers: of all MoE layers, in order.
        layer_ids: the checkpoint's numbers of these layers.
        resident: position of a layer -> its experts that are in a slot.
        counts: where to count, asked for anew each time.
    """

    def __init__(
        self, routers: Sequence[nn.Module], store: ExpertStore, reader: Reader, *, top_k: int, layer_ids: Sequence[int],
        resident: Callable[[int], Sequence[int]], counts: Callable[[], ReadCounts],
    ) -> None:  # fmt: skip
        self._routers, self._store, self._reader, self._layer_ids = routers, store, reader, layer_ids
        self._resident, self._counts = resident, counts
        size = (BUFFERS_PER_CHOICE * top_k, store.shape.expert_bytes)
        self._free: deque[Bytes] = deque(np.empty(size, np.uint8))
        self._guessed: dict[Key, ReadAhead] = {}
        self._given: list[tuple[Key, ReadAhead]] = []

    @torch.no_grad()
    def guess(self, layer: int, hidden_TH: torch.Tensor) -> None:
        """Start to read what the layer after `layer` is likely to miss; called once the layer's own reads are started."""
        wanted = self._wanted(layer + 1, hidden_TH) if layer + 1 < len(self._routers) else []
        self._take_back(layer, keep=wanted)
        for key in wanted:
            if key not in self._guessed and self._free:
                self._guessed[key] = self._read(key, self._free.popleft())

    def _wanted(self, layer: int, hidden_TH: torch.Tensor) -> list[Key]:
        router: Any = self._routers[layer]
        ids_TK = router.forward(hidden_TH)[2]  # not called: hooks would take it for the layer's own choice
        resident = set(self._resident(layer))
        return [(layer, expert) for expert in dict.fromkeys(ids_TK.flatten().tolist()) if expert not in resident]

    def take(self, key: Key) -> ReadAhead | None:
        """The read of this expert, if it was guessed; its memory is free again a layer later."""
        found = self._guessed.pop(key, None)
        if found is not None:
            self._given.append((key, found))
            self._counts().prefetch_used += 1
        return found

    def _read(self, key: Key, buffer: Bytes) -> ReadAhead:
        layer_id, start = self._layer_ids[key[0]], 0
        ahead = ReadAhead(buffer)
        for extent in self._store.extents(layer_id, key[1]):
            ahead.parts.append(Span(extent.shard, extent.offset, buffer[start : start + extent.length_bytes]))
            start += extent.length_bytes
        self._reader.start(key, ahead.parts, ahead, what=f"layer {layer_id} expert {key[1]}")
        self._counts().prefetched += 1
        self._counts().bytes_read[DECODE] += start
        return ahead

    def _take_back(self, layer: int, *, keep: Sequence[Key]) -> None:
        """Free the memory of what was read and is not wanted any more; this layer's is still in use."""
        given = [(key, ahead) for key, ahead in self._given if key[0] == layer]
        guessed = {key: a for key, a in self._guessed.items() if key[0] == layer or key in keep or not a.is_done}
        kept = {id(ahead) for ahead in (*guessed.values(), *(ahead for _, ahead in given))}
        known = [*self._guessed.values(), *(ahead for _, ahead in self._given)]
        self._free += [ahead.buffer for ahead in known if id(ahead) not in kept]
        self._given, self._guessed = given, guessed

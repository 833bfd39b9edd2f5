"""The memory of the slots: allocated once, one record per slot, and filled straight from disk.

What a record is, `store/expert_format.py` says. Axes: H hidden, I intermediate, J = 2 I (gate and up).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch

from evaluation.engine.device import HOST, Block, Device
from evaluation.engine.filled_rows import filled_rows
from evaluation.engine.store.expert_format import MATRICES, NO_LEADS, Leads
from evaluation.engine.store.experts import ExpertStore, Extent
from evaluation.engine.store.reader import Bytes, Span
from training.model.lazy_weights import TORCH_DTYPES

NOT_FILLED: Mapping[str, tuple[int, ...]] = {"gate_up": (), "down": ()}


class SlotMemory:
    """`slots` records for the experts of a store, in `dtype`, and more for experts that do not stay: `passing` and `ahead`.

    If the checkpoint's precision is another, or the slots lie on an accelerator, experts are read into `passing` and
    `ahead` records of that precision in the processor's memory (pinned, where there is an accelerator) and copied from
    there.

    Attributes:
        device: where products are computed.
        passing_slots: numbers of the slots for experts that do not stay, after those of the cache.
        ahead_slots: those for experts that are read ahead, after these.
        converts: whether what is read must be copied before it can be used.
        filled_rows: of `gate_up` and `down`, how many rows to compute products with, see `filled_rows.py`; holds while torch
            has `filled_for_threads` threads.
    """

    def __init__(
        self,
        store: ExpertStore,
        slots: int,
        dtype: torch.dtype,
        *,
        passing: int = 1,
        ahead: int = 0,
        device: Device = HOST,
    ) -> None:
        stored, self.device = TORCH_DTYPES[store.format.dtype], device
        self._store, self.dtype = store, dtype
        self.converts = stored != dtype or not self.device.reads_into_slots
        staying = slots + (1 if self.converts else passing + ahead)
        self._records = _Records(store, dtype, staying, self.device.allocate)
        self._landing = self._records
        if self.converts:
            self._landing = _Records(store, stored, passing + ahead, self.device.allocate_landing)
        self.passing_slots = range(slots, slots + passing)
        self.ahead_slots = range(slots + passing, slots + passing + ahead)
        self._first_landing = slots if self.converts else 0
        self.filled_rows, self.filled_for_threads = NOT_FILLED, 0

    def fill_rows(self) -> None:
        """Fill products up to few numbers of rows from now on; called before any expert is in a slot."""
        self.filled_for_threads = torch.get_num_threads()
        self.filled_rows = {role: filled_rows(self._records.matrix(0, role)) for role in NOT_FILLED}

    @property
    def gate_up_columns(self) -> int:
        return 2 * self._store.format.intermediate

    @property
    def roles_before_activation(self) -> list[str]:
        return self._store.format.roles_of("gate_up")

    @property
    def passing_bytes(self) -> int:
        """Memory on top of the cache's slots."""
        of_cache = self.passing_slots.start * self._records.record_bytes
        return self._records.total_bytes - of_cache + (self._landing.total_bytes if self.converts else 0)

    def gate_up_HJ(self, slot: int) -> torch.Tensor:
        """Gate and up of the expert in `slot`, as hidden states are multiplied by it; a view."""
        return self._records.matrix(slot, "gate_up")

    def down_IH(self, slot: int) -> torch.Tensor:
        """Down of the expert in `slot`, as activations are multiplied by it; a view."""
        return self._records.matrix(slot, "down")

    def spans(self, slot: int, layer_id: int, expert: int, roles: Sequence[str] | None = None) -> list[Span]:
        """Where in `slot` an expert, or some of its matrices, goes; if precisions differ, a passing slot is meant."""
        extents = self._store.extents(layer_id, expert, roles)
        self.device.wait(slot)
        leads = NO_LEADS if self.converts else self._store.leads(layer_id, expert)
        return self._landing.spans(slot - self._first_landing, extents, leads)

    def release(self, slot: int) -> None:
        """Give the memory of a slot back to the system; the slot may be used again."""
        self._records.release(slot)

    def swap(self, slot: int, ahead_slot: int) -> None:
        """Exchange the places of two slots; nothing is copied. Not for memory that converts."""
        assert not self.converts, "what is read ahead is converted, not swapped"
        self._records.swap(slot, ahead_slot)

    def convert(self, passing_slot: int, into: int | None, roles: Sequence[str] | None = None) -> int:
        """Move what was read into slot `into`, or into the one that stands in for it; returns that slot."""
        slot, place = self.passing_slots.start if into is None else into, passing_slot - self._first_landing
        matrices = [m for m in MATRICES if roles is None or set(roles).intersection(self._store.format.roles_of(m))]
        pairs = [(self._records.matrix(slot, role), self._landing.matrix(place, role)) for role in matrices]
        self.device.copy_in(pairs, passing_slot=passing_slot, slot=slot)
        return slot


class _Records:
    """Raw records and the matrices in them as views."""

    def __init__(self, store: ExpertStore, dtype: torch.dtype, slots: int, allocate: Callable[[int], Block]) -> None:
        self._dtype, self._record = dtype, store.record(dtype.itemsize)
        self.record_bytes = self._record.total_bytes
        self.total_bytes = slots * self.record_bytes
        with torch.inference_mode(False):  # or nothing could be written outside of it, see `matrix`
            self._raw, self._release = allocate(self.total_bytes)
        self.leads = [NO_LEADS] * slots
        self._place = list(range(slots))  # of each slot
        self._matrices: dict[tuple[int, str, Leads], torch.Tensor] = {}  # views, which take longer to make than to use

    @cached_property
    def _memory(self) -> Bytes:
        return self._raw.numpy()

    def matrix(self, slot: int, role: str) -> torch.Tensor:
        """A matrix of the expert in `slot` as the right-hand side of a product: [H, J] or [I, H]."""
        where = self._place[slot], role, self.leads[slot]
        if where not in self._matrices:
            start, length = self._record.place(role, self.leads[slot])
            start += self._place[slot] * self.record_bytes
            with torch.inference_mode(False):
                matrix = self._raw[start : start + length].view(self._dtype).view(self._record.format.shape(role))
                self._matrices[where] = matrix if self._record.format.transposed else matrix.T
        return self._matrices[where]

    def swap(self, one: int, other: int) -> None:
        """Exchange the places of two slots."""
        self._place[one], self._place[other] = self._place[other], self._place[one]
        self.leads[one], self.leads[other] = self.leads[other], self.leads[one]

    def release(self, slot: int) -> None:
        """Give the memory of a slot back, but for pages that it shares with its neighbours."""
        place = self._place[slot]
        self._release(place * self.record_bytes, (place + 1) * self.record_bytes)

    def spans(self, slot: int, extents: Sequence[Extent], leads: Leads) -> list[Span]:
        """Each extent as one span, or as several if what is adjacent in the file is not so in a record."""
        self.leads[slot] = leads
        spans: list[Span] = []
        for extent in extents:
            offset, target_end = extent.offset, -1
            for role in extent.roles:
                start, length = self._record.place(role, leads)
                start += self._place[slot] * self.record_bytes
                if start == target_end:
                    first = spans.pop()
                    start, offset = target_end - len(first.target), first.offset
                    length += len(first.target)
                target_end = start + length
                spans.append(Span(extent.shard, offset, self._memory[start:target_end]))
                offset += length
        return spans

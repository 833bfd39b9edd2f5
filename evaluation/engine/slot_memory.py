"""The memory of the slots: allocated once, one record per slot, and filled straight from disk.

What a record is, `store/expert_format.py` says. Axes: H hidden, I intermediate, J = 2 I (gate and up).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch

from configs.load import UserError
from evaluation.engine.device import HOST, Block, Device
from evaluation.engine.filled_rows import filled_rows
from evaluation.engine.store.experts import ExpertStore, Extent
from evaluation.engine.store.reader import Bytes, Span
from evaluation.engine.store.records import NO_LEADS, Leads, Record, StoredRecord
from training.model.expert_format import MATRICES
from training.model.number_formats.formats import PLAIN_DTYPES, Floats, Places, Plain
from training.model.shards import AGAIN

DECODED = -1
"""What stands for the matrix that is decoded on its way to an accelerator, where slots do."""
NOT_FILLED: Mapping[str, tuple[int, ...]] = {"gate_up": (), "down": ()}


class SlotMemory:
    """`slots` records for the experts of a store, in `dtype`, and more for experts that do not stay: `passing` and `ahead`.

    If the checkpoint's numbers are packed or of another precision, or the slots lie on an accelerator, experts are read into
    `passing` and `ahead` records as they are stored, in the processor's memory (pinned, where there is an accelerator), and
    converted from there. With `as_stored` the slots themselves hold packed numbers, and each matrix is decoded when it is
    asked for.

    Attributes:
        device: where products are computed.
        passing_slots: numbers of the slots for experts that do not stay, after those of the cache.
        ahead_slots: those for experts that are read ahead, after these.
        converts: whether what is read must be copied before it can be used.
        multiplies_packed: whether `multiply` is used for few rows, instead of `matrix`.
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
        as_stored: bool = False,
        multiplies_packed: bool = False,
    ) -> None:
        form = store.format
        self.multiplies_packed = multiplies_packed
        assert form.is_quantised or not as_stored, "numbers that are not packed are what is computed with"
        self._store, self.dtype, self.device, self._as_stored = store, dtype, device, as_stored
        ready = store.record(dtype.itemsize)
        stored = PLAIN_DTYPES[form.numbers.dtype] if isinstance(form.numbers, Plain) else None
        self.converts = not as_stored and (stored != dtype or not device.reads_into_slots)
        staying = slots + (1 if self.converts else passing + ahead)
        self._records = _Records(store.stored_record() if as_stored else ready, dtype, staying, device.allocate)
        self._landing = self._records
        self._decoded: _Records | None = None  # one record, for a matrix that no slot holds
        if self.converts:
            record = store.record(stored.itemsize) if stored else store.stored_record()
            self._landing = _Records(record, stored or dtype, passing + ahead, device.allocate_landing)
        if form.is_quantised and (as_stored or not device.reads_into_slots):
            self._decoded = _Records(ready, dtype, 1, device.allocate_landing)
        self.passing_slots = range(slots, slots + passing)
        self.ahead_slots = range(slots + passing, slots + passing + ahead)
        self._first_landing = slots if self.converts else 0
        self._packed_views: dict[tuple[int, str], list[tuple[dict[str, Bytes], slice]]] = {}  # long to make, too
        self._held: dict[int, tuple[int, int]] = {}  # slot -> layer id and expert that were read into it last
        self.filled_rows, self.filled_for_threads = NOT_FILLED, 0

    def fill_rows(self) -> None:
        """Fill products up to few numbers of rows from now on; called before any expert is in a slot."""
        self.filled_for_threads = torch.get_num_threads()
        records = self._decoded if self._as_stored else self._records
        assert records is not None
        self.filled_rows = {role: filled_rows(records.matrix(0, role)) for role in NOT_FILLED}

    @property
    def expert_bytes(self) -> int:
        """Of one expert on disk."""
        return self._store.format.expert_bytes

    @property
    def gate_up_columns(self) -> int:
        return 2 * self._store.format.intermediate

    @property
    def passing_bytes(self) -> int:
        """Memory on top of the cache's slots."""
        of_cache = self.passing_slots.start * self._records.record_bytes
        beside = {
            id(records): records for records in (self._records, self._landing, self._decoded) if records is not None
        }
        return sum(records.total_bytes for records in beside.values()) - of_cache

    def gate_up_HJ(self, slot: int) -> torch.Tensor:
        """Gate and up of the expert in `slot`, as hidden states are multiplied by it; a view that holds until the next call."""
        return self.matrix(slot, "gate_up")

    def down_IH(self, slot: int) -> torch.Tensor:
        """Down of the expert in `slot`, as activations are multiplied by it; a view that holds until the next call."""
        return self.matrix(slot, "down")

    def matrix(self, slot: int, matrix: str) -> torch.Tensor:
        """Either of them."""
        if self._decoded is None or not self._as_stored:
            return self._records.matrix(slot, matrix)
        return self._decode(slot, slot, matrix, self._decoded.matrix(0, matrix))

    def spans(self, slot: int, layer_id: int, expert: int, matrix: str | None = None) -> list[Span]:
        """Where in `slot` an expert, or one of its matrices, goes; if it must be converted, a passing slot is meant."""
        parts = None if matrix is None else self._store.format.parts_of(matrix)
        extents = self._store.extents(layer_id, expert, parts)
        self.device.wait(slot)
        leads = NO_LEADS if self.converts else self._store.leads(layer_id, expert)
        self._held[slot] = layer_id, expert
        return self._landing.spans(slot - self._first_landing, extents, leads)

    def release(self, slot: int) -> None:
        """Give the memory of a slot back to the system; the slot may be used again."""
        self._records.release(slot)

    def swap(self, slot: int, ahead_slot: int) -> None:
        """Exchange the places of two slots; nothing is copied. Not for memory that converts."""
        assert not self.converts, "what is read ahead is converted, not swapped"
        self._records.swap(slot, ahead_slot)
        self._held[slot] = self._held[ahead_slot]

    def convert(self, passing_slot: int, into: int | None, matrix: str | None = None) -> int:
        """Move what was read into slot `into`, or into the one that stands in for it; returns that slot."""
        slot = self.passing_slots.start if into is None else into
        for one in MATRICES if matrix is None else (matrix,):
            self._convert(passing_slot, slot, one)
        return slot

    def _convert(self, passing_slot: int, slot: int, matrix: str) -> None:
        into, place = self._records.matrix(slot, matrix), passing_slot - self._first_landing
        if not self._store.format.is_quantised:
            self.device.copy_in([(into, self._landing.matrix(place, matrix))], passing_slot=passing_slot, slot=slot)
        elif self._decoded is None:
            self._decode(passing_slot, place, matrix, into)
        else:
            self.device.wait(DECODED)
            decoded = self._decode(passing_slot, place, matrix, self._decoded.matrix(0, matrix))
            self.device.copy_in([(into, decoded)], passing_slot=DECODED, slot=slot)

    def _decode(self, slot: int, place: int, matrix: str, into: torch.Tensor) -> torch.Tensor:
        """Fill `into`, a right-hand side, with what lies packed in a place of the records that are read into; returns it."""
        by_output = into.T
        for stored, rows in self._packed(place, matrix):
            with self._told(slot):
                self._store.format.numbers.decode(stored, by_output[rows])
        return into

    def multiply(self, slots: Sequence[int], matrix: str, row_XK: Floats) -> Floats:
        """[X, matrix's rows]: each row times the packed numbers in a slot of its own, which stay as they are stored."""
        try:
            return self._multiply(slots, matrix, row_XK)
        except ValueError:
            for x, slot in enumerate(slots):  # to tell whose numbers are wrong
                with self._told(slot):
                    self._multiply([slot], matrix, row_XK[x : x + 1])
            raise

    def _multiply(self, slots: Sequence[int], matrix: str, row_XK: Floats) -> Floats:
        form, parts_of = self._store.format, self._parts_of[matrix]
        roles, (rows, _) = list(parts_of), form.stored_shape(next(iter(parts_of)))  # gate and up are of one shape
        starts = {
            ending: self._landing.starts(slots, [parts_of[role][ending] for role in roles])
            for ending in parts_of[roles[0]]
        }
        found = form.numbers.multiply(self._landing.memory, starts, np.tile(row_XK, (len(roles), 1)), rows=rows)
        return found.reshape(len(roles), -1, rows).swapaxes(0, 1).reshape(len(slots), -1)

    @contextmanager
    def _told(self, slot: int) -> Iterator[None]:
        """What is wrong with stored numbers, by whose they are."""
        try:
            yield
        except ValueError as error:
            layer, expert = self._held[slot]
            raise UserError(f"layer {layer} expert {expert}: {error}; {AGAIN}") from error

    def _packed(self, place: int, matrix: str) -> list[tuple[dict[str, Bytes], slice]]:
        """What lies in a place of the records that are read into, role by role, and which rows of the matrix it is."""
        where = self._landing.place_of(place), matrix
        if where not in self._packed_views:
            row, found = 0, []
            for role, parts in self._parts_of[matrix].items():
                stored = {ending: self._landing.part(place, name) for ending, name in parts.items()}
                found.append((stored, slice(row, row := row + self._store.format.stored_shape(role)[0])))
            self._packed_views[where] = found
        return self._packed_views[where]

    @cached_property
    def _parts_of(self) -> dict[str, dict[str, dict[str, str]]]:
        """The parts that each matrix is stored as, by role and by how the names of tensors end."""
        form, found = self._store.format, dict[str, dict[str, dict[str, str]]]()
        for role in form.roles:
            parts = {part.ending: name for name, part in form.parts.items() if part.role == role}
            found.setdefault("down" if role == "down" else "gate_up", {})[role] = parts
        return found


class _Records:
    """Raw records and the matrices in them as views."""

    def __init__(
        self, record: Record | StoredRecord, dtype: torch.dtype, slots: int, allocate: Callable[[int], Block]
    ) -> None:
        self._dtype, self._record, self.record_bytes = dtype, record, record.total_bytes
        self.total_bytes = slots * self.record_bytes
        with torch.inference_mode(False):  # or nothing could be written outside of it, see `matrix`
            self._raw, self._release = allocate(self.total_bytes)
        self.leads = [NO_LEADS] * slots
        self._place = list(range(slots))  # of each slot
        self._matrices: dict[tuple[int, str, Leads], torch.Tensor] = {}  # views, which take longer to make than to use

    @cached_property
    def memory(self) -> Bytes:
        """All of it."""
        return self._raw.numpy()

    def matrix(self, slot: int, role: str) -> torch.Tensor:
        """A matrix of the expert in `slot` as the right-hand side of a product: [H, J] or [I, H]."""
        assert isinstance(self._record, Record), "what lies as it is stored is decoded"
        where = self._place[slot], role, self.leads[slot]
        if where not in self._matrices:
            start, length = self._record.place(role, self.leads[slot])
            start += self._place[slot] * self.record_bytes
            with torch.inference_mode(False):
                matrix = self._raw[start : start + length].view(self._dtype).view(self._record.format.shape(role))
                self._matrices[where] = matrix if self._record.format.transposed else matrix.T
        return self._matrices[where]

    def place_of(self, slot: int) -> int:
        """Where a slot lies, counted in records."""
        return self._place[slot]

    def part(self, slot: int, part: str) -> Bytes:
        """What is stored of the expert in `slot`, and in which part."""
        start, length = self._record.place(part, NO_LEADS)
        start += self._place[slot] * self.record_bytes
        return self.memory[start : start + length]

    def starts(self, slots: Sequence[int], parts: Sequence[str]) -> Places:
        """[parts x slots]: where in the memory each part of each expert begins."""
        records, place = [self._place[slot] * self.record_bytes for slot in slots], self._record.place
        return np.array([place(part, NO_LEADS)[0] + record for part in parts for record in records])

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
            for part in extent.parts:
                start, length = self._record.place(part, leads)
                start += self._place[slot] * self.record_bytes
                if start == target_end:
                    first = spans.pop()
                    start, offset = target_end - len(first.target), first.offset
                    length += len(first.target)
                target_end = start + length
                spans.append(Span(extent.shard, offset, self.memory[start:target_end]))
                offset += length
        return spans

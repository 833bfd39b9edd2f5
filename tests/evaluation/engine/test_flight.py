"""What is read is handed on as soon as it has landed, together with whatever else has."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.engine.cache.policies import Key
from evaluation.engine.flight import Flight
from evaluation.engine.slot_memory import SlotMemory
from evaluation.engine.store.experts import ExpertStore
from evaluation.engine.store.reader import Reader

Checkpoint = Callable[..., Path]
STAYING: dict[Key, int | None] = {(1, 2): 0, (1, 3): 1, (1, 5): 2}
PASSING: dict[Key, int | None] = dict.fromkeys([(1, 0), (1, 4), (1, 6)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_has_landed_comes_together_and_passing_slots_hold_until_the_next(
    checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    """But for what is converted, of which one passes at a time."""
    store = ExpertStore(checkpoint("olmoe"))
    with Reader(store.shards) as reader:
        memory = SlotMemory(store, 3, dtype, passing=2)
        with Flight(memory, reader, layer_id=1) as flight:
            flight.start(STAYING)
            flight.start(PASSING)
            found: dict[Key, int] = {}
            sizes = []
            under_way = 2 if memory.converts else 5
            while flight._landed.qsize() < under_way:
                time.sleep(0.01)
            for landed in flight.landings():
                sizes.append(len(landed))
                for (layer, expert), slot in landed.items():
                    gate = memory.matrix(slot, "gate_up")[:, : store.format.intermediate]
                    span = memory.spans(slot, layer, expert)[0] if not memory.converts else None
                    if span is not None:
                        held = np.fromfile(span.shard, np.uint8, len(span.target), offset=span.offset)
                        assert np.array_equal(span.target, held), expert
                    assert gate.isfinite().all()
                found |= landed
            assert found.keys() == {*STAYING, *PASSING}
            assert all(found[key] == slot for key, slot in STAYING.items())
    assert sizes == [1] * 6 if memory.converts else sizes[0] == 5, sizes

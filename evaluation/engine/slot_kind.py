"""What slots hold of quantised experts: their bytes as they are stored, or matrices that are ready to multiply by.

As stored a slot is two to four times smaller, so more experts stay, and every use costs decoding. Which is faster depends on
the budget, on the device that is read and on the processor; it is worked out from what both were measured to do.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from configs.load import UserError
from evaluation.engine.device import Device
from evaluation.engine.memory.demand import Demand
from evaluation.engine.options import PACKED, EngineOptions
from evaluation.engine.slot_memory import SlotMemory
from evaluation.engine.store.bandwidth import calibrated, is_worth_it
from evaluation.engine.store.experts import ExpertStore
from training.model.expert_format import MATRICES

STORED, READY = "stored", "ready"
NOMINAL_RATE = 2**30
"""Bytes per second that are assumed of a device where the checkpoint is too small to measure it."""
TRIES = 3


def possible_kinds(options: EngineOptions, store: ExpertStore, device: Device) -> tuple[str, ...]:
    """What slots may hold; a `UserError` if what is asked for cannot be."""
    asked = STORED if options.products == PACKED else options.slots
    decodes_here = store.format.is_quantised and device.reads_into_slots
    if asked == STORED and not decodes_here:
        why = "they are decoded on the processor" if store.format.is_quantised else "its experts are not quantised"
        products = ", products=exact" if options.products == PACKED else ""
        raise UserError(
            f"{store.model_dir}: slots cannot hold experts as they are stored: {why}; write slots=ready{products}"
        )
    if not decodes_here:
        return (READY,)
    return (STORED, READY) if asked == "auto" else (asked,)


@dataclass(frozen=True)
class Rates:
    """Seconds that one expert takes."""

    read: float
    decode: float

    @classmethod
    def measured(cls, store: ExpertStore, dtype: torch.dtype) -> "Rates":
        """By the device's calibration, and by decoding bytes that are like an expert's."""
        memory = SlotMemory(store, 1, dtype, as_stored=True)
        for span in memory.spans(0, *next(iter(store.keys))):
            span.target[:] = 0x3F  # all of them are numbers, whatever they are read as
        tries = []
        for _ in range(1 + TRIES):  # the first one compiles
            started = time.perf_counter()
            for matrix in MATRICES:
                memory.matrix(0, matrix)
            tries.append(time.perf_counter() - started)
        rate = calibrated(store.shards).bytes_per_second if is_worth_it(store.shards) else NOMINAL_RATE
        return cls(store.format.expert_bytes / rate, min(tries[1:]))

    def token_seconds(self, kind: str, slots: int, demand: Demand) -> float:
        """What a token's experts cost beside their products, if each is as likely to be resident as any other."""
        missing = 1 - min(1.0, slots / demand.all_experts)
        decoded = 1.0 if kind == STORED else missing
        return demand.token_experts * (missing * self.read + decoded * self.decode)


def fastest(
    slots: Mapping[str, int], demands: Mapping[str, Demand], store: ExpertStore, dtype: torch.dtype, *, scope: str
) -> str:
    """The kind under which a token takes least, of these with so many slots of a pool."""
    rates = Rates.measured(store, dtype)
    pools = {kind: 1 if scope == "global" else demand.layers for kind, demand in demands.items()}
    return min(slots, key=lambda kind: rates.token_seconds(kind, slots[kind] * pools[kind], demands[kind]))

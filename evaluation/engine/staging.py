"""How an expert that was read gets into its slot when it cannot be read there: another precision, or another device.

On an accelerator the copies run on a stream of their own, beside the products: a copy waits for the last product that used
its slot, the next products wait for the copy, and what was read is not overwritten before it was copied. On the CPU
copies are done when they return.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from evaluation.engine.device import CPU


class Staging:
    """Ordered copies from landing records to slots."""

    def __init__(self, device: torch.device) -> None:
        self._stream = None
        if device.type != CPU.type:
            self._stream = torch.Stream(device)
            self._stream.wait_event(torch.accelerator.current_stream().record_event())  # whoever had the memory before
        self._used: dict[int, torch.Event] = {}  # slot -> its last product
        self._copied: dict[int, torch.Event] = {}  # passing slot -> its last copy

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], *, passing_slot: int, slot: int) -> None:
        """Copy each (into, from), which lie in `slot` and were read into `passing_slot`."""
        if self._stream is None:
            for into, source in pairs:
                into.copy_(source)
            return
        with self._stream:
            if slot in self._used:
                self._stream.wait_event(self._used[slot])
            for into, source in pairs:
                into.copy_(source, non_blocking=True)
            self._copied[passing_slot] = self._stream.record_event()
        torch.accelerator.current_stream().wait_event(self._copied[passing_slot])

    def used(self, slot: int) -> None:
        """The products that were asked for last are with what lies in `slot`."""
        if self._stream is not None:
            self._used[slot] = torch.accelerator.current_stream().record_event()

    def wait(self, passing_slot: int) -> None:
        """Return when `passing_slot` may be read into."""
        if passing_slot in self._copied:
            self._copied.pop(passing_slot).synchronize()

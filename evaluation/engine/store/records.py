"""What a slot is, where an expert lies in it: two matrices in the precision that is computed in, or the parts as they are stored.

Numbers only; no files, no torch.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from training.model.expert_format import ExpertFormat

ALIGN_BYTES = 64


class Leads(NamedTuple):
    """Bytes between a 64-byte boundary and the start of an expert's matrices."""

    down: int = 0
    gate_up: int = 0


NO_LEADS = Leads()


@dataclass(frozen=True)
class Record:
    """Where an expert lies in its slot: [down | gate | up], of which gate followed by up is the matrix `gate_up`.

    In fp32 the last bits of a product depend on where its matrix starts (torch 2.13 on x86), so matrices start as far off a
    64-byte boundary as they do in the resident model.
    """

    format: ExpertFormat
    itemsize: int  # of the precision that the slot is in
    slack_bytes: int  # before each matrix, where some expert does not start on a boundary

    @property
    def matrix_bytes(self) -> int:
        """Bytes of down, of gate and of up."""
        return self.format.hidden * self.format.intermediate * self.itemsize

    @property
    def gate_up_start(self) -> int:
        return _aligned(self.matrix_bytes + self.slack_bytes)

    @property
    def total_bytes(self) -> int:
        """What one slot takes."""
        return self.gate_up_start + _aligned(2 * self.matrix_bytes + self.slack_bytes)

    def place(self, role: str, leads: Leads) -> tuple[int, int]:
        """Where in a record a role or matrix starts, and its length."""
        down, gate_up = leads.down, self.gate_up_start + leads.gate_up
        return {
            "down": (down, self.matrix_bytes),
            "gate": (gate_up, self.matrix_bytes),
            "up": (gate_up + self.matrix_bytes, self.matrix_bytes),
            "gate_up": (gate_up, 2 * self.matrix_bytes),
        }[role]


@dataclass(frozen=True)
class StoredRecord:
    """Where an expert lies in its slot if it stays as it is stored: its parts one after the other, each on a boundary."""

    format: ExpertFormat

    @cached_property
    def _starts(self) -> dict[str, int]:
        starts, end = {}, 0
        for name, part in self.format.parts.items():
            starts[name] = end
            end += _aligned(part.stored.length_bytes)
        return starts

    @property
    def total_bytes(self) -> int:
        """What one slot takes."""
        return sum(_aligned(part.stored.length_bytes) for part in self.format.parts.values())

    def place(self, part: str, leads: Leads = NO_LEADS) -> tuple[int, int]:
        """Where in a record a part starts, and its length."""
        return self._starts[part], self.format.parts[part].stored.length_bytes


def _aligned(size_bytes: int) -> int:
    return math.ceil(size_bytes / ALIGN_BYTES) * ALIGN_BYTES

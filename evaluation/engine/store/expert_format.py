"""What an expert is, on disk and in a slot: one description for all experts of a checkpoint. Numbers only; no files, no torch.

Roles are the matrices that an expert is stored as, whatever a family calls them: `gate` and `up` [I, H] (or `gate_up`, both in
one) and `down` [H, I] (I intermediate, H hidden); a transposed family (gpt-oss) computes with `gate_up` [H, 2 I] and `down`
[I, H]. How the numbers of a matrix are stored, `training/model/number_formats/` knows: as one tensor or several, which are the
parts of an expert. A slot holds two matrices, `down` and `gate_up`, in the precision that is computed in, or the parts.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from training.model.number_formats.formats import NumberFormat, Stored

SEPARATE = ("gate", "up", "down")
FUSED = ("gate_up", "down")
MATRICES = FUSED
"""What is computed with."""
ALIGN_BYTES = 64


class Leads(NamedTuple):
    """Bytes between a 64-byte boundary and the start of an expert's matrices."""

    down: int = 0
    gate_up: int = 0


NO_LEADS = Leads()


class Part(NamedTuple):
    """One stored tensor of an expert."""

    role: str
    ending: str  # of its name, by which its format knows it
    stored: Stored


@dataclass(frozen=True)
class ExpertFormat:
    """What all experts of a checkpoint have in common."""

    hidden: int
    intermediate: int
    numbers: NumberFormat
    roles: tuple[str, ...] = SEPARATE  # what an expert is stored as: SEPARATE or FUSED
    transposed: bool = False  # in the model

    def shape(self, role: str) -> tuple[int, int]:
        """Rows and columns of one of an expert's matrices, as the model has it."""
        rows = {"down": self.hidden, "gate_up": 2 * self.intermediate}.get(role, self.intermediate)
        columns = self.intermediate if role == "down" else self.hidden
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def is_quantised(self) -> bool:
        """Whether numbers are decoded before anything is computed with them."""
        return self.numbers.method is not None

    def stored_shape(self, role: str) -> tuple[int, int]:
        """Rows and columns of one of an expert's matrices, as it is stored: packed numbers lie output by output."""
        return self.shape(role)[::-1] if self.transposed and self.is_quantised else self.shape(role)

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Name -> what is stored: a role, and how the name of the tensor ends. A `ValueError` if it cannot be stored so."""
        found = {}
        for role in self.roles:
            for ending, stored in self.numbers.tensors(*self.stored_shape(role)).items():
                found[role + ending] = Part(role, ending, stored)
        return found

    @property
    def expert_bytes(self) -> int:
        """Stored bytes of one expert."""
        return sum(part.stored.length_bytes for part in self.parts.values())

    def parts_of(self, matrix: str) -> list[str]:
        """What is stored of one of the matrices that are computed with."""
        return [name for name, part in self.parts.items() if (part.role == "down") == (matrix == "down")]


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

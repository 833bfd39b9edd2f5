"""What an expert is, on disk and in a slot: one description for all experts of a checkpoint. Numbers only; no files, no torch.

Roles are what an expert is stored as, whatever a family calls it: `gate` and `up` [I, H] (or `gate_up`, both in one) and
`down` [H, I] (I intermediate, H hidden); a transposed family (gpt-oss) has `gate_up` [H, 2 I] and `down` [I, H]. A slot holds
two matrices, `down` and `gate_up`, in the precision that is computed in. Matrices of 16- and 32-bit numbers need nothing but
a cast on the way; a format that packs its numbers is another class like this one and another form in
`expert_layout.py`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

SEPARATE = ("gate", "up", "down")
FUSED = ("gate_up", "down")
MATRICES = FUSED
"""What a slot holds."""
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
ALIGN_BYTES = 64


class Leads(NamedTuple):
    """Bytes between a 64-byte boundary and the start of an expert's matrices."""

    down: int = 0
    gate_up: int = 0


NO_LEADS = Leads()


@dataclass(frozen=True)
class ExpertFormat:
    """What all experts of a checkpoint have in common."""

    hidden: int
    intermediate: int
    dtype: str  # as stored, spelled as in safetensors
    roles: tuple[str, ...] = SEPARATE  # what an expert is stored as: SEPARATE or FUSED
    transposed: bool = False

    def shape(self, role: str) -> tuple[int, int]:
        """Rows and columns of one of an expert's matrices."""
        rows = {"down": self.hidden, "gate_up": 2 * self.intermediate}.get(role, self.intermediate)
        columns = self.intermediate if role == "down" else self.hidden
        return (columns, rows) if self.transposed else (rows, columns)

    def role_bytes(self, role: str) -> int:
        """Stored bytes of one of an expert's matrices."""
        return math.prod(self.shape(role)) * DTYPE_BYTES[self.dtype]

    @property
    def expert_bytes(self) -> int:
        """Stored bytes of one expert."""
        return sum(self.role_bytes(role) for role in self.roles)

    def roles_of(self, matrix: str) -> list[str]:
        """What is stored of one of the matrices of a slot."""
        return [role for role in self.roles if (role == "down") == (matrix == "down")]


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


def _aligned(size_bytes: int) -> int:
    return math.ceil(size_bytes / ALIGN_BYTES) * ALIGN_BYTES

"""What an expert is: one description for all experts of a checkpoint. Numbers only; no files.

Roles are the matrices that an expert is stored as, whatever a family calls them: `gate` and `up` [I, H] (or `gate_up`, both in
one) and `down` [H, I] (I intermediate, H hidden); a transposed family (gpt-oss) computes with `gate_up` [H, 2 I] and `down`
[I, H]. How the numbers of a matrix are stored, `training/model/number_formats/` knows: as one tensor or several, which are the
parts of an expert.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from training.model.number_formats.formats import NumberFormat, Stored

SEPARATE = ("gate", "up", "down")
FUSED = ("gate_up", "down")
MATRICES = FUSED
"""What is computed with."""


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

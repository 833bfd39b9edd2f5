"""Accesses and misses by phase and layer, counted alike by the live engine and by the replay."""

from dataclasses import dataclass

PREFILL, DECODE = 0, 1
PHASES = ("prefill", "decode")
"""Names of the phases; their positions are the codes in traces and counters."""


@dataclass(slots=True)
class Counts:
    """Expert accesses of one layer and phase; an access is one distinct expert of one event."""

    accesses: int = 0
    misses: int = 0
    first_touches: int = 0  # misses on experts that had not been used since the cache was last empty

    @property
    def hit_rate(self) -> float | None:
        """Share of accesses that were resident before their event, 0 to 1; None without accesses."""
        return 1 - self.misses / self.accesses if self.accesses else None

    @property
    def misses_without_first_touches(self) -> int:
        return self.misses - self.first_touches

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.accesses + other.accesses, self.misses + other.misses, self.first_touches + other.first_touches
        )


class CacheCounts:
    """`Counts` by phase and layer."""

    def __init__(self, layers: int) -> None:
        self.cells = [[Counts() for _ in range(layers)] for _ in PHASES]

    def add(self, phase: int, layer: int, accesses: int, misses: int, first_touches: int) -> None:
        """Count one event of `layer` (position among the MoE layers)."""
        cell = self.cells[phase][layer]
        cell.accesses += accesses
        cell.misses += misses
        cell.first_touches += first_touches

    def total(self, phase: int | None = None) -> Counts:
        """Sum over the layers, of one phase or of both."""
        rows = self.cells if phase is None else [self.cells[phase]]
        return sum((cell for row in rows for cell in row), Counts())

    def by_layer(self) -> list[Counts]:
        """Sum over the phases, one entry per MoE layer."""
        return [sum(column, Counts()) for column in zip(*self.cells, strict=True)]

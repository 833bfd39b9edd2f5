"""Comparing times fairly: sides take turns, and what is compared is the ratio within a pair that was measured side by side.

A machine is quicker in one minute than in another. Turns make that fall on all sides alike, and the median of paired
ratios does not follow the few pairs that something else disturbed. Nothing is measured here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from scipy.stats import binom

CONFIDENCE = 0.95
Side = TypeVar("Side")


def in_turn(sides: Sequence[Side], turn: int) -> Sequence[Side]:
    """The order of the sides in this turn, counted from 0: forwards, then backwards, so that none is always first."""
    return sides[::-1] if turn % 2 else sides


@dataclass(frozen=True)
class Extent:
    """The median of `n` measured values, the least and the most of them."""

    median: float
    least: float
    most: float
    n: int


@dataclass(frozen=True)
class PairedRatio:
    """The median of `n` ratios and the 95 % interval of that median; too few pairs give no interval."""

    median: float
    low: float | None
    high: float | None
    n: int

    @property
    def shows(self) -> bool:
        """Whether the interval excludes 1, that is "no difference"."""
        return self.low is not None and self.high is not None and (self.low > 1 or self.high < 1)


def extent(values: Iterable[float | None]) -> Extent | None:
    """Median and extremes of what was measured; None if nothing was."""
    known = [value for value in values if value is not None]
    return Extent(median(known), min(known), max(known), len(known)) if known else None


def paired_ratio(values: Iterable[float | None], to: Iterable[float | None]) -> PairedRatio | None:
    """The ratios of `values` to the values of `to` at the same places, which were measured in the same turn.

    A pair of which one was not measured, or whose second is 0, is left out; None if that leaves none.
    """
    pairs = zip(values, to, strict=True)
    ratios = sorted(value / other for value, other in pairs if value is not None and other)
    if not ratios:
        return None
    outside = _outside_interval(len(ratios))
    low, high = (ratios[outside], ratios[-1 - outside]) if outside >= 0 else (None, None)
    return PairedRatio(median(ratios), low, high, len(ratios))


def _outside_interval(n: int) -> int:
    """How many of `n` sorted values lie on each side of the interval of their median; -1 if all n are too few.

    The median of the distribution is below the k-th value with the probability of fewer than k heads in n tosses,
    whatever the distribution (order statistics; Conover, Practical Nonparametric Statistics, 3rd ed., section 3.2).
    """
    return int(binom.ppf((1 - CONFIDENCE) / 2, n, 0.5)) - 1

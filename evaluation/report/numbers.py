"""How numbers are written: digits, units, signs, spreads. What they mean is said elsewhere."""

from dataclasses import dataclass, replace

from configs.sizes import UNIT_BYTES, size_unit
from evaluation.report.summary import Change, SeedMean
from evaluation.turns import Extent

MISSING = "–"  # what was not measured
SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit


@dataclass(frozen=True)
class Unit:
    """How one kind of number is written."""

    scale: float = 1.0
    digits: int = 0
    suffix: str = ""
    signed: bool = False

    def text(self, value: float | None) -> str:
        return MISSING if value is None else self.bare(value) + self.suffix

    def over_seeds(self, value: SeedMean | None) -> str:
        """`12.3 ± 0.4 %`; without the deviation for a single seed."""
        if value is None:
            return MISSING
        if value.sd is None or (value.sd == 0 and self.digits == 0):  # a count that is the same for all seeds
            return self.text(value.mean)
        return f"{self.bare(value.mean)}{SPACE}±{SPACE}{replace(self, signed=False).text(value.sd)}"

    def change(self, value: Change | None) -> str:
        """`−1.2 ± 0.3 %`, on a second line its interval."""
        if value is None:
            return MISSING
        if value.low is None or value.high is None:
            return self.over_seeds(value.value)
        return f"{self.over_seeds(value.value)}\n[{self.bare(value.low)}, {self.bare(value.high)}]"

    def extent(self, value: Extent | None) -> str:
        """`12.3 ms`, the median, on a second line `11.0 to 14.5`."""
        if value is None:
            return MISSING
        return f"{self.text(value.median)}\n{self.bare(value.least)} to {self.bare(value.most)}"

    def bare(self, value: float) -> str:
        """Without the unit."""
        scaled = round(value * self.scale, self.digits) + 0.0  # no minus before a zero
        return f"{scaled:{'+' if self.signed and scaled else ''},.{self.digits}f}".replace("-", "−")


COUNT = Unit()
RATE = Unit(digits=3)
PLAIN = Unit(digits=2)
PLAIN_CHANGE = Unit(digits=2, signed=True)
PERCENT = Unit(scale=100, digits=1, suffix=f"{SPACE}%")
CHANGE = Unit(scale=100, digits=1, suffix=f"{SPACE}%", signed=True)
FINE_CHANGE = Unit(scale=100, digits=2, suffix=f"{SPACE}%", signed=True)
POINTS = Unit(scale=100, digits=1, suffix=f"{SPACE}pt", signed=True)
MILLISECONDS = Unit(digits=1, suffix=f"{SPACE}ms")
SECONDS = Unit(digits=0, suffix=f"{SPACE}s")


def data_size(like: float | None) -> Unit:
    """The binary unit that suits a number of bytes, three digits of it."""
    name = size_unit(like or 0)
    scaled = abs(like or 0) / UNIT_BYTES[name]
    digits = 0 if name == "B" or scaled >= 100 else 1 if scaled >= 10 else 2
    return Unit(scale=1 / UNIT_BYTES[name], digits=digits, suffix=SPACE + name)


def bytes_text(value: SeedMean | float | None) -> str:
    """A number of bytes in the unit that suits it."""
    if isinstance(value, SeedMean):
        return data_size(value.mean).over_seeds(value)
    return data_size(value).text(value)


def demands_text(demands: float | None) -> str:
    """A cache size in multiples of what one token asks for."""
    return MISSING if demands is None else f"{demands:.3g}×"

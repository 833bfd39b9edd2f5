"""What is chosen of a frontier: at each price the combination that saves most, by the texts that are there to choose by.

What is reported of a choice comes from other texts: of many points measured on the same ones the best would look too good.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from evaluation.engine.levers.drop import Drop
from evaluation.engine.levers.prior import Prior
from evaluation.engine.levers.spec import levers_of
from evaluation.frontier.result import NO_LEVER, Choice, Combination, Point

ANY = ", any lever"
"""What is compared of all levers together, where there are several kinds."""


def kinds(points: Iterable[Point]) -> dict[str, list[Point]]:
    """What is compared with what: levers alone, routers alone, both."""
    found: dict[str, list[Point]] = {}
    for point in points:
        levered = [] if point.lever == NO_LEVER else [f", {_kind_of(point.lever)}", ANY]
        for beside in levered or [""]:
            found.setdefault(f"{point.arm}{beside}", []).append(point)
    kinds_of_arm = Counter(name.split(", ")[0] for name in found if ", " in name)
    return {
        name: of for name, of in found.items() if not name.endswith(ANY) or kinds_of_arm[name.removesuffix(ANY)] > 2
    }


def _kind_of(lever: str) -> str:
    return " and ".join("dropping" if isinstance(one, Drop) else _kind_of_prior(one) for one in levers_of(lever))


def _kind_of_prior(prior: Prior) -> str:
    by_layer = " by layer" if isinstance(prior.delta, tuple) else ""
    return f"prior in {prior.space}{by_layer}{' with bounds' if prior.is_bounded else ''}"


def best(points: Iterable[Point], *, gate: float) -> Point | None:
    """The one that saves most loads of those within the price, both on the texts that are chosen by."""
    within = [point for point in points if point.chosen_by.cost.value <= gate]
    return max(within, key=lambda point: point.chosen_by.fewer.value, default=None)


def choices(points: Sequence[Point], gates: Sequence[float]) -> list[Choice]:
    """For each size and kind the best at every price."""
    found = []
    for slots in dict.fromkeys(point.slots for point in points):
        of_size = kinds(point for point in points if point.slots == slots)
        found += [
            Choice(kind=kind, gate=gate, slots=slots, point=best(of_kind, gate=gate))
            for kind, of_kind in of_size.items()
            for gate in gates
        ]
    return found


def priced(found: Iterable[Choice], gates: Sequence[float]) -> list[Combination]:
    """What was chosen at these prices, each once."""
    points = [choice.point for choice in found if choice.point is not None and choice.gate in gates]
    return list(dict.fromkeys(point.combination for point in points))


def pareto(points: Iterable[Point]) -> list[Point]:
    """Those that no other beats in both, on the texts that are chosen by; the cheapest first."""
    line: list[Point] = []
    for point in sorted(points, key=lambda point: (point.chosen_by.cost.value, -point.chosen_by.fewer.value)):
        if not line or point.chosen_by.fewer.value > line[-1].chosen_by.fewer.value:
            line.append(point)
    return line

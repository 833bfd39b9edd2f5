"""What the page of a frontier shows: the picture of quality against loads, what is best at each price, what adds what.

Only presents: every number is in the result. `templates/frontier.yaml` has what it says whatever the result is.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from configs.sizes import size_text
from evaluation.frontier.result import NO_LEVER, UNTOUCHED, Choice, FrontierResult, Interval, Point, Price
from evaluation.report import drawing
from evaluation.report.numbers import FINE_CHANGE, MISSING, PERCENT, PLAIN, POINTS, Unit
from evaluation.report.sections import Section
from evaluation.report.tables import Table
from evaluation.results import BASE

PROSE = yaml.safe_load((drawing.TEMPLATES / "frontier.yaml").read_text(encoding="utf-8"))
GATE_FEWER, GATE_COST = 0.3, 0.01
"""What is asked for in public and was met by nobody: at least so many fewer loads for at most so much perplexity."""
STYLES: Mapping[str, Any] = {"lru": (0, (4, 2.5))}
APART = " *"


def frontier_contents(found: FrontierResult) -> dict[str, Any]:
    """What the templates of a page are filled with."""
    first, *rest = [frontier_table(found, slots) for slots in _sizes(found)]
    return {
        "title": PROSE["title"],
        "subtitle": f"{found.model} · {', '.join(map(str, _sizes(found)))} slots a layer, {found.scope.replace('_', ' ')}",
        "headline": gate_sentence(found),
        "headline_table": first,
        "page": "frontier.html",
        "sections": frontier_sections(found, further=rest),
        "reproduction": Table(
            "How to reproduce", ["what", "value"],
            [
                ["command", found.reproduce.command or MISSING],
                ["commit", found.reproduce.commit or MISSING],
                *([name.replace("_", " "), str(value)] for name, value in found.reproduce.machine.items()),
            ],
            text_columns=2,
        ),
        "config": yaml.safe_dump(found.reproduce.config, sort_keys=False, allow_unicode=True),
        "definitions": PROSE["definitions"],
    }  # fmt: skip


def frontier_sections(found: FrontierResult, *, further: Sequence[Table] = ()) -> list[Section]:
    """The picture; what adds what; prices beside perplexity; every point."""
    words = PROSE["sections"]
    shown: dict[str, dict[str, Any]] = {
        "frontier": {"figure": lambda _: frontier_figure(found), "tables": further, "folded": [_points_table(found)]},
        "parts": {"tables": [_parts_table(found)]},
        "prices": {"tables": [_writing_table(found), _tasks_table(found)]},
    }
    return [Section(**words[name], **shown[name]) for name in words]


def report_sections(found: FrontierResult) -> list[Section]:
    """What the report of a run shows of its frontier."""
    picture, parts, prices = frontier_sections(found)
    tables = [frontier_table(found, slots) for slots in _sizes(found)]
    lead = f"{gate_sentence(found)} {picture.lead}"
    return [replace(picture, title=PROSE["title"], lead=lead, tables=[*tables, *parts.tables, *prices.tables])]


def gate_sentence(found: FrontierResult) -> str:
    """The best within the public gate's price, and whether it or what was chosen at a lower price meets the gate."""
    best = [_best_at(found, gate) for gate in sorted(found.gates, reverse=True) if gate <= GATE_COST]
    points = [point for point in best if point is not None]
    if not points:
        return f"Nothing that was measured costs at most {FINE_CHANGE.text(GATE_COST)} perplexity on the texts to choose by."
    met = [(_meets(point, by_intervals=True), _meets(point, by_intervals=False), point) for point in points]
    surely, hardly = ([one for one in met if one[place]] for place in (0, 1))
    verdict, by = ("is missed", points[0])
    if hardly:
        verdict, by = "is met by the numbers and not by their intervals", hardly[0][2]
    if surely:
        verdict, by = "is met, intervals included", surely[0][2]
    shown = "" if by is points[0] else f": {_saves(by)}"
    return (
        f"{_saves(points[0])}. The gate of at least {PERCENT.text(GATE_FEWER)} fewer at most {FINE_CHANGE.text(GATE_COST)} "
        f"{verdict}{shown}."
    )


def _best_at(found: FrontierResult, gate: float) -> Point | None:
    within = [choice.point for choice in found.chosen if choice.gate == gate and choice.point is not None]
    return max(within, key=lambda point: point.chosen_by.fewer.value, default=None)


def _meets(point: Point, *, by_intervals: bool) -> bool:
    fewer, cost = point.reported.fewer, point.reported.cost
    if by_intervals:
        return fewer.low >= GATE_FEWER and cost.high <= GATE_COST
    return fewer.value >= GATE_FEWER and cost.value <= GATE_COST


def _saves(point: Point) -> str:
    fewer, cost = point.reported.fewer, point.reported.cost
    return (
        f"{with_interval(fewer, PERCENT)} fewer expert loads at {with_interval(cost, FINE_CHANGE)} perplexity "
        f"({describe(point)}, {point.slots} slots a layer)"
    )


def describe(point: Point) -> str:
    """Routers, lever and policy in a few words."""
    routers = "untouched routers" if point.arm == UNTOUCHED else f"routers of {point.arm}"
    lever = "no lever" if point.lever == NO_LEVER else point.lever
    return f"{routers}, {lever}, {point.policy}"


def frontier_table(found: FrontierResult, slots: int) -> Table:
    """Kinds x prices: loads saved, the price that was really paid, and with what."""
    chosen = [choice for choice in found.chosen if choice.slots == slots]
    header = ["", *(f"at most\n{FINE_CHANGE.text(gate)}" for gate in found.gates)]
    rows = [
        [kind, *(_cell(choice, found) for choice in chosen if choice.kind == kind)]
        for kind in dict.fromkeys(choice.kind for choice in chosen)
    ]
    note = (
        "Fewer expert loads than the untouched model with LRU; below, what it costs in perplexity, with what and which "
        "policy. In brackets 95 % intervals over texts. Chosen on other texts than these. A star: more than the untouched "
        "model saves with its best lever at this price, intervals apart."
    )
    return Table(f"Fewer loads with {slots} slots a layer", header, rows, note)


def _cell(choice: Choice, found: FrontierResult) -> str:
    if choice.point is None:
        return MISSING
    point, measured = choice.point, choice.point.reported
    star = APART * (point.arm != UNTOUCHED and _is_apart(choice, found))
    return "\n".join([
        with_interval(measured.fewer, PERCENT) + star, with_interval(measured.cost, FINE_CHANGE), f"{point.lever}, {point.policy}"
    ])  # fmt: skip


def _is_apart(choice: Choice, found: FrontierResult) -> bool:
    """Whether this saves more than whatever the untouched model saves at this price, intervals apart."""
    assert choice.point is not None
    others = [
        other.point.reported.fewer.high
        for other in found.chosen
        if other.point is not None
        and (other.gate, other.slots, other.point.arm) == (choice.gate, choice.slots, UNTOUCHED)
    ]
    return bool(others) and choice.point.reported.fewer.low > max(others)


def _parts_table(found: FrontierResult) -> Table:
    """At each price the best with and without each part."""
    rows = []
    for slots, gate in itertools.product(_sizes(found), found.gates):
        chosen = [c.point for c in found.chosen if c.slots == slots and c.gate == gate and c.point is not None]
        for arm in dict.fromkeys(point.arm for point in found.points):
            own = [point for point in chosen if point.arm == arm]
            without = _saved([point for point in own if point.lever == NO_LEVER])
            best = _saved([point for point in own if point.lever != NO_LEVER])
            added = None if without is None or best is None else best - without
            price = f"{FINE_CHANGE.text(gate)}, {slots} slots"
            rows.append([price, arm, PERCENT.text(without), PERCENT.text(best), POINTS.text(added)])
    note = "The best policy for each; the untouched model with LRU would be 0 %."
    return Table(
        "What the lever adds",
        ["at most", "routers", "without a lever", "with the best", "the lever adds"],
        rows,
        note,
        2,
    )


def _saved(points: Sequence[Point]) -> float | None:
    """What the one saves that saves most on the texts to choose by."""
    best = max(points, key=lambda point: point.chosen_by.fewer.value, default=None)
    return None if best is None else best.reported.fewer.value


def _writing_table(found: FrontierResult) -> Table:
    """Prices in text that was written freely."""
    rows = [
        [
            _name(price), _given_cost(found, price), with_interval(price.written.cost, FINE_CHANGE),
            with_interval(price.written.kl_given, _MILLINATS), with_interval(price.written.kl, _MILLINATS),
            MISSING if price.written.ratio is None else with_interval(price.written.ratio, PLAIN),
            with_interval(price.written.same, _TOKENS),
        ]
        for price in found.prices if price.written is not None
    ]  # fmt: skip
    header = [
        "", "perplexity,\ngiven text", "perplexity of what\nit writes", "distance, given\n1/1000 nats a token",
        "distance, written\n1/1000 nats a token", "ratio", "tokens until\nthe first other one",
    ]  # fmt: skip
    return Table("In text that it writes itself", header, rows, PROSE["writing"])


_MILLINATS, _TOKENS = Unit(scale=1000, digits=1), Unit(digits=1)


def _name(price: Price) -> str:
    return f"{price.at.arm}\n{price.at.lever}, {price.at.policy}, {price.at.slots} slots"


def _given_cost(found: FrontierResult, price: Price) -> str:
    return next(with_interval(p.reported.cost, FINE_CHANGE) for p in found.points if p.combination == price.at)


def _tasks_table(found: FrontierResult) -> Table:
    """Tasks answered step by step, against the untouched model with LRU."""
    asked = [price for price in found.prices if price.tasks is not None]
    names = list(dict.fromkeys(name for price in asked if price.tasks for name in price.tasks.tasks))
    rows = []
    for price in asked:
        assert price.tasks is not None
        changes = [price.tasks.tasks.get(name) for name in names]
        rows.append([_name(price), *(_change(change) for change in changes)])
    return Table("In tasks", ["", *names], rows if names else [], PROSE["tasks"])


def _change(change: Any) -> str:
    if change is None or change.difference is None:
        return MISSING
    if change.low is None:
        return POINTS.text(change.difference)
    return f"{POINTS.text(change.difference)}\n[{POINTS.bare(change.low)}, {POINTS.bare(change.high)}]"


def _points_table(found: FrontierResult) -> Table:
    on_line = set(found.pareto)
    rows = [
        [
            point.arm, point.lever, point.policy, str(point.slots), with_interval(point.reported.fewer, PERCENT),
            with_interval(point.reported.cost, FINE_CHANGE), PLAIN.text(point.reported.loads_per_token),
            MISSING if point.reported.bytes_per_token is None else size_text(round(point.reported.bytes_per_token)),
            PLAIN.text(point.reported.swapped_per_token), "yes" if point.combination in on_line else "",
        ]
        for point in found.points
    ]  # fmt: skip
    header = [
        "routers", "lever", "policy", "slots", "fewer loads", "perplexity", "loads\na token", "bytes\na token",
        "swaps\na token", "Pareto",
    ]  # fmt: skip
    return Table("Every point", header, rows, text_columns=3)


def with_interval(found: Interval, unit: Unit) -> str:
    """`12.3 % [11.0, 13.6]`."""
    return f"{unit.text(found.value)} [{unit.bare(found.low)}, {unit.bare(found.high)}]"


def _sizes(found: FrontierResult) -> list[int]:
    return list(dict.fromkeys(point.slots for point in found.points))


def frontier_figure(found: FrontierResult) -> str:
    """Quality against loads, a panel for each size of cache, as inline SVG."""
    return drawing.svg_of(
        lambda figure: _draw(figure, found), height_inches=5.2, label="Perplexity against expert loads"
    )


def write_frontier_picture(found: FrontierResult, path: Path) -> None:
    """The same as a PNG file."""
    drawing.write_png(lambda figure: _draw(figure, found), path, height_inches=4.6)


def _draw(figure: Figure, found: FrontierResult) -> None:
    panels = figure.subplots(1, len(_sizes(found)), squeeze=False, sharey=True)[0]
    looks = _looks(found)
    entries: dict[str, Line2D] = {}
    for axes, slots in zip(panels, _sizes(found), strict=True):
        for (arm, by_layer, policy), points in _lines(found, slots).items():
            label = f"{arm}, {policy}{', by layer' if by_layer else ''}"
            look = {**looks[arm], "linestyle": STYLES.get(policy, "-"), "linewidth": 1.4, "markersize": 5}
            if by_layer:
                look |= {"linestyle": "", "markerfacecolor": "white"}
            _errorbars(axes, points, look)
            entries[label] = Line2D([], [], **look)
        _published(axes, found)
        top = 100 * 1.25 * max(found.gates)
        axes.set(xlim=(0, 102), ylim=(-0.12 * top, top), xlabel="expert loads, % of the untouched model's with LRU")
        axes.axhline(0, color="#4d4d4d", linewidth=0.9)
        axes.axhline(100 * GATE_COST, color="#aa3333", linestyle=":", linewidth=1.2)
        if len(panels) > 1:
            axes.set_title(f"{slots} slots a layer")
    panels[0].set_ylabel("change of perplexity, %")
    published = Line2D([], [], color="#777777", marker="D", markerfacecolor="white", linestyle="")
    figure.legend(
        [*entries.values(), published], [*entries, "published, other models"], loc="outside upper left", ncols=3
    )


def _lines(found: FrontierResult, slots: int) -> dict[tuple[str, bool, str], list[Point]]:
    """Points that are joined: of one arm and policy, by rising strength."""
    lines: dict[tuple[str, bool, str], list[Point]] = {}
    for point in found.points:
        if point.slots == slots:
            lines.setdefault((point.arm, "/" in point.lever, point.policy), []).append(point)
    return {key: sorted(points, key=lambda p: p.reported.fewer.value) for key, points in lines.items()}


def _errorbars(axes: Axes, points: Sequence[Point], look: dict[str, Any]) -> None:
    at = [100 * (1 - point.reported.fewer.value) for point in points]
    costs = [100 * point.reported.cost.value for point in points]
    across, along = (
        [[100 * abs(i.value - bound(i)) for i in of_points] for bound in (lambda i: i.low, lambda i: i.high)]
        for of_points in ([p.reported.fewer for p in points], [p.reported.cost for p in points])
    )
    axes.errorbar(at, costs, xerr=across[::-1], yerr=along, elinewidth=0.8, capsize=1.5, **look)


def _published(axes: Axes, found: FrontierResult) -> None:
    """What others claim of other models, hollow."""
    for mark in PROSE["published"]:
        loads, cost = 100 - mark["fewer"], mark["cost"]
        if cost > 125 * max(found.gates):
            continue
        axes.plot([loads], [cost], color="#777777", marker="D", markerfacecolor="white", markersize=5, linestyle="")
        axes.annotate(
            mark["name"], (loads, cost), xytext=(5, 4), textcoords="offset points", fontsize=7.5, color="#666666"
        )


def _looks(found: FrontierResult) -> dict[str, dict[str, Any]]:
    arms = [arm for arm in dict.fromkeys(point.arm for point in found.points) if arm != UNTOUCHED]
    others = itertools.cycle(drawing.OTHER_COLOURS)
    looks = {UNTOUCHED: {"color": drawing.KNOWN_COLOURS[BASE], "marker": "o"}}
    for arm, marker in zip(arms, itertools.cycle(drawing.MARKERS[1:])):
        looks[arm] = {"color": drawing.KNOWN_COLOURS.get(arm) or next(others), "marker": marker}
    return looks

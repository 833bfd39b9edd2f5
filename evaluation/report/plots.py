"""The report's figures, each a function from results to inline SVG text, or None where nothing was measured."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from configs.load import UserError
from evaluation.report import drawing, summary
from evaluation.report.numbers import bytes_text, data_size, demands_text
from evaluation.report.summary import PERPLEXITY_LIMIT, Change, FrontierPoint, SeedMean, place_means, seed_mean
from evaluation.report.wording import LIMIT_TEXT
from evaluation.results import BASE, MEAN, Results, Run
from evaluation.turns import extent

SMOOTHING = 5  # records in the moving average of the training curves
DASHED: dict[str, Any] = {"linestyle": (0, (4, 2.5)), "marker": "", "linewidth": 1.2, "alpha": 0.75}
LIMIT: dict[str, Any] = {"color": "#aa3333", "linestyle": ":", "linewidth": 1.3}
LIMIT_ENTRY = (Line2D([], [], **LIMIT), f"limit of the mean, {LIMIT_TEXT}")
CHANCE: dict[str, Any] = {"color": "#222222", "linestyle": ":", "linewidth": 1.3}


def miss_rate_figure(results: Results) -> str | None:
    """Miss rate against slots per layer: LRU solid, at every size; Belady's optimum dashed; marks at the tables' sizes."""
    sizes, every_size = summary.replay_sizes(results), summary.lru_sizes(results)
    if not sizes:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for arm, look in drawing.looks_of(results).items():
            runs = results.arms[arm].runs
            lru = [seed_mean(summary.lru_miss_rate(run, size) for run in runs) for size in every_size]
            drawing.line(axes, every_size, lru, scale=100, **{**look, "marker": ""})
            for policy, style in (("lru", {"linestyle": ""}), ("belady", DASHED)):
                rates = [seed_mean(summary.miss_rate(run, size, policy) for run in runs) for size in sizes]
                drawing.line(axes, sizes, rates, scale=100, **{**look, **style})
        axes.set(xlabel="cache size C, expert slots per layer", ylabel="miss rate, % of accesses")
        drawing.from_zero(axes)
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        dashed = Line2D([], [], color="#777777", **DASHED)
        extra = [(dashed, "Belady's optimum, same colours"), *drawing.band(results)]
        drawing.legend(figure, results, list(results.arms), extra=extra)

    return drawing.svg_of(draw, height_inches=4.4, label="Miss rate against cache size")


def reuse_figure(results: Results) -> str | None:
    """Bars of the reuse rate per layer and their mean, with the chance level."""
    layers = {arm: place_means(r.reuse_rate_per_layer for r in summary.routings(results, arm)) for arm in results.arms}
    n_layers = max(map(len, layers.values()))
    if not n_layers:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, arm in enumerate(results.arms):
            rates = [*layers[arm], *[None] * (n_layers - len(layers[arm]))]
            rates.append(seed_mean(map(summary.reuse_rate, results.arms[arm].runs)))
            _bars(axes, rates, drawing.colours(results)[arm], shift=i - (len(layers) - 1) / 2, width=0.8 / len(layers))
        chance, extra = summary.chance_reuse_rate(results), []
        if chance:
            axes.axhline(chance.mean, **CHANCE)
            extra.append((Line2D([], [], **CHANCE), f"chance, K / E = {chance.mean:.3g}"))
        if drawing.has_seeds(results):
            extra.append((Line2D([], [], color="#222222", linestyle="", marker="|", markersize=9), drawing.SEEDS))
        _name_layers(axes, n_layers)
        drawing.legend(figure, results, list(results.arms), extra=extra, as_bars=True)

    return drawing.svg_of(draw, height_inches=3.6, label="Reuse rate per layer")


def _bars(axes: Axes, rates: Sequence[SeedMean | None], colour: str, *, shift: float, width: float) -> None:
    """One arm's bars, a group per layer and one set apart for the mean, with deviations where there are seeds."""
    groups = [*range(len(rates) - 1), len(rates) - 0.6]
    places = [group + shift * width for group in groups]
    heights = [math.nan if rate is None else rate.mean for rate in rates]
    errors = [math.nan if rate is None or not rate.sd else rate.sd for rate in rates]
    axes.bar(places, heights, width * 0.92, color=colour)
    if not all(map(math.isnan, errors)):
        axes.errorbar(places, heights, yerr=errors, fmt="none", ecolor="#222222", elinewidth=1, capsize=2)


def _name_layers(axes: Axes, n_layers: int) -> None:
    shown = range(0, n_layers, math.ceil(n_layers / 24))
    names = [f"layer {i}" if n_layers <= 12 else str(i) for i in shown]
    axes.set_xticks([*shown, n_layers + 0.4], [*names, "mean"])
    axes.set(ylabel="expert reuse rate (EOR)", xlabel="" if n_layers <= 12 else "layer")
    axes.grid(False, axis="x")
    axes.tick_params(axis="x", length=0)


def training_figure(results: Results) -> str | None:
    """Cross entropy and reuse rate over the steps, lightly smoothed; one line per seed."""
    arms = [arm for arm in results.arms if any(run.history for run in results.arms[arm].runs)]
    if not arms:
        return None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        keys = (("train/loss", "cross entropy, nats per token"), ("moe/reuse_rate_mean", "expert reuse rate (EOR)"))
        for axes, (key, label) in zip(panels, keys, strict=True):
            for arm in arms:
                for run in results.arms[arm].runs:
                    axes.plot(*_curve(run, key), color=drawing.colours(results)[arm], linewidth=1.4, alpha=0.85)
            axes.set(xlabel="step", title=label)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        drawing.legend(figure, results, arms, as_bars=True)

    return drawing.svg_of(draw, height_inches=3.4, label="Training curves")


def _curve(run: Run, key: str) -> tuple[list[float], list[float]]:
    """Steps and the centred moving average over `SMOOTHING` records, fewer at the ends."""
    points = [(row.get("train/global_step"), row.get(key)) for row in run.history or []]
    known = [(step, float(value)) for step, value in points if step is not None and value is not None]
    windows = [known[max(0, i - SMOOTHING // 2) : i + SMOOTHING // 2 + 1] for i in range(len(known))]
    return [step for step, _ in known], [sum(value for _, value in window) / len(window) for window in windows]


def quality_figure(results: Results) -> str | None:
    """Forest plot: differences from base with intervals, tasks left, perplexities right."""
    arms, domains = summary.tuned_arms(results), [*summary.domain_names(results), MEAN]
    tasks = [t for t in summary.task_names(results) if any(summary.task_change(results, arm, t) for arm in arms)]
    domains = [d for d in domains if any(summary.perplexity_change(results, arm, d) for arm in arms)]
    if not tasks and not domains:
        return None

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        _forest(left, results, tasks, summary.task_change)
        _forest(right, results, domains, summary.perplexity_change)
        left.set(title="tasks", xlabel="difference from base, percentage points (right is better)")
        right.set(title="perplexity", xlabel="change from base, % (left is better)")
        if domains:
            right.axvline(100 * PERPLEXITY_LIMIT, **LIMIT)
        zero = Line2D([], [], color=drawing.colours(results)[BASE], linewidth=1.3)
        drawing.legend(figure, results, arms, extra=[(zero, "base, no difference"), LIMIT_ENTRY])

    height_inches = 1.5 + max(len(tasks), len(domains)) * (0.22 + 0.15 * len(arms))
    return drawing.svg_of(draw, height_inches=height_inches, label="Quality differences with 95 % intervals")


def _forest(
    axes: Axes, results: Results, rows: Sequence[str], change: Callable[[Results, str, str], Change | None]
) -> None:
    arms, looks = summary.tuned_arms(results), drawing.looks_of(results)
    axes.axvline(0, color=drawing.colours(results)[BASE], linewidth=1.3)
    for row, name in enumerate(rows):
        for i, arm in enumerate(arms):
            found, y = change(results, arm, name), row + (i - (len(arms) - 1) / 2) * 0.72 / len(arms)
            if found is None:
                continue
            if found.low is not None and found.high is not None:
                ends, colour = [100 * found.low, 100 * found.high], looks[arm]["color"]
                axes.plot(ends, [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
            axes.plot([100 * found.value.mean], [y], **looks[arm], linestyle="")
    for edge in range(1, len(rows)):
        axes.axhline(edge - 0.5, color="#eeeeee", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(rows)), ["mean" if name == MEAN else name.replace("_", " ") for name in rows])
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def frontier_figure(results: Results) -> str | None:
    """What quality is paid for how many bytes: mean perplexity against bytes read per token, a panel per cache size.

    Vertical bars are 95 % intervals over test items, horizontal ones a standard deviation over seeds.
    """
    sizes = summary.frontier_budgets(results)
    draw = partial(_draw_frontier, results=results, sizes=sizes)
    return drawing.svg_of(draw, height_inches=3.5, label="Quality against bytes per token") if sizes else None


def write_frontier(results: Results, path: Path) -> None:
    """The frontier of the two smallest cache sizes as a PNG for a README; a `UserError` where there is none."""
    sizes = summary.frontier_budgets(results)[:2]
    if not sizes:
        raise UserError("these results have no frontier: no tuned arm was both decoded and compared with base")
    drawing.write_png(partial(_draw_frontier, results=results, sizes=sizes), path, height_inches=3.4)


def _draw_frontier(figure: Figure, results: Results, sizes: Sequence[int]) -> None:
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        points = summary.frontier(results, size)
        unit = data_size(max(point.bytes_per_token.mean for point in points.values()))
        for arm, point in points.items():
            _frontier_point(axes, point, scale=unit.scale, look=drawing.looks_of(results)[arm])
        axes.axhline(0, color=drawing.colours(results)[BASE], linewidth=0.9)
        axes.axhline(100 * PERPLEXITY_LIMIT, **LIMIT)
        axes.margins(0.12, 0.12)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        held = _budget_tick(size, results.model.token_demand_bytes).replace("\n", " demand, ")
        axes.set(title=f"expert cache: {held}", xlabel=f"bytes read per token, {unit.suffix.strip()}")
    panels[0].set_ylabel("change of mean perplexity, %")
    drawing.legend(figure, results, list(results.arms), extra=[LIMIT_ENTRY])


def _frontier_point(axes: Axes, point: FrontierPoint, *, scale: float, look: dict[str, Any]) -> None:
    read, cost = point
    middle, low, high = cost.value.mean, cost.low, cost.high
    across = [scale * read.sd] if read.sd else None
    along = None if low is None or high is None else [[100 * (middle - low)], [100 * (high - middle)]]
    look = {"markersize": 6.5, **look, "linewidth": 1.5}
    axes.errorbar([scale * read.mean], [100 * middle], xerr=across, yerr=along, linestyle="", capsize=3, **look)


def decode_figure(results: Results) -> str | None:
    """Bytes per token, and time per output token from least to most, at each budget."""
    if not summary.decode_budgets(results):
        return None

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        _draw_bytes(left, results)
        _draw_times(right, results)
        _budget_axis(left, results)
        _budget_axis(right, results)
        times = (Line2D([], [], color="#777777", linestyle="", marker="|", markersize=11), "times: least to most")
        drawing.legend(figure, results, list(results.arms), extra=[*drawing.band(results), times])

    return drawing.svg_of(draw, height_inches=3.7, label="Bytes per token and TPOT at each budget")


def _draw_bytes(axes: Axes, results: Results) -> None:
    unit = data_size(max((row.bytes_read_per_token or 0 for row in summary.decode_rows(results)), default=0))
    sizes = summary.decode_budgets(results)
    for arm, look in drawing.looks_of(results).items():
        runs = results.arms[arm].runs
        values = [seed_mean(summary.bytes_per_token(run, size) for run in runs) for size in sizes]
        drawing.line(axes, sizes, values, scale=unit.scale, **look)
    axes.set(title=f"bytes read per token, {unit.suffix.strip()}")


def _draw_times(axes: Axes, results: Results) -> None:
    """Medians with their extent, arms side by side; means where turns were not kept."""
    sizes, arms = summary.decode_budgets(results), list(results.arms)
    for i, (arm, look) in enumerate(drawing.looks_of(results).items()):
        shifted = [size * 2 ** (0.08 * (i - (len(arms) - 1) / 2)) for size in sizes]
        extents = [extent(summary.turn_times(results, arm, size, "tpot_ms")) for size in sizes]
        means = [seed_mean(row.mean_tpot_ms for row in summary.decodes(results, arm, size)) for size in sizes]
        middles = [SeedMean(e.median, None, 1) if e else mean for e, mean in zip(extents, means, strict=True)]
        drawing.line(axes, shifted, middles, scale=1, **look)
        for x, found in zip(shifted, extents, strict=True):
            if found is not None:
                axes.plot([x, x], [found.least, found.most], color=look["color"], linewidth=1.1, alpha=0.7)
    axes.set(title="time per output token (TPOT), ms")


def _budget_axis(axes: Axes, results: Results) -> None:
    demand = results.model.token_demand_bytes
    axes.set_xscale("log", base=2)
    axes.set(xlabel="expert cache" + (", in demands of one token and in bytes" if demand else ", bytes"))
    drawing.from_zero(axes)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(summary.decode_budgets(results)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _budget_tick(size, demand)))


def _budget_tick(size: float, demand: float | None) -> str:
    return (f"{demands_text(size / demand)}\n" if demand else "") + bytes_text(size)

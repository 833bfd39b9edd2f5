"""The report's figures, each a function from results to inline SVG text, or None where nothing was measured."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from evaluation.report.drawing import SEEDS, band, colours, from_zero, has_seeds, legend, line, looks_of, svg_of
from evaluation.report.summary import (
    MEAN,
    PERPLEXITY_LIMIT,
    Spread,
    budgets,
    change,
    decode_value,
    frontier,
    frontier_budgets,
    layers_of,
    lru_miss_rate,
    lru_sizes,
    measure,
    miss_rate,
    names,
    pick,
    replay_sizes,
    runs_of,
    spread,
    tuned_arms,
)
from evaluation.report.wording import LIMIT_TEXT, data_size, demands_text
from evaluation.results import BASE, Results, Run

SMOOTHING = 5  # records in the moving average of the training curves
DASHED: dict[str, Any] = {"linestyle": (0, (4, 2.5)), "marker": "", "linewidth": 1.2, "alpha": 0.75}


def miss_rate_figure(results: Results) -> str | None:
    """Miss rate against slots per layer: LRU solid, at every size; Belady's optimum dashed; marks at the tables' sizes."""
    sizes, every_size = replay_sizes(results), lru_sizes(results)
    if not sizes:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for arm, look in looks_of(results).items():
            runs = runs_of(results, arm)
            lru = [spread(lru_miss_rate(run, size) for run in runs) for size in every_size]
            line(axes, every_size, lru, scale=100, **{**look, "marker": ""})
            for policy, style in (("lru", {"linestyle": ""}), ("belady", DASHED)):
                rates = [spread(miss_rate(run, size, policy=policy) for run in runs) for size in sizes]
                line(axes, sizes, rates, scale=100, **{**look, **style})
        axes.set(xlabel="cache size C, expert slots per layer", ylabel="miss rate, % of accesses")
        from_zero(axes)
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        dashed = Line2D([], [], color="#777777", **DASHED)
        legend(
            figure, results, list(results["arms"]), extra=[(dashed, "Belady's optimum, same colours"), *band(results)]
        )

    return svg_of(draw, height_inches=4.4, label="Miss rate against cache size")


def reuse_figure(results: Results) -> str | None:
    """Bars of the reuse rate per layer and their mean, with the chance level."""
    arms = list(results["arms"])
    layers = {
        arm: layers_of([pick(run, "routing", "reuse_rate_per_layer") or [] for run in runs_of(results, arm)])
        for arm in arms
    }
    n_layers = max(map(len, layers.values()))
    if not n_layers:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        width = 0.8 / len(arms)
        for i, arm in enumerate(arms):
            rates = [
                *layers[arm],
                *[None] * (n_layers - len(layers[arm])),
                measure(results, arm, "routing", "reuse_rate_mean"),
            ]
            places = [group + (i - (len(arms) - 1) / 2) * width for group in [*range(n_layers), n_layers + 0.4]]
            heights, errors = _means(rates), [math.nan if rate is None or not rate.sd else rate.sd for rate in rates]
            axes.bar(places, heights, width * 0.92, color=colours(results)[arm])
            if not all(map(math.isnan, errors)):
                axes.errorbar(places, heights, yerr=errors, fmt="none", ecolor="#222222", elinewidth=1, capsize=2)
        chance = measure(results, BASE, "routing", "chance_reuse_rate")
        extra = []
        if chance is not None:
            axes.axhline(chance.mean, color="#222222", linestyle=":", linewidth=1.3)
            extra.append(
                (Line2D([], [], color="#222222", linestyle=":", linewidth=1.3), f"chance, K / E = {chance.mean:.3g}")
            )
        shown = range(0, n_layers, math.ceil(n_layers / 24))
        axes.set_xticks(
            [*shown, n_layers + 0.4], [*(f"layer {i}" if n_layers <= 12 else str(i) for i in shown), "mean"]
        )
        axes.set(ylabel="expert reuse rate (EOR)", xlabel="" if n_layers <= 12 else "layer")
        axes.grid(False, axis="x")
        axes.tick_params(axis="x", length=0)
        error = Line2D([], [], color="#222222", linestyle="", marker="|", markersize=9)
        seeds = [(error, SEEDS)] if has_seeds(results) else []
        legend(figure, results, arms, extra=[*extra, *seeds], as_bars=True)

    return svg_of(draw, height_inches=3.6, label="Reuse rate per layer")


def training_figure(results: Results) -> str | None:
    """Cross entropy and reuse rate over the steps, lightly smoothed; one line per seed."""
    arms = [arm for arm in results["arms"] if any(run["history"] for run in runs_of(results, arm))]
    if not arms:
        return None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        keys = (("train/loss", "cross entropy, nats per token"), ("moe/reuse_rate_mean", "expert reuse rate (EOR)"))
        for axes, (key, label) in zip(panels, keys, strict=True):
            for arm in arms:
                for run in runs_of(results, arm):
                    steps, values = _curve(run, key)
                    axes.plot(steps, values, color=colours(results)[arm], linewidth=1.4, alpha=0.85)
            axes.set(xlabel="step", title=label)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        legend(figure, results, arms, as_bars=True)

    return svg_of(draw, height_inches=3.4, label="Training curves")


def quality_figure(results: Results) -> str | None:
    """Forest plot: differences from base with intervals, tasks left, perplexities right."""
    arms = tuned_arms(results)
    tasks = [task for task in names(results, "tasks") if any(change(results, arm, "tasks", task) for arm in arms)]
    domains = [
        name
        for name in [*names(results, "perplexity"), MEAN]
        if any(change(results, arm, "perplexity", name) for arm in arms)
    ]
    if not tasks and not domains:
        return None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        for axes, kind, rows in zip(panels, ("tasks", "perplexity"), (tasks, domains), strict=True):
            _forest(axes, results, kind, rows)
        panels[0].set(title="tasks", xlabel="difference from base, percentage points (right is better)")
        panels[1].set(title="perplexity", xlabel="change from base, % (left is better)")
        limit = Line2D([], [], color="#aa3333", linestyle=":", linewidth=1.3)
        if domains:
            panels[1].axvline(100 * PERPLEXITY_LIMIT, color="#aa3333", linestyle=":", linewidth=1.3)
        zero = Line2D([], [], color=colours(results)[BASE], linewidth=1.3)
        extra = [(zero, "base, no difference"), (limit, f"limit of the mean, {LIMIT_TEXT}")]
        legend(figure, results, arms, extra=extra)

    rows = max(len(tasks), len(domains))
    return svg_of(
        draw, height_inches=1.5 + rows * (0.22 + 0.15 * len(arms)), label="Quality differences with 95 % intervals"
    )


def frontier_figure(results: Results) -> str | None:
    """What quality is paid for how many bytes: mean perplexity against bytes read per token, a panel per cache size.

    Vertical bars are 95 % intervals over test items, horizontal ones a standard deviation over seeds.
    """
    sizes = frontier_budgets(results)
    if not sizes:
        return None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
        for axes, size in zip(panels, sizes, strict=True):
            points = frontier(results, size)
            unit = data_size(max(point.bytes_per_token.mean for point in points.values()))
            for arm, point in points.items():
                look, cost = looks_of(results)[arm], point.cost
                bounds = None if cost.low is None or cost.high is None else (cost.low, cost.high)
                axes.errorbar(
                    [unit.scale * point.bytes_per_token.mean], [100 * cost.spread.mean],
                    xerr=None if not point.bytes_per_token.sd else [unit.scale * point.bytes_per_token.sd],
                    yerr=None if bounds is None else [[100 * (cost.spread.mean - bounds[0])],
                                                      [100 * (bounds[1] - cost.spread.mean)]],
                    color=look["color"], marker=look["marker"], markersize=8 if arm == BASE else 6.5, linewidth=1.5,
                    capsize=3, linestyle="",
                )  # fmt: skip
            axes.axhline(0, color=colours(results)[BASE], linewidth=0.9)
            axes.axhline(100 * PERPLEXITY_LIMIT, color="#aa3333", linestyle=":", linewidth=1.3)
            axes.margins(0.12, 0.12)
            axes.set(
                title=f"cache: {_budget_tick(size, results['model']['token_demand_bytes'])}".replace("\n", ", "),
                xlabel=f"bytes read per token, {unit.suffix.strip()}",
            )
        panels[0].set_ylabel("change of mean perplexity, %")
        limit = Line2D([], [], color="#aa3333", linestyle=":", linewidth=1.3)
        legend(figure, results, list(results["arms"]), extra=[(limit, f"limit of the mean, {LIMIT_TEXT}")])

    return svg_of(draw, height_inches=3.5, label="Quality against bytes per token")


def decode_figure(results: Results) -> str | None:
    """Bytes per token and time per output token at each budget."""
    sizes = budgets(results)
    if not sizes:
        return None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        demand = results["model"]["token_demand_bytes"]
        largest = max(
            (value for arm in results["arms"] for value in _decoded(results, arm, "bytes_read_per_token")), default=None
        )
        unit = data_size(largest)
        drawn = ((panels[0], "bytes_read_per_token", unit.scale, f"bytes read per token, {unit.suffix.strip()}"),
                 (panels[1], "mean_tpot_ms", 1.0, "time per output token (TPOT), ms"))  # fmt: skip
        for axes, key, scale, title in drawn:
            for arm, look in looks_of(results).items():
                values = [spread(decode_value(run, size, key) for run in runs_of(results, arm)) for size in sizes]
                line(axes, sizes, values, scale=scale, **look)
            axes.set_xscale("log", base=2)
            axes.set(
                title=title, xlabel="expert cache" + (", in demands of one token and in bytes" if demand else ", bytes")
            )
            from_zero(axes)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_locator(FixedLocator(sizes))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _budget_tick(size, demand)))
        legend(figure, results, list(results["arms"]), extra=band(results))

    return svg_of(draw, height_inches=3.7, label="Bytes per token and TPOT at each budget")


def _forest(axes: Axes, results: Results, kind: str, rows: Sequence[str]) -> None:
    arms, looks = tuned_arms(results), looks_of(results)
    axes.axvline(0, color=colours(results)[BASE], linewidth=1.3)
    for row, name in enumerate(rows):
        for i, arm in enumerate(arms):
            found = change(results, arm, kind, name)
            if found is None:
                continue
            y = row + (i - (len(arms) - 1) / 2) * 0.72 / len(arms)
            colour = looks[arm]["color"]
            if found.low is not None and found.high is not None:
                axes.plot(
                    [100 * found.low, 100 * found.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt"
                )
            axes.plot(
                [100 * found.spread.mean], [y], color=colour, marker=looks[arm]["marker"], markersize=5.5, linestyle=""
            )
    for edge in range(1, len(rows)):
        axes.axhline(edge - 0.5, color="#eeeeee", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(rows)), ["mean" if name == MEAN else name.replace("_", " ") for name in rows])
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def _means(values: Sequence[Spread | None]) -> list[float]:
    return [math.nan if value is None else value.mean for value in values]


def _decoded(results: Results, arm: str, key: str) -> list[float]:
    return [row[key] for run in runs_of(results, arm) for row in run["decode"] or [] if row[key] is not None]


def _budget_tick(size: float, demand: float | None) -> str:
    text = data_size(size).text(size)
    return text if not demand else f"{demands_text(size / demand)}\n{text}"


def _curve(run: Run, key: str) -> tuple[list[float], list[float]]:
    """Steps and the centred moving average over `SMOOTHING` records, fewer at the ends."""
    records = [
        row for row in run["history"] or [] if row.get(key) is not None and row.get("train/global_step") is not None
    ]
    values = [float(row[key]) for row in records]
    smooth = []
    for i in range(len(values)):
        window = values[max(0, i - SMOOTHING // 2) : i + SMOOTHING // 2 + 1]
        smooth.append(sum(window) / len(window))
    return [row["train/global_step"] for row in records], smooth

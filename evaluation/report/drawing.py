"""How all figures of the report look: style, one colour and marker per arm, lines with spread, legend, SVG and PNG.

The palette is Okabe and Ito's, safe for colour-blind readers. Text stays text in the SVG, so it can be searched and
takes the page's font. Matplotlib's global settings are not touched.
"""

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from configs.files import prepare, writing_aside
from evaluation.report.summary import SeedMean, all_runs
from evaluation.results import BASE, Results

KNOWN_COLOURS = {
    BASE: "#4d4d4d", "ce_only": "#009e73", "remoe": "#d55e00", "cache": "#0072b2", "cache_miss": "#cc79a7"
}  # fmt: skip
OTHER_COLOURS = ("#e69f00", "#56b4e9", "#8c6d1f", "#7a5fb5")
MARKERS = "osD^vPX<>"
TEMPLATES = Path(__file__).parent / "templates"
WIDTH_INCHES = 10.8
PNG_WIDTH_INCHES = 7.0
SEEDS = "± 1 sd over seeds"
Entry = tuple[Any, str]  # of a legend: what is drawn, and its text


def colours(results: Results) -> dict[str, str]:
    """The colour of every arm."""
    others = itertools.cycle(OTHER_COLOURS)
    return {arm: KNOWN_COLOURS.get(arm) or next(others) for arm in results.arms}


def line(axes: Axes, xs: Sequence[float], values: Sequence[SeedMean | None], *, scale: float, **look: Any) -> None:
    """The means, with a band of one standard deviation where there are seeds; what was not measured is skipped."""
    measured = [(x, value) for x, value in zip(xs, values, strict=True) if value is not None]
    at, means = [x for x, _ in measured], [scale * value.mean for _, value in measured]
    axes.plot(at, means, **look)
    if any(value.sd for _, value in measured):
        half = [scale * (value.sd or 0) for _, value in measured]
        low, high = ([m + sign * h for m, h in zip(means, half, strict=True)] for sign in (-1, 1))
        axes.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)


def from_zero(axes: Axes) -> None:
    """Start the vertical axis at 0 and leave room for markers at the top."""
    axes.set_ylim(0, axes.dataLim.ymax * 1.08 or 1)


def legend(
    figure: Figure, results: Results, arms: Sequence[str], *, extra: Sequence[Entry] = (), as_bars: bool = False
) -> None:
    """Above the panels, the same arms in the same order in every figure."""
    looks, seeds = looks_of(results), {arm: len(results.arms[arm].runs) for arm in arms}
    handles = [Patch(color=looks[arm]["color"]) if as_bars else Line2D([], [], **looks[arm]) for arm in arms]
    texts = [arm if n == 1 else f"{arm} (n = {n})" for arm, n in seeds.items()] + [text for _, text in extra]
    wanted_inches = 0.075 * sum(map(len, texts)) + 0.55 * len(texts)  # as the font and the spacing below have it
    columns = math.ceil(len(texts) / math.ceil(wanted_inches / figure.get_figwidth()))
    drawn = [*handles, *(handle for handle, _ in extra)]
    figure.legend(drawn, texts, loc="outside upper left", ncols=columns, handlelength=2.2, columnspacing=1.6)


def looks_of(results: Results) -> dict[str, dict[str, Any]]:
    """Colour and marker of every arm, as matplotlib's keywords."""
    marked = zip(colours(results).items(), itertools.cycle(MARKERS), strict=False)
    looks: dict[str, dict[str, Any]] = {arm: {"color": colour, "marker": marker} for (arm, colour), marker in marked}
    looks[BASE] |= {"linewidth": 3.2, "markersize": 8}  # drawn first; seen under an arm that lies on it
    return looks


def has_seeds(results: Results) -> bool:
    """Whether an arm has more than one."""
    return len(all_runs(results)) > len(results.arms)


def band(results: Results) -> list[Entry]:
    """The legend's entry for the spread, where an arm has more than one seed."""
    return [(Patch(color="#777777", alpha=0.25, linewidth=0), SEEDS)] if has_seeds(results) else []


def svg_of(draw: Callable[[Figure], None], *, height_inches: float, label: str) -> str:
    """Draw into a figure of its own and give its SVG element, ready to stand in a page."""
    text = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    _save(draw, text, size=(WIDTH_INCHES, height_inches), salt=label, format="svg", transparent=True, metadata=metadata)
    svg = text.getvalue()
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg[svg.index("<svg") :])  # group names repeat from figure to figure
    head = rf'<svg viewBox="\1" role="img" aria-label="{label}">'
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', head, svg, count=1)


def write_png(draw: Callable[[Figure], None], path: Path, *, height_inches: float) -> None:
    """Draw into a picture for a page 700 pixels wide, at twice that resolution."""
    with writing_aside(prepare(path)) as aside:
        _save(draw, aside, size=(PNG_WIDTH_INCHES, height_inches), salt="", format="png", dpi=200, facecolor="white")


def _save(draw: Callable[[Figure], None], target: Any, *, size: tuple[float, float], salt: str, **how: Any) -> None:
    with matplotlib.rc_context({"svg.hashsalt": salt}, TEMPLATES / "figures.mplstyle"):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(target, **how)

"""The benchmark's result on a terminal."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from evaluation.report.numbers import MILLISECONDS, MISSING, PERCENT, PLAIN, RATE, Unit, data_size

RATIO = Unit(digits=2, suffix="×")
GIGABYTES = Unit(scale=1e-9, digits=2, suffix="\N{NO-BREAK SPACE}GB/s")


def result_tables(result: dict[str, Any]) -> RenderableType:
    """Figures, ratios, bounds, settings and remarks."""
    return Group(_speeds(result), _reads(result), _ratios(result), _bounds(result), _times(result), *_lines(result))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in ("side", "to", "leg") else "right")
    return table


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Contender, leg, the leg's measures, the contender's summary."""
    for contender, summary in result["summary"].items():
        for leg, measured in summary["legs"].items():
            yield contender, leg.replace("_", " "), measured, summary


def _speeds(result: dict[str, Any]) -> Table:
    table = _table("speed: medians over repeats (least to most)", "side", "leg", "TTFT", "TPOT", "tokens/s")
    for contender, leg, measured, _ in _rows(result):
        table.add_row(
            contender, leg, _spread(measured["mean_ttft_ms"], MILLISECONDS),
            _spread(measured["mean_tpot_ms"], MILLISECONDS), _middle(measured["output_throughput"], PLAIN),
        )  # fmt: skip
    for contender, summary in result["summary"].items():
        if not summary["legs"]:
            table.add_row(contender, "failed", *[MISSING] * 3)
    return table


def _reads(result: dict[str, Any]) -> Table:
    table = _table(
        "reads and memory", "side", "leg", "read/token", "hit rate", "EOR", "peak RSS", "peak with page cache"
    )
    for contender, leg, measured, summary in _rows(result):
        read = measured["bytes_read_per_token"]
        table.add_row(
            contender, leg, _middle(read, data_size(read["median"] if read else None)),
            _middle(measured["hit_rate_decode"], PERCENT), _middle(measured["reuse_rate_mean"], RATE),
            *(data_size(summary[key]).text(summary[key]) for key in ("peak_rss_bytes", "peak_memory_bytes")),
        )  # fmt: skip
    return table


def _ratios(result: dict[str, Any]) -> Table:
    table = _table("ratios within repeats", "side", "to", "leg", "TPOT", "TTFT", "equal tokens")
    for contender, others in result["ratios"].items():
        for ours, legs in others.items():
            for leg, ratio in legs.items():
                if ratio["mean_tpot_ms_ratio"] is not None:
                    table.add_row(
                        contender, ours, leg, _spread(ratio["mean_tpot_ms_ratio"], RATIO),
                        _spread(ratio["mean_ttft_ms_ratio"], RATIO), PERCENT.text(result["equal_tokens"][contender][ours]),
                    )  # fmt: skip
    return table


def _bounds(result: dict[str, Any]) -> Table:
    title = (
        "the machine's bound: the slower of reading missing experts and reading active weights (or the resident TPOT)"
    )
    table = _table(title, "side", "leg", "bound", "share reached", "with resident TPOT", "waiting for reads")
    for contender, legs in result["bounds"].items():
        for leg, bound in legs.items():
            if leg == "long_prompt":
                expected = f"{_spread(bound['expected_ms'], MILLISECONDS)} for the prompt"
                table.add_row(
                    contender,
                    "long prompt",
                    expected,
                    f"TTFT is {_spread(bound['ratio'], RATIO)} of it",
                    MISSING,
                    MISSING,
                )
            else:
                table.add_row(
                    contender, leg, _spread(bound["bound_ms"], MILLISECONDS), _spread(bound["share"], PERCENT),
                    _spread(bound["share_with_resident"], PERCENT), _middle(bound["stall_share"], PERCENT),
                )  # fmt: skip
    return table


def _times(result: dict[str, Any]) -> Table:
    title = "what keeps a token from reading at the disk's rate all the time: its share of that is the product"
    table = _table(
        title, "side", "leg", "of the time, reading", "of the disk's rate, then", "of the bytes, needed", "product"
    )
    for contender, legs in result["bounds"].items():
        for leg, bound in legs.items():
            if leg != "long_prompt":
                names = ("reading_share", "rate_share", "needed_share", "read_share")
                table.add_row(contender, leg, *(_spread(bound[name], PERCENT) for name in names))
    return table


def _lines(result: dict[str, Any]) -> Iterator[Text]:
    for when, measured in result["bandwidth"].items():
        depths = ", ".join(f"{depth}: {GIGABYTES.text(rate)}" for depth, rate in measured["read_by_depth"].items())
        yield Text(
            f"bandwidth {when}: reads of {measured['read_bytes']} bytes "
            f"({'O_DIRECT' if measured['direct'] else 'through the page cache: O_DIRECT is refused here'}), by depth "
            f"{depths}; {GIGABYTES.text(measured['read_beside_products'])} while all cores compute; "
            f"memory {GIGABYTES.text(measured['memory'])}"
        )
    for contender, summary in result["summary"].items():
        settings = ", ".join(f"{key} {value}" for key, value in summary["settings"].items())
        yield Text(f"{contender}: {settings}" if settings else f"{contender}: never ran")
        for failure in summary["failures"]:
            yield Text(f"{contender} FAILED: {failure}", style="red")
    for note in result["notes"]:
        yield Text(note)


def _spread(value: dict[str, float] | None, unit: Unit) -> str:
    if value is None:
        return MISSING
    middle = unit.text(value["median"])
    if value["n"] == 1:
        return middle
    return f"{middle} ({_bare(value['min'], unit)} to {_bare(value['max'], unit)})"


def _middle(value: dict[str, float] | None, unit: Unit) -> str:
    return MISSING if value is None else unit.text(value["median"])


def _bare(value: float, unit: Unit) -> str:
    return unit.text(value).removesuffix(unit.suffix)

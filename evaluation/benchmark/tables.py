"""The benchmark's result on a terminal."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from evaluation.benchmark.order import LONG
from evaluation.report.numbers import MILLISECONDS, MISSING, PERCENT, PLAIN, RATE, SPACE, Unit, bytes_text
from evaluation.turns import Extent

RATIO = Unit(digits=2, suffix="×")
GIGABYTES = Unit(scale=1e-9, digits=2, suffix=f"{SPACE}GB/s")


def result_tables(result: dict[str, Any]) -> RenderableType:
    """Figures, ratios, bounds, settings and remarks."""
    return Group(_speeds(result), _reads(result), _ratios(result), _bounds(result), _times(result), *_lines(result))


def table(title: str, columns: str, rows: Iterable[Sequence[str]], *, caption: str | None = None) -> Table:
    """A table whose `columns` are named with `|` between: words are on the left, `>` before the name of numbers."""
    made = Table(title=title, caption=caption, caption_justify="left")
    for column in columns.split("|"):
        made.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        made.add_row(*row)
    return made


def _legs(result: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Contender, leg, the leg's measures."""
    for contender, summary in result["summary"].items():
        for leg, measured in summary["legs"].items():
            yield contender, leg.replace("_", " "), measured


def _speeds(result: dict[str, Any]) -> Table:
    columns = {"mean_ttft_ms": MILLISECONDS, "mean_tpot_ms": MILLISECONDS}
    rows = [
        (contender, leg, *_cells(measured, columns), _median(measured["output_throughput"], PLAIN))
        for contender, leg, measured in _legs(result)
    ]
    failed = [name for name, summary in result["summary"].items() if not summary["legs"]]
    rows += [(name, "failed", MISSING, MISSING, MISSING) for name in failed]
    return table("speed: medians over repeats (least to most)", "side|leg|>TTFT|>TPOT|>tokens/s", rows)


def _reads(result: dict[str, Any]) -> Table:
    rows = []
    for contender, leg, measured in _legs(result):
        read = measured["bytes_read_per_token"]
        rates = _median(measured["hit_rate_decode"], PERCENT), _median(measured["reuse_rate_mean"], RATE)
        peaks = [bytes_text(result["summary"][contender][key]) for key in ("peak_rss_bytes", "peak_memory_bytes")]
        rows.append((contender, leg, bytes_text(read and read["median"]), *rates, *peaks))
    return table("reads and memory", "side|leg|>read/token|>hit rate|>EOR|>peak RSS|>peak with page cache", rows)


def _ratios(result: dict[str, Any]) -> Table:
    columns, equal = {"mean_tpot_ms_ratio": RATIO, "mean_ttft_ms_ratio": RATIO}, result["equal_tokens"]
    rows = [
        (contender, ours, leg, *_cells(ratio, columns), PERCENT.text(equal[contender][ours]))
        for contender, others in result["ratios"].items()
        for ours, legs in others.items()
        for leg, ratio in legs.items()
        if ratio["mean_tpot_ms_ratio"] is not None
    ]
    return table("ratios within repeats", "side|to|leg|>TPOT|>TTFT|>equal tokens", rows)


def _bounds(result: dict[str, Any]) -> Table:
    columns = {"bound_ms": MILLISECONDS, "share": PERCENT, "share_with_resident": PERCENT}
    rows: list[Sequence[str]] = []
    for contender, legs in result["bounds"].items():
        for leg, bound in legs.items():
            if leg == LONG:
                expected, ratio = _cells(bound, {"expected_ms": MILLISECONDS, "ratio": RATIO})
                cells = [f"{expected} for the prompt", f"TTFT is {ratio} of it", MISSING, MISSING]
            else:
                cells = [*_cells(bound, columns), _median(bound["stall_share"], PERCENT)]
            rows.append((contender, leg.replace("_", " "), *cells))
    title = (
        "the machine's bound: the slower of reading missing experts and reading active weights (or the resident TPOT)"
    )
    return table(title, "side|leg|>bound|>share reached|>with resident TPOT|>waiting for reads", rows)


def _times(result: dict[str, Any]) -> Table:
    columns = dict.fromkeys(("reading_share", "rate_share", "needed_share", "read_share"), PERCENT)
    rows = [
        (contender, leg, *_cells(bound, columns))
        for contender, legs in result["bounds"].items()
        for leg, bound in legs.items()
        if leg != LONG
    ]
    title = "what keeps a token from reading at the disk's rate all the time: its share of that is the product"
    return table(title, "side|leg|>of the time, reading|>of the disk's rate, then|>of the bytes, needed|>product", rows)


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


def _cells(measured: dict[str, Any], columns: dict[str, Unit]) -> Iterator[str]:
    """The medians of these measures, and the extremes where there are several values."""
    for name, unit in columns.items():
        found = measured[name] and Extent(**measured[name])
        yield unit.text(found.median) if found and found.n == 1 else unit.extent(found)


def _median(value: dict[str, Any] | None, unit: Unit) -> str:
    return unit.text(value["median"] if value else None)

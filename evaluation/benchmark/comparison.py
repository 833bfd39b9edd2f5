"""The figures of all runs: medians and spreads over repeats, ratios within repeats, and the machine's bound.

Ratios are taken inside one repeat, where the sides ran right after each other, and only then summarised: a machine
that is slower for an hour slows both.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from evaluation.benchmark.order import LONG
from evaluation.benchmark.processes import SideRun
from evaluation.turns import extent

RESIDENT = "resident"  # the contender that has everything in memory
MEASURES: Mapping[str, Callable[[dict[str, Any]], float | None]] = {
    "mean_ttft_ms": lambda leg: leg["ttft_ms"],
    "mean_tpot_ms": lambda leg: leg["tpot_ms"],
    "output_throughput": lambda leg: leg["output_throughput"],
    "bytes_read_per_token": lambda leg: leg["bytes_read_per_token"],
    "hit_rate_decode": lambda leg: leg["engine"] and leg["engine"]["hit_rate"]["decode"],
    "reuse_rate_mean": lambda leg: leg["engine"] and leg["engine"]["reuse_rate_mean"],
}
"""The figures of a leg that are summarised; `bytes_read_per_token` is the device's, see `serving.py`, and `engine` ours."""


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Median, least, most and how many, as JSON; None when nothing was measured."""
    found = extent(values)
    return asdict(found) if found else None


def summarise(runs: Sequence[SideRun]) -> dict[str, Any]:
    """Contender -> the spread of every measure in every leg over the repeats, its peaks and its failures."""
    contenders = dict.fromkeys(run.contender for run in runs)
    return {name: _summary([run for run in runs if run.contender == name]) for name in contenders}


def _summary(own: Sequence[SideRun]) -> dict[str, Any]:
    legs = {name: [run.legs[name] for run in own if name in run.legs] for run in own for name in run.legs}
    return {
        "legs": {
            leg: {name: spread(map(read, measured)) for name, read in MEASURES.items()}
            for leg, measured in legs.items()
        },
        "limit_bytes": own[0].limit_bytes,
        "peak_rss_bytes": max((run.peak_rss_bytes for run in own if run.peak_rss_bytes), default=None),
        "peak_memory_bytes": max((run.peak_memory_bytes for run in own if run.peak_memory_bytes), default=None),
        "load_seconds": spread(run.load_seconds for run in own),
        "settings": next((run.settings for run in own if run.settings), {}),
        "failures": sorted({run.failure for run in own if run.failure}),
    }


def ratios(runs: Sequence[SideRun], *, of: str, to: str, leg: str) -> dict[str, dict[str, float] | None]:
    """The spread of `of`'s TPOT and TTFT divided by `to`'s in the same repeat."""
    pairs = [(a.legs[leg], b.legs[leg]) for a, b in _pairs(runs, of, to, leg)]
    return {
        f"mean_{name}_ratio": spread(_divide(a[name], b[name]) for a, b in pairs) for name in ("tpot_ms", "ttft_ms")
    }


def _pairs(runs: Sequence[SideRun], of: str, to: str, leg: str) -> list[tuple[SideRun, SideRun]]:
    """Runs of two contenders in the same repeat, where both have the leg."""
    others = {run.repeat: run for run in runs if run.contender == to and leg in run.legs}
    return [
        (run, others[run.repeat]) for run in runs if run.contender == of and leg in run.legs and run.repeat in others
    ]


def equal_tokens(runs: Sequence[SideRun], *, of: str, to: str) -> float | None:
    """Share of tokens, over all legs and repeats, up to the first that differs; None without a common leg."""
    equal = [
        [x == y for x, y in zip(a.legs[leg]["token_ids"], b.legs[leg]["token_ids"], strict=False)]
        for leg in dict.fromkeys(name for run in runs for name in run.legs)
        for a, b in _pairs(runs, of, to, leg)
    ]
    return sum([*one, False].index(False) for one in equal) / sum(map(len, equal)) if equal else None


def decode_bound(
    runs: Sequence[SideRun], contender: str, leg: str, *, memory_rate: float, active_bytes: int
) -> dict[str, Any] | None:
    """The least that a token costs, the share of it that was reached, bound / TPOT, and where the rest of the time went.

    The bound of a token is the slower of reading its missing experts, at what the disk gave around that very process, and
    of reading all weights it needs from memory. A processor that computes slower than its memory keeps even the resident
    model from the latter, so `share_with_resident` takes the resident model's TPOT of the same repeat in its place.

    `read_share` is the product of three others: something is read for `reading_share` of the time, at `rate_share` of the
    disk's rate, and `needed_share` of it was not read ahead in vain.
    """
    memory_ms = 1e3 * active_bytes / memory_rate
    resident_ms = {
        run.repeat: run.legs[leg]["tpot_ms"] for run in runs if run.contender == RESIDENT and leg in run.legs
    }
    shares = [
        _shares(run.legs[leg], run.read_rate, memory_ms=memory_ms, resident_ms=resident_ms.get(run.repeat))
        for run in runs
        if run.contender == contender and leg in run.legs and run.read_rate and run.legs[leg]["tpot_ms"] is not None
    ]
    if not shares:
        return None
    return {"memory_ms": memory_ms, **{name: spread(share[name] for share in shares) for name in shares[0]}}


def _shares(
    row: dict[str, Any], read_rate: float, *, memory_ms: float, resident_ms: float | None
) -> dict[str, float | None]:
    """The bound of one leg of our engine, and shares of its decode time; see `decode_bound`."""
    engine, tokens, seconds = row["engine"], len(row["itl_ms"]), sum(row["itl_ms"]) / 1e3
    read_ms = 1e3 * engine["missed_bytes_per_token"] / read_rate
    read_bytes, needed_bytes = (
        tokens * engine[f"{which}_per_token"] for which in ("counted_bytes_read", "missed_bytes")
    )
    reading_seconds = engine["reading_seconds"]["decode"]
    return {
        "bound_ms": max(read_ms, memory_ms),
        "share": max(read_ms, memory_ms) / row["tpot_ms"],
        "share_with_resident": max(read_ms, resident_ms) / row["tpot_ms"] if resident_ms else None,
        "stall_share": engine["stall_seconds"]["decode"] * 1e3 / sum(row["itl_ms"]),
        "reading_share": reading_seconds / seconds,
        "rate_share": _divide(read_bytes / read_rate, reading_seconds),
        "needed_share": _divide(needed_bytes, read_bytes),
        "read_share": needed_bytes / read_rate / seconds,
    }


def prompt_bound(runs: Sequence[SideRun], contender: str) -> dict[str, Any] | None:
    """The long prompt: one pass over the experts it touches plus the resident model's time, and TTFT over that."""
    rows = [
        (a.legs[LONG], b.legs[LONG]["ttft_ms"], a.read_rate)
        for a, b in _pairs(runs, contender, RESIDENT, LONG)
        if a.read_rate
    ]
    if not rows:
        return None
    touched = [row["engine"]["first_touches"] * row["engine"]["expert_bytes"] for row, _, _ in rows]
    expected = [1e3 * size / rate + compute for size, (_, compute, rate) in zip(touched, rows, strict=True)]
    return {
        "touched_bytes": spread(touched),
        "resident_ttft_ms": spread(compute for _, compute, _ in rows),
        "expected_ms": spread(expected),
        "ratio": spread(row["ttft_ms"] / ms for (row, _, _), ms in zip(rows, expected, strict=True)),
    }


def _divide(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b

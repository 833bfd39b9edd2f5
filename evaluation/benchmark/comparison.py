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

MEASURES: Mapping[str, Callable[[dict[str, Any]], float | None]] = {
    "mean_ttft_ms": lambda leg: leg["ttft_ms"],
    "mean_tpot_ms": lambda leg: leg["tpot_ms"],
    "output_throughput": lambda leg: leg["output_throughput"],
    "bytes_read_per_token": lambda leg: leg["bytes_read_per_token"],
    "hit_rate_decode": lambda leg: leg["engine"] and leg["engine"]["hit_rate"]["decode"],
    "reuse_rate_mean": lambda leg: leg["engine"] and leg["engine"]["reuse_rate_mean"],
}
"""The figures of a leg that are summarised; `bytes_read_per_token` is the device's, see `meter.py`, and `engine` ours."""


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Median, least, most and how many, as JSON; None when nothing was measured."""
    found = extent(values)
    return asdict(found) if found else None


def summarise(runs: Sequence[SideRun]) -> dict[str, Any]:
    """Contender -> the spread of every measure in every leg over the repeats, its peaks and its failures."""
    contenders = dict.fromkeys(run.contender for run in runs)
    return {name: _summary([run for run in runs if run.contender == name]) for name in contenders}


def _summary(own: Sequence[SideRun]) -> dict[str, Any]:
    """The summary of one contender's runs."""
    legs = dict.fromkeys(name for run in own for name in run.legs)
    return {
        "legs": {
            leg: {
                name: spread(read(run.legs[leg]) for run in own if leg in run.legs) for name, read in MEASURES.items()
            }
            for leg in legs
        },
        "limit_bytes": own[0].limit_bytes,
        "peak_rss_bytes": _most(run.peak_rss_bytes for run in own),
        "peak_memory_bytes": _most(run.peak_memory_bytes for run in own),
        "load_seconds": spread(run.load_seconds for run in own),
        "settings": next((run.settings for run in own if run.settings), {}),
        "failures": sorted({run.failure for run in own if run.failure}),
    }


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def ratios(runs: Sequence[SideRun], *, of: str, to: str, leg: str) -> dict[str, dict[str, float] | None]:
    """The spread of `of`'s TPOT and TTFT divided by `to`'s in the same repeat."""
    return {
        f"{name}_ratio": spread(
            _divide(MEASURES[name](a.legs[leg]), MEASURES[name](b.legs[leg])) for a, b in _pairs(runs, of, to, leg)
        )
        for name in ("mean_tpot_ms", "mean_ttft_ms")
    }


def _pairs(runs: Sequence[SideRun], of: str, to: str, leg: str) -> list[tuple[SideRun, SideRun]]:
    by_repeat = {(run.contender, run.repeat): run for run in runs if leg in run.legs}
    return [
        (by_repeat[of, repeat], by_repeat[to, repeat])
        for contender, repeat in by_repeat
        if contender == of and (to, repeat) in by_repeat
    ]


def equal_tokens(runs: Sequence[SideRun], *, of: str, to: str) -> float | None:
    """Share of tokens, over all legs and repeats, up to the first that differs; None without a common leg."""
    equal = [
        [x == y for x, y in zip(a.legs[leg]["token_ids"], b.legs[leg]["token_ids"], strict=False)]
        for leg in dict.fromkeys(name for run in runs for name in run.legs)
        for a, b in _pairs(runs, of, to, leg)
    ]
    return sum(map(_first_different, equal)) / sum(map(len, equal)) if equal else None


def _first_different(equal: Sequence[bool]) -> int:
    return equal.index(False) if False in equal else len(equal)


def decode_bound(
    runs: Sequence[SideRun], contender: str, leg: str, *, resident: str, memory_rate: float, active_bytes: int
) -> dict[str, Any] | None:
    """The least that a token costs, and the share of it that was reached: bound / TPOT.

    The bound of a token is the slower of reading its missing experts, at what the disk gave around that very process, and
    of reading all weights it needs from memory. A processor that computes slower than its memory keeps even the resident
    model from the latter, so `share_with_resident` takes the resident model's TPOT of the same repeat in its place.
    """
    own = [run for run in runs if run.contender == contender and leg in run.legs]
    rows = [(run, run.legs[leg]) for run in own if run.legs[leg]["tpot_ms"] is not None and run.read_rate]
    if not rows:
        return None
    memory_ms = 1e3 * active_bytes / memory_rate
    read_ms = [1e3 * row["engine"]["missed_bytes_per_token"] / float(run.read_rate or 0) for run, row in rows]
    tpot_ms = [row["tpot_ms"] for _, row in rows]
    resident_ms = {
        run.repeat: run.legs[leg]["tpot_ms"] for run in runs if run.contender == resident and leg in run.legs
    }
    beside_ms = [resident_ms.get(run.repeat) for run, _ in rows]
    return {
        "bound_ms": spread(max(ms, memory_ms) for ms in read_ms),
        "memory_ms": memory_ms,
        "share": spread(max(ms, memory_ms) / took for ms, took in zip(read_ms, tpot_ms, strict=True)),
        "share_with_resident": spread(
            max(ms, beside) / took for ms, beside, took in zip(read_ms, beside_ms, tpot_ms, strict=True) if beside
        ),
        "stall_share": spread(row["engine"]["stall_seconds"]["decode"] * 1e3 / sum(row["itl_ms"]) for _, row in rows),
        **_where_time_goes(rows),
    }


def _where_time_goes(rows: Sequence[tuple[SideRun, dict[str, Any]]]) -> dict[str, Any]:
    """The reasons why a token does not read what it misses at the disk's rate all the time.

    `read_share` is the product of the three others: something is read for `reading_share` of the time, at `rate_share` of
    the disk's rate, and `needed_share` of it was not read ahead in vain.
    """
    shares: list[dict[str, float | None]] = []
    for run, row in rows:
        engine, seconds, tokens = row["engine"], sum(row["itl_ms"]) / 1e3, len(row["itl_ms"])
        reading_seconds, disk_rate = engine["reading_seconds"]["decode"], float(run.read_rate or 0)
        read_bytes = tokens * engine["counted_bytes_read_per_token"]
        needed_bytes = tokens * engine["missed_bytes_per_token"]
        share = {
            "reading_share": reading_seconds / seconds,
            "rate_share": _divide(read_bytes / disk_rate, reading_seconds),
            "needed_share": _divide(needed_bytes, read_bytes),
            "read_share": needed_bytes / disk_rate / seconds,
        }
        shares.append(share)
    return {name: spread(share[name] for share in shares) for name in shares[0]}


def prompt_bound(runs: Sequence[SideRun], contender: str, *, resident: str) -> dict[str, Any] | None:
    """The long prompt: one pass over the experts it touches plus the resident model's time, and TTFT over that."""
    pairs = [(a, b) for a, b in _pairs(runs, contender, resident, LONG) if a.read_rate]
    if not pairs:
        return None
    rows = [(a.legs[LONG], b.legs[LONG]["ttft_ms"], float(a.read_rate or 0)) for a, b in pairs]
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

"""How the report says things: numbers with units, the headline sentence, the definitions. No layout."""

from dataclasses import dataclass, replace

from evaluation.report.summary import (
    MEAN,
    PERPLEXITY_LIMIT,
    Change,
    Spread,
    change,
    headline_sizes,
    miss_change,
    names,
    tuned_arms,
    verdict,
)
from evaluation.results import Results

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
        return MISSING if value is None else self._digits(value) + self.suffix

    def spread(self, value: Spread | None) -> str:
        """`12.3 ± 0.4 %`; without the spread for a single seed."""
        if value is None:
            return MISSING
        if value.sd is None or (value.sd == 0 and self.digits == 0):  # a count that is the same for all seeds
            return self.text(value.mean)
        return f"{self._digits(value.mean)}{SPACE}±{SPACE}{replace(self, signed=False).text(value.sd)}"

    def change(self, value: Change | None) -> str:
        """`−1.2 ± 0.3 %`, on a second line its interval."""
        if value is None:
            return MISSING
        if value.low is None or value.high is None:
            return self.spread(value.spread)
        return f"{self.spread(value.spread)}\n[{self._digits(value.low)}, {self._digits(value.high)}]"

    def _digits(self, value: float) -> str:
        scaled = round(value * self.scale, self.digits) + 0.0  # no minus before a zero
        return f"{scaled:{'+' if self.signed and scaled else ''},.{self.digits}f}".replace("-", "−")


COUNT = Unit()
RATE = Unit(digits=3)
PLAIN = Unit(digits=2)
PERCENT = Unit(scale=100, digits=1, suffix=f"{SPACE}%")
CHANGE = Unit(scale=100, digits=1, suffix=f"{SPACE}%", signed=True)
FINE_CHANGE = Unit(scale=100, digits=2, suffix=f"{SPACE}%", signed=True)
POINTS = Unit(scale=100, digits=1, suffix=f"{SPACE}pt", signed=True)
MILLISECONDS = Unit(digits=1, suffix=f"{SPACE}ms")
LIMIT_TEXT = Unit(scale=100, suffix=f"{SPACE}%", signed=True).text(PERPLEXITY_LIMIT)
SECONDS = Unit(digits=0, suffix=f"{SPACE}s")


def data_size(like: float | None) -> Unit:
    """The binary unit that suits a number of bytes, three digits of it."""
    size = abs(like or 0)
    for power, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            digits = 2 if size < 10 * 1024**power else 1 if size < 100 * 1024**power else 0
            return Unit(scale=1024**-power, digits=digits, suffix=SPACE + name)
    return Unit(suffix=f"{SPACE}B")


def bytes_text(value: Spread | float | None) -> str:
    if isinstance(value, Spread):
        return data_size(value.mean).spread(value)
    return data_size(value).text(value)


def demands_text(demands: float | None) -> str:
    return MISSING if demands is None else f"{demands:.3g}×"


def headline(results: Results) -> str:
    """One sentence: what the best arm won and cost, or why there is none."""
    if not tuned_arms(results):
        return "Only the untouched model was measured: there is no tuned arm to compare it with."
    found = verdict(results)
    if found.best is None and found.closest is None:
        return "No arm's mean perplexity was compared with base, so none can be called the best."
    if found.best is None:
        assert found.closest is not None
        cost = change(results, found.closest, "perplexity", MEAN)
        assert cost is not None
        cheapest = f"the cheapest, {found.closest}, is at {FINE_CHANGE.spread(cost.spread)}"
        if cost.spread.mean > PERPLEXITY_LIMIT:
            return f"No arm keeps mean perplexity within {LIMIT_TEXT} of base: {cheapest}."
        return f"No arm within {LIMIT_TEXT} mean perplexity had its cache misses measured; {cheapest}."
    return _praise(results, found.best)


def _praise(results: Results, arm: str) -> str:
    cost = change(results, arm, "perplexity", MEAN)
    assert cost is not None
    parts: list[str] = []
    gained = True
    for size in headline_sizes(results):
        saved = miss_change(results, arm, size)
        assert saved is not None
        gained = gained and saved.mean < 0
        more = "fewer" if saved.mean < 0 else "more"
        what = f"{more} with {size}" if parts else f"{more} expert loads than base with {size} LRU slots per layer"
        parts.append(f"{_size(saved, PERCENT)} {what}")
    seeds = f" ({cost.spread.n} seeds)" if cost.spread.n > 1 else ""
    opening = "The best arm" if gained else "No arm within the limit saves loads at every size; the best of them"
    return (
        f"{opening}, {arm}{seeds}, needs {' and '.join(parts)}, at {FINE_CHANGE.spread(cost.spread)} mean perplexity "
        f"(limit {LIMIT_TEXT}); {_tasks(results, arm)}."
    )


def _tasks(results: Results, arm: str) -> str:
    changes = {task: change(results, arm, "tasks", task) for task in names(results, "tasks")}
    measured = {task: found for task, found in changes.items() if found is not None}
    if not measured:
        return "no task was compared"
    falls = [task for task, found in measured.items() if found.excludes_zero and found.spread.mean < 0]
    if not falls:
        return "no task falls by more than its 95 % interval allows for"
    return "but " + ", ".join(f"{task} falls by {_size(measured[task].spread, POINTS)}" for task in falls)


def _size(value: Spread, unit: Unit) -> str:
    """Without its sign, for sentences that say the direction in words."""
    return replace(unit, signed=False).spread(replace(value, mean=abs(value.mean)))


DEFINITIONS = (
    (
        "EOR",
        "expert reuse rate: the share of a token's chosen experts that the token before it chose too, mean over "
        "layers and tokens, measured on given text. Chance is K / E, what choosing at random would give.",
    ),
    (
        "Miss",
        "one chosen expert of one layer and token that the cache does not hold and that must be loaded. A cache of C "
        "slots per layer starts empty with every request, and a token's K experts arrive together. Miss rate = misses "
        "/ accesses; hit rate = 1 − miss rate.",
    ),
    (
        "First touch",
        "the first use of an expert in a request. Every policy misses it, so misses are also given without.",
    ),
    ("LRU, LFU, FIFO", "evict what was used least recently, least often, or loaded first."),
    (
        "Belady",
        "the optimum: evict what is needed again last. It needs to know the future, so it is a bound, not a policy to "
        "run. Regret = misses / Belady's misses at the same size.",
    ),
    (
        "Demand",
        "the expert bytes that one token asks for: layers × K × the bytes of one expert. An LRU pool shared by all "
        "layers that is smaller than one demand hits nothing, whatever the routing: a layer's experts are evicted "
        "before its next turn.",
    ),
    ("Bytes per token", "expert bytes read during decoding, per token, counted by the engine."),
    ("TTFT, TPOT", "time to the first token, and per output token after it."),
    (
        "Perplexity change",
        "relative, per token, on test text; the mean is geometric over domains. Word perplexity is the same loss "
        "spread over fewer units, so it moves by a larger factor.",
    ),
    (
        "Interval",
        "95 %, paired: the same items scored by base and by the tuned model, so it holds the noise of the items and "
        "not that of training. Differences are tuned minus base. With several seeds the means of the seeds' bounds are "
        "shown; the spread of training is in ±.",
    ),
    ("±", "standard deviation over the n seeds of an arm. A single seed has none."),
    (
        "Load entropy, CV",
        "how evenly a layer's experts are used: entropy in nats (ln E is perfectly even) and the standard deviation "
        "of loads over their mean (0 is perfectly even). A dead expert was never chosen.",
    ),
)

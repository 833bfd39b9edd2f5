"""The report's tables on memory budgets: what each is divided into, and what that would cost every arm."""

from typing import Any

from evaluation.report.summary import over_base, pick, runs_of, spread
from evaluation.report.tables import Table
from evaluation.report.wording import CHANGE, COUNT, MILLISECONDS, PLAIN, bytes_text, data_size
from evaluation.results import Results, Run

PARTS = {
    "resident weights": "resident_bytes",
    "read buffers": "buffer_bytes",
    "KV cache": "kv_bytes",
    "activations": "activation_bytes",
    "expert cache": "expert_cache_bytes",
}
Plan = dict[str, Any]


def plan_tables(results: Results) -> list[Table]:
    """Empty where no budget was divided."""
    return [_divisions(results), _costs(results)] if results["plans"] else []


def _divisions(results: Results) -> Table:
    rows = [
        [
            _name(plan), *(bytes_text(plan["division"][key]) for key in PARTS.values()),
            f"{COUNT.text(plan['division']['slots'])} of {COUNT.text(_all_experts(results))}",
        ]
        for plan in results["plans"]
    ]  # fmt: skip
    context = COUNT.text(results["plans"][0]["division"]["context_tokens"])
    note = (
        f"Residents are measured, keys, values and activations of {context} tokens worked out; experts get what is left. "
        "Counted is what the process holds beyond the interpreter and libraries."
    )
    return Table("Budgets divided", ["budget", *PARTS, "experts held"], rows, note)


def _costs(results: Results) -> Table:
    rows = [
        [_name(plan), arm, *_cells(results, arm, plan)]
        for plan in results["plans"]
        for arm in results["arms"]
        if any(misses_per_token(run, plan) is not None for run in runs_of(results, arm))
    ]
    note = (
        "One LRU pool for all layers on the traced text; TPOT is the measured time of computing plus the bytes over "
        f"the measured read bandwidth, {bytes_text(results['plans'][0]['read_bandwidth']['bytes_per_second'])}/s."
    )
    header = ["budget", "arm", "misses / token", "against base", "bytes / token", "TPOT, expected"]
    return Table("What they would cost", header, rows, note, text_columns=2)


def _cells(results: Results, arm: str, plan: Plan) -> list[str]:
    misses = spread(misses_per_token(run, plan) for run in runs_of(results, arm))
    expert_bytes = results["model"]["expert_bytes"]
    read = spread(_scaled(misses_per_token(run, plan), expert_bytes) for run in runs_of(results, arm))
    tpot = spread(expected_tpot_ms(run, plan, expert_bytes) for run in runs_of(results, arm))
    against = over_base(results, arm, lambda run: misses_per_token(run, plan))
    return [
        PLAIN.spread(misses),
        CHANGE.spread(against),
        bytes_text(read),
        MILLISECONDS.spread(tpot),
    ]


def misses_per_token(run: Run, plan: Plan) -> float | None:
    """Of a global LRU of the plan's size; None where it was not measured."""
    misses, tokens = pick(run, "lru_curves", "global", "misses"), pick(run, "routing", "n_tokens")
    if not misses or not tokens:
        return None
    return float(misses[min(int(plan["division"]["slots"]), len(misses) - 1)] / tokens)


def expected_tpot_ms(run: Run, plan: Plan, expert_bytes: float | None) -> float | None:
    """Computing and reading one after the other, which is an upper bound: the engine overlaps them."""
    read_bytes, compute_ms = _scaled(misses_per_token(run, plan), expert_bytes), plan["measured"]["compute_ms"]
    if read_bytes is None or compute_ms is None:
        return None
    return float(compute_ms + 1e3 * read_bytes / plan["read_bandwidth"]["bytes_per_second"])


def _scaled(value: float | None, factor: float | None) -> float | None:
    return None if value is None or factor is None else value * factor


def _all_experts(results: Results) -> float | None:
    layers, experts = results["model"]["layers"], results["model"]["experts"]
    return None if layers is None or experts is None else layers * experts


def _name(plan: Plan) -> str:
    budget = plan["division"]["budget_bytes"]
    return data_size(budget).text(budget)

"""The report's tables on memory budgets: what each is divided into, and what that would cost every arm."""

from functools import partial

from evaluation.report import summary
from evaluation.report.numbers import CHANGE, COUNT, MILLISECONDS, MISSING, PLAIN, bytes_text
from evaluation.report.summary import Number, seed_mean
from evaluation.report.tables import Table
from evaluation.results import Plan, Results, Run

PARTS = {
    "resident weights": "resident_bytes",
    "read buffers": "buffer_bytes",
    "KV cache": "kv_bytes",
    "activations": "activation_bytes",
    "expert cache": "expert_cache_bytes",
}


def plan_tables(results: Results) -> list[Table]:
    """What budgets become, and what they would cost where one is large enough; empty where none was asked for."""
    divided = [_divisions(results)] if results.plans or results.budgets_too_small else []
    return [*divided, _costs(results)] if results.plans else divided


def _divisions(results: Results) -> Table:
    rows = [
        [f"{budget.memory_budget}\ntoo small: {budget.too_small}", *[MISSING] * (len(PARTS) + 1)]
        for budget in results.budgets_too_small
    ]
    for plan in results.plans:
        parts = [bytes_text(getattr(plan.division, key)) for key in PARTS.values()]
        held = f"{COUNT.text(plan.division.slots)} of {COUNT.text(_times(results.model.layers, results.model.experts))}"
        rows.append([_name(plan), *parts, held])
    context = f" of {COUNT.text(results.plans[0].division.context_tokens)} tokens" if results.plans else ""
    note = (
        f"Residents are measured, keys, values and activations{context} worked out; experts get what is left. "
        "Counted is what the process holds beyond the interpreter and libraries."
    )
    return Table("Budgets divided", ["budget", *PARTS, "experts held"], rows, note)


def _costs(results: Results) -> Table:
    rows = [
        [_name(plan), arm, *_cost_cells(results, arm, plan)]
        for plan in results.plans
        for arm in results.arms
        if any(misses_per_token(run, plan) is not None for run in results.arms[arm].runs)
    ]
    note = (
        "One LRU pool for all layers on the traced text; TPOT is the measured time of computing plus the bytes over "
        f"the measured read bandwidth, {bytes_text(results.plans[0].read_bandwidth.bytes_per_second)}/s."
    )
    header = ["budget", "arm", "misses / token", "against base", "bytes / token", "TPOT, expected"]
    return Table("What they would cost", header, rows, note, text_columns=2)


def _cost_cells(results: Results, arm: str, plan: Plan) -> list[str]:
    runs, expert_bytes = results.arms[arm].runs, results.model.expert_bytes
    misses = [misses_per_token(run, plan) for run in runs]
    return [
        PLAIN.over_seeds(seed_mean(misses)),
        CHANGE.over_seeds(summary.over_base(results, arm, partial(misses_per_token, plan=plan))),
        bytes_text(seed_mean(_times(count, expert_bytes) for count in misses)),
        MILLISECONDS.over_seeds(seed_mean(expected_tpot_ms(run, plan, expert_bytes) for run in runs)),
    ]


def misses_per_token(run: Run, plan: Plan) -> Number:
    """Misses of a global LRU of the plan's size; None where they were not measured."""
    misses = run.lru_curves.shared.misses if run.lru_curves else []
    tokens = run.routing.n_tokens if run.routing else None
    if not misses or not tokens:
        return None
    return misses[min(plan.division.slots, len(misses) - 1)] / tokens


def expected_tpot_ms(run: Run, plan: Plan, expert_bytes: Number) -> Number:
    """Computing and reading one after the other, which is an upper bound: the engine overlaps them."""
    read_bytes, compute_ms = _times(misses_per_token(run, plan), expert_bytes), plan.measured.compute_ms
    if read_bytes is None or compute_ms is None:
        return None
    return compute_ms + 1e3 * read_bytes / plan.read_bandwidth.bytes_per_second


def _times(value: Number, factor: Number) -> Number:
    return None if value is None or factor is None else value * factor


def _name(plan: Plan) -> str:
    """The budget's size, on a second line what was asked for if that was in parts of something."""
    size, asked = bytes_text(plan.division.budget_bytes), plan.memory_budget or ""
    return f"{size}\n{asked}" if "%" in asked or "smallest" in asked else size

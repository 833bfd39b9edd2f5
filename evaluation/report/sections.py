"""The report's contents in order, the same for Markdown and HTML: what each section says, draws and tabulates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from evaluation.report import plots, tables
from evaluation.report.numbers import COUNT, MISSING, SECONDS, bytes_text
from evaluation.report.plan_tables import plan_tables
from evaluation.report.quality_tables import differences_table, frontier_table, values_table
from evaluation.report.tables import Table
from evaluation.report.wording import DEFINITIONS, decode_policy, headline
from evaluation.results import Results

TITLE = "Expert reuse before and after router fine-tuning"


@dataclass(frozen=True)
class Section:
    """`folded` tables are closed until the reader opens them; `absent` stands for a figure without data."""

    title: str
    lead: str = ""
    figure: Callable[[Results], str | None] | None = None
    absent: str = "Not measured in this run."
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()


def contents(results: Results) -> dict[str, Any]:
    """What the templates of both reports are filled with."""
    return {
        "title": TITLE,
        "subtitle": subtitle(results),
        "headline": headline(results),
        "headline_table": tables.headline_table(results),
        "sections": sections(results),
        "reproduction": reproduction(results),
        "config": yaml.safe_dump(results.reproduce.config, sort_keys=False, allow_unicode=True),
        "definitions": DEFINITIONS,
    }


def sections(results: Results) -> list[Section]:
    """All of it but the opening, the definitions and the configuration."""
    policy = decode_policy(results)
    return [
        Section(
            "Quality against bytes per token",
            "The price of reading less: left is fewer bytes, lower is better quality. Bytes as the engine read them "
            f"while decoding (cache: {policy}).",
            figure=plots.frontier_figure,
            absent="No tuned arm was both decoded and compared with base in this run.",
            folded=[frontier_table(results)],
        ),
        Section(
            "Misses against cache size",
            "Share of expert accesses that must be loaded, replayed from a routing trace. Lower is better; Belady is "
            "the bound that no policy can beat on the same routing.",
            figure=plots.miss_rate_figure,
            folded=tables.miss_tables(results),
        ),
        Section(
            "Reuse per layer",
            "How often a token finds its experts among those of the token before it.",
            figure=plots.reuse_figure,
            folded=[tables.layer_table(results)],
        ),
        Section(
            "Training",
            "Each arm starts from the base; only router weights change. "
            f"One line per seed, moving average over {plots.SMOOTHING} records.",
            figure=plots.training_figure,
            absent="No arm was trained in this run.",
            folded=[tables.arms_table(results)],
        ),
        Section(
            "Quality",
            "Tuned minus base with paired 95 % intervals: an interval across zero is no evidence of a change.",
            figure=plots.quality_figure,
            absent="No tuned arm was compared with base in this run.",
            tables=[values_table(results)],
            folded=[differences_table(results)],
        ),
        Section(
            "Decode under a memory budget",
            f"Real greedy decoding with the expert weights on disk and a cache of the given size ({policy}).",
            figure=plots.decode_figure,
            folded=[tables.decode_table(results)],
        ),
        Section(
            "What a memory budget becomes",
            "One budget for everything: what is fixed, what is left for experts, and what an LRU cache of that size "
            "would cost each arm on the traced text.",
            absent="No budget was divided in this run.",
            tables=plan_tables(results),
        ),
        Section(
            "Routing health", "Reuse must not be bought by starving experts.", tables=[tables.balance_table(results)]
        ),
    ]


def subtitle(results: Results) -> str:
    """The model in one line."""
    model = results.model
    return (
        f"{model.name} · {COUNT.text(model.n_parameters)} parameters ({model.dtype}) · {COUNT.text(model.layers)} layers of "
        f"{COUNT.text(model.experts)} experts · {COUNT.text(model.top_k)} chosen per token · "
        f"{bytes_text(model.expert_bytes)} per expert, {bytes_text(model.token_demand_bytes)} per token"
    )


def reproduction(results: Results) -> Table:
    """Everything but the configuration, which is shown as a whole."""
    made = results.reproduce
    rows = [
        ["command", made.command or MISSING],
        ["commit", made.commit or f"{MISSING} (not run from a git checkout)"],
        ["created", results.created or MISSING],
        *([name.replace("_", " "), MISSING if value is None else str(value)] for name, value in made.machine.items()),
        *([f"time: {name}", SECONDS.text(value)] for name, value in made.seconds.items()),
    ]
    return Table("How to reproduce", ["what", "value"], rows, text_columns=2)

"""The report's contents in order, the same for Markdown and HTML: what each section draws and tabulates.

What it says is in `templates/prose.yaml`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from evaluation.report import plots, tables
from evaluation.report.drawing import TEMPLATES
from evaluation.report.group_tables import group_tables
from evaluation.report.numbers import COUNT, MISSING, SECONDS, bytes_text
from evaluation.report.plan_tables import plan_tables
from evaluation.report.quality_tables import differences_table, frontier_table, inner_table, values_table
from evaluation.report.tables import Table
from evaluation.report.wording import decode_policy, headline
from evaluation.results import Results

PROSE = yaml.safe_load((TEMPLATES / "prose.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Section:
    """`folded` tables are closed until the reader opens them; `absent` stands for a figure without data."""

    title: str
    lead: str
    figure: Callable[[Results], str | None] | None = None
    absent: str = "Not measured in this run."
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()


def contents(results: Results) -> dict[str, Any]:
    """What the templates of both reports are filled with."""
    return {
        "title": PROSE["title"],
        "subtitle": subtitle(results),
        "headline": headline(results),
        "headline_table": tables.headline_table(results),
        "page": "report.html",
        "sections": sections(results),
        "reproduction": reproduction(results),
        "config": yaml.safe_dump(results.reproduce.config, sort_keys=False, allow_unicode=True),
        "definitions": PROSE["definitions"],
    }


def sections(results: Results) -> list[Section]:
    """All of it but the opening, the definitions and the configuration."""
    shown: dict[str, dict[str, Any]] = {
        "frontier": {"figure": plots.frontier_figure, "folded": [frontier_table(results)]},
        "misses": {"figure": plots.miss_rate_figure, "folded": tables.miss_tables(results)},
        "reuse": {"figure": plots.reuse_figure, "folded": [tables.layer_table(results)]},
        "training": {"figure": plots.training_figure, "folded": [tables.arms_table(results)]},
        "quality": {
            "figure": plots.quality_figure,
            "tables": [values_table(results)],
            "folded": [differences_table(results), inner_table(results)],
        },
        "groups": {"tables": group_tables(results)},
        "decode": {"figure": plots.decode_figure, "folded": [tables.decode_table(results)]},
        "budgets": {"tables": plan_tables(results)},
        "health": {"tables": [tables.balance_table(results)]},
    }
    facts = {"policy": decode_policy(results), "records": plots.SMOOTHING}
    said = PROSE["sections"].items()
    return [Section(**{**words, "lead": words["lead"].format(**facts)}, **shown[name]) for name, words in said]


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

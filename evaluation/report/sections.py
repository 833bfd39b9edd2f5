"""The report's contents in order, the same for Markdown and HTML: what each section says, draws and tabulates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from evaluation.report import plots, tables
from evaluation.report.plan_tables import plan_tables
from evaluation.report.quality_tables import differences_table, frontier_table, values_table
from evaluation.report.tables import Table
from evaluation.report.wording import COUNT, SECONDS, bytes_text
from evaluation.results import Results

Figure = Callable[[Results], str | None]


@dataclass(frozen=True)
class Section:
    """`folded` tables are closed until the reader opens them; `absent` stands for a figure without data."""

    title: str
    lead: str = ""
    figure: Figure | None = None
    absent: str = "Not measured in this run."
    tables: Sequence[Table] = field(default_factory=tuple)
    folded: Sequence[Table] = field(default_factory=tuple)


def sections(results: Results) -> list[Section]:
    """All of it but the opening, the definitions and the configuration."""
    misses, first, regret = tables.miss_tables(results)
    balance, per_layer = tables.routing_tables(results)
    return [
        Section(
            "Quality against bytes per token",
            "The price of reading less: left is fewer bytes, lower is better quality. Bytes as the engine read them.",
            figure=plots.frontier_figure,
            absent="No tuned arm was both decoded and compared with base in this run.",
            folded=[frontier_table(results)],
        ),
        Section(
            "Misses against cache size",
            "Share of expert accesses that must be loaded, replayed from a routing trace. Lower is better; Belady is "
            "the bound that no policy can beat on the same routing.",
            figure=plots.miss_rate_figure,
            folded=[misses, first, regret],
        ),
        Section(
            "Reuse per layer",
            "How often a token finds its experts among those of the token before it.",
            figure=plots.reuse_figure,
            folded=[per_layer],
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
            "Real greedy decoding with the expert weights on disk and a cache of the given size.",
            figure=plots.decode_figure,
            folded=[tables.decode_table(results)],
        ),
        Section(
            "What a memory budget becomes",
            "One budget for everything: what is fixed, what is left for experts, and what an LRU cache of that size would "
            "cost each arm on the traced text.",
            absent="No budget was divided in this run.",
            tables=plan_tables(results),
        ),
        Section("Routing health", "Reuse must not be bought by starving experts.", tables=[balance]),
    ]


def subtitle(results: Results) -> str:
    """The model in one line."""
    model = results["model"]
    parts = [
        str(model["name"]),
        f"{COUNT.text(model['n_parameters'])} parameters ({model['dtype']})",
        f"{COUNT.text(model['layers'])} layers of {COUNT.text(model['experts'])} experts",
        f"{COUNT.text(model['top_k'])} chosen per token",
        f"{bytes_text(model['expert_bytes'])} per expert, {bytes_text(model['token_demand_bytes'])} per token",
    ]
    return " · ".join(parts)


def reproduction(results: Results) -> Table:
    """Everything but the configuration, which is shown as a whole."""
    made = results["reproduce"]
    rows = [
        ["command", made["command"] or "–"],
        ["commit", made["commit"] or "– (not run from a git checkout)"],
        ["created", results["created"] or "–"],
        *([name.replace("_", " "), "–" if value is None else str(value)] for name, value in made["machine"].items()),
        *([f"time: {name}", SECONDS.text(value)] for name, value in made["seconds"].items()),
    ]
    return Table("How to reproduce", ["what", "value"], rows, text_columns=2)

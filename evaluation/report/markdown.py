"""`report.md` and a self-contained `report.html` of the results of a run.

Only presents: every number is in the results or is arithmetic on them (`summary.py`). `sections.py` has the contents,
`page.py` the HTML; the Markdown is here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.files import prepare, write_json, writing_aside
from evaluation.report.page import TITLE, config_text, page
from evaluation.report.sections import reproduction, sections, subtitle
from evaluation.report.tables import Table, headline_table
from evaluation.report.wording import DEFINITIONS, headline
from evaluation.results import Results, check_results


def write_results(results: Mapping[str, Any], output_dir: Path) -> None:
    """Write `results.json`, `report.md` and `report.html` into one folder, which is made if need be."""
    write_json(prepare(output_dir / "results.json"), results)
    write_report(results, output_dir)


def write_report(results: Mapping[str, Any], output_dir: Path) -> None:
    """Write `report.md` and `report.html` into `output_dir`, which is made if need be.

    Raises:
        UserError: `results` is not what the report reads, or `output_dir` cannot be made.
    """
    check_results(results)
    for name, text in (("report.md", markdown(results)), ("report.html", page(results))):
        with writing_aside(prepare(output_dir / name)) as aside:
            aside.write_text(text, encoding="utf-8")


def markdown(results: Results) -> str:
    """The report in GitHub's Markdown; the pictures are in `report.html`."""
    parts = [
        f"# {TITLE}",
        _escape(subtitle(results)),
        f"**{_escape(headline(results))}**",
        "The pictures are in [report.html](report.html).",
        _table(headline_table(results)),
    ]
    for section in sections(results):
        shown = [table for table in [*section.tables, *section.folded] if table.rows]
        parts += [f"## {section.title}", section.lead]
        parts += [f"### {table.title}\n\n{_table(table)}" for table in shown] or [section.absent]
    parts += [
        "## How to reproduce",
        _table(reproduction(results)),
        f"<details><summary>Configuration, resolved</summary>\n\n```yaml\n{config_text(results)}```\n\n</details>",
        "## How to read this",
        "\n".join(f"- **{_escape(term)}**: {_escape(text)}" for term, text in DEFINITIONS),
    ]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    rules = ["---" if i < table.text_columns else "---:" for i in range(len(table.header))]
    rows = [_row(row, bold=table.marked is not None and row[0].split("\n")[0] == table.marked) for row in table.rows]
    lines = [_row(table.header), "| " + " | ".join(rules) + " |", *rows]
    return "\n".join(lines) + (f"\n\n{_escape(table.note)}" if table.note else "")


def _row(cells: Sequence[str], *, bold: bool = False) -> str:
    written = ["<br>".join(map(_escape, cell.split("\n"))) for cell in cells]
    if bold:
        written[0] = f"**{written[0]}**"
    return "| " + " | ".join(written) + " |"


def _escape(text: str) -> str:
    """Text that Markdown must not take for markup."""
    for character in "\\|*_<":
        text = text.replace(character, "\\" + character)
    return text

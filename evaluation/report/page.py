"""The report as one HTML file: inline style and pictures, no script, nothing fetched from anywhere."""

from html import escape

import yaml

from evaluation.report.drawing import colours
from evaluation.report.sections import Section, reproduction, sections, subtitle
from evaluation.report.tables import Table, headline_table
from evaluation.report.wording import DEFINITIONS, headline
from evaluation.results import Results

TITLE = "Expert reuse before and after router fine-tuning"
STYLE = """
:root { --ink: #22272e; --quiet: #626b76; --line: #e3e6ea; --soft: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 32px 72px; }
h1 { font-size: 28px; line-height: 1.25; font-weight: 650; margin: 0 0 6px; }
h2 { font-size: 20px; font-weight: 650; margin: 52px 0 4px; padding-top: 20px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; font-weight: 650; margin: 22px 0 6px; }
p { margin: 4px 0 14px; max-width: 78ch; }
.quiet, .note { color: var(--quiet); font-size: 14px; }
.note { margin-top: 8px; max-width: none; }
h1 + .quiet { max-width: none; }
.headline { font-size: 19px; line-height: 1.5; margin: 26px 0 20px; padding: 14px 20px; background: var(--soft);
  border-left: 4px solid #0072b2; max-width: none; }
figure { margin: 12px 0 8px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; min-width: 60%; }
th, td { padding: 6px 11px; border-bottom: 1px solid var(--line);
  text-align: right; vertical-align: top; white-space: nowrap; }
th { font-weight: 600; color: var(--quiet); vertical-align: bottom; border-bottom: 1.5px solid #c9ced5; }
th:first-child, td:first-child { padding-left: 8px; }
.text { text-align: left; }
td.wide { white-space: normal; overflow-wrap: anywhere; max-width: 640px; }
td small, th small { display: block; color: var(--quiet); font-size: 12.5px; font-weight: 400; }
tr.marked td { background: #eef5fb; font-weight: 600; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px; }
details { margin: 12px 0; }
summary { cursor: pointer; color: #005a8d; font-size: 14.5px; }
pre { background: var(--soft); padding: 14px 16px; overflow-x: auto; font-size: 13px; line-height: 1.45; }
dl { display: grid; grid-template-columns: 160px 1fr; gap: 8px 20px; font-size: 14.5px; margin: 14px 0; }
dt { font-weight: 600; } dd { margin: 0; max-width: 82ch; }
@media print { h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""


def page(results: Results) -> str:
    """The whole document."""
    dots = colours(results)
    body = [
        f"<h1>{TITLE}</h1>",
        f'<p class="quiet">{escape(subtitle(results))}</p>',
        f'<p class="headline">{escape(headline(results))}</p>',
        _table(headline_table(results), dots),
        *(_section(section, results, dots) for section in sections(results)),
        "<h2>How to reproduce</h2>",
        _table(reproduction(results), {}),
        f"<details><summary>Configuration, resolved</summary><pre>{escape(config_text(results))}</pre></details>",
        "<h2>How to read this</h2>",
        "<dl>" + "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in DEFINITIONS) + "</dl>",
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{TITLE}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def config_text(results: Results) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(results["reproduce"]["config"], sort_keys=False, allow_unicode=True)


def _section(section: Section, results: Results, dots: dict[str, str]) -> str:
    drawn = section.figure(results) if section.figure else None
    parts = [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.lead)}</p>"]
    if drawn:
        parts.append(f"<figure>{drawn}</figure>")
    elif section.figure or not [*section.tables, *section.folded]:
        parts.append(f'<p class="quiet">{escape(section.absent)}</p>')
    parts += [f"<h3>{escape(table.title)}</h3>{_table(table, dots)}" for table in section.tables if table.rows]
    parts += [
        f"<details><summary>Table: {escape(table.title.lower())}</summary>{_table(table, dots)}</details>"
        for table in section.folded
        if table.rows
    ]
    return "\n".join(parts)


def _table(table: Table, dots: dict[str, str]) -> str:
    head = "".join(_cell("th", text, i, table, dots) for i, text in enumerate(table.header))
    rows = []
    for row in table.rows:
        marked = ' class="marked"' if table.marked is not None and _name(row[0]) == table.marked else ""
        rows.append(
            f"<tr{marked}>" + "".join(_cell("td", text, i, table, dots) for i, text in enumerate(row)) + "</tr>"
        )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{note}'
    )


def _cell(tag: str, text: str, column: int, table: Table, dots: dict[str, str]) -> str:
    first, *rest = text.split("\n")
    # Only the first column names arms among words; a header cell may, beyond the columns of words.
    named = column == 0 if tag == "td" else column >= table.text_columns
    dot = f'<i class="dot" style="background:{dots[first]}"></i>' if named and first in dots else ""
    lesser = "".join(f"<small>{escape(line)}</small>" for line in rest)
    kinds = ["text"] if column < table.text_columns else []
    if kinds and tag == "td" and len(text) > 60:
        kinds.append("wide")
    attribute = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<{tag}{attribute}>{dot}{escape(first)}{lesser}</{tag}>"


def _name(cell: str) -> str:
    return cell.split("\n")[0]

"""The reports of a run: `report.md`, and `report.html`, one file without script that fetches nothing from anywhere.

Only presents: every number is in the results or is arithmetic on them (`summary.py`). `sections.py` has the contents,
`templates/` the layout.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from configs.files import prepare, write_json, write_text
from evaluation.frontier.result import FrontierResult
from evaluation.report.drawing import TEMPLATES, colours
from evaluation.report.frontier_page import frontier_contents, report_sections, write_frontier_picture
from evaluation.report.sections import contents
from evaluation.results import Results


def write_results(results: Results, output_dir: Path, frontier: FrontierResult | None = None) -> None:
    """Write `results.json`, `report.md` and `report.html` into one folder, which is made if need be."""
    write_json(prepare(output_dir / "results.json"), results.model_dump(by_alias=True))
    write_report(results, output_dir, frontier)


def write_report(results: Results, output_dir: Path, frontier: FrontierResult | None = None) -> None:
    """Write `report.md` and `report.html` into a folder, which is made if need be; a `UserError` if it cannot be.

    Args:
        frontier: of the same arms, to be shown too.
    """
    for name, text in (("report.md", markdown(results, frontier)), ("report.html", page(results, frontier))):
        write_text(prepare(output_dir / name), text)


def markdown(results: Results, frontier: FrontierResult | None = None) -> str:
    """The report in GitHub's Markdown; the pictures are in `report.html`."""
    return _markdown(_contents(results, frontier))


def page(results: Results, frontier: FrontierResult | None = None) -> str:
    """The report as one HTML file: inline style and pictures."""
    template = _templates(autoescape=True).get_template("report.html.j2")
    return template.render(_contents(results, frontier), results=results, colours=colours(results))


def _contents(results: Results, frontier: FrontierResult | None) -> dict[str, Any]:
    found = contents(results)
    if frontier is not None:
        first, *others = found["sections"]
        found["sections"] = [first, *report_sections(frontier), *others]
    return found


def _markdown(filled: dict[str, Any]) -> str:
    environment = _templates(autoescape=False)
    environment.filters["plain"] = _escape
    return environment.get_template("report.md.j2").render(filled)


def write_frontier_page(found: FrontierResult, output_dir: Path) -> None:
    """Write `frontier.md`, `frontier.html` and `frontier.png` into a folder; a `UserError` if it cannot be."""
    filled = frontier_contents(found)
    html = _templates(autoescape=True).get_template("report.html.j2").render(filled, results=found, colours={})
    for name, document in (("frontier.md", _markdown(filled)), ("frontier.html", html)):
        write_text(prepare(output_dir / name), document)
    write_frontier_picture(found, output_dir / "frontier.png")


def _templates(*, autoescape: bool) -> Environment:
    """The layouts; a name that the contents lack is an error."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=autoescape, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip


def _escape(text: str) -> str:
    """Text that Markdown must not take for markup."""
    for character in "\\|*_<":
        text = text.replace(character, "\\" + character)
    return text

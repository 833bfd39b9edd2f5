"""The reports of a run: `report.md`, and `report.html`, one file without script that fetches nothing from anywhere.

Only presents: every number is in the results or is arithmetic on them (`summary.py`). `sections.py` has the contents,
`templates/` the layout.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from configs.files import prepare, write_json, write_text
from evaluation.frontier.result import FrontierResult
from evaluation.report.drawing import TEMPLATES, colours
from evaluation.report.frontier_page import frontier_contents, write_frontier_picture
from evaluation.report.sections import contents
from evaluation.results import Results


def write_results(results: Results, output_dir: Path) -> None:
    """Write `results.json`, `report.md` and `report.html` into one folder, which is made if need be."""
    write_json(prepare(output_dir / "results.json"), results.model_dump(by_alias=True))
    write_report(results, output_dir)


def write_report(results: Results, output_dir: Path) -> None:
    """Write `report.md` and `report.html` into a folder, which is made if need be; a `UserError` if it cannot be."""
    for name, text in (("report.md", markdown(results)), ("report.html", page(results))):
        write_text(prepare(output_dir / name), text)


def markdown(results: Results) -> str:
    """The report in GitHub's Markdown; the pictures are in `report.html`."""
    environment = _templates(autoescape=False)
    environment.filters["plain"] = _escape
    return environment.get_template("report.md.j2").render(contents(results))


def page(results: Results) -> str:
    """The report as one HTML file: inline style and pictures."""
    template = _templates(autoescape=True).get_template("report.html.j2")
    return template.render(contents(results), results=results, colours=colours(results))


def write_frontier_page(found: FrontierResult, output_dir: Path) -> None:
    """Write `frontier.md`, `frontier.html` and `frontier.png` into a folder; a `UserError` if it cannot be."""
    contents_of = frontier_contents(found)
    environment = _templates(autoescape=False)
    environment.filters["plain"] = _escape
    text = environment.get_template("report.md.j2").render(contents_of)
    html = _templates(autoescape=True).get_template("report.html.j2").render(contents_of, results=found, colours={})
    for name, document in (("frontier.md", text), ("frontier.html", html)):
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

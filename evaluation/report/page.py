"""The report as one HTML file: inline style and pictures, no script, nothing fetched from anywhere.

How it looks is in `templates/report.html.j2`.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluation.report.drawing import colours
from evaluation.report.sections import contents
from evaluation.results import Results


def page(results: Results) -> str:
    """The whole document."""
    template = templates(autoescape=True).get_template("report.html.j2")
    return template.render(contents(results), results=results, colours=colours(results))


def templates(*, autoescape: bool) -> Environment:
    """The layouts; a name that the contents lack is an error."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )

"""The reports of a run: `report.md`, made here, and the self-contained `report.html` of `page.py`.

Only presents: every number is in the results or is arithmetic on them (`summary.py`). `sections.py` has the contents,
`templates/` the layout.
"""

from pathlib import Path

from configs.files import prepare, write_json, writing_aside
from evaluation.report.page import page, templates
from evaluation.report.sections import contents
from evaluation.results import Results


def write_results(results: Results, output_dir: Path) -> None:
    """Write `results.json`, `report.md` and `report.html` into one folder, which is made if need be."""
    write_json(prepare(output_dir / "results.json"), results.model_dump(by_alias=True))
    write_report(results, output_dir)


def write_report(results: Results, output_dir: Path) -> None:
    """Write `report.md` and `report.html` into `output_dir`, which is made if need be.

    Raises:
        UserError: `output_dir` cannot be made.
    """
    for name, text in (("report.md", markdown(results)), ("report.html", page(results))):
        with writing_aside(prepare(output_dir / name)) as aside:
            aside.write_text(text, encoding="utf-8")


def markdown(results: Results) -> str:
    """The report in GitHub's Markdown; the pictures are in `report.html`."""
    environment = templates(autoescape=False)
    environment.filters["plain"] = _escape
    return environment.get_template("report.md.j2").render(contents(results))


def _escape(text: str) -> str:
    """Text that Markdown must not take for markup."""
    for character in "\\|*_<":
        text = text.replace(character, "\\" + character)
    return text

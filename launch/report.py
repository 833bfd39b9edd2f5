"""`remoe report`: the report of a run again, from its `results.json`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from configs.command import parse
from evaluation.report.markdown import write_report
from evaluation.results import read_results


@dataclass(frozen=True)
class Report:
    """Write report.md and report.html from the results of a run; nothing is measured.

    example:
      remoe report runs/demo/results.json --output runs/demo
    """

    results: tyro.conf.Positional[str]  # results.json, as `remoe run` and `remoe evaluate` write it
    output: str | None = None  # folder to write into; left out: beside the results


def main(argv: Sequence[str] | None = None) -> None:
    """Read, check, write both reports, say where."""
    command = parse(Report, argv, prog="remoe report")
    output = Path(command.output or Path(command.results).parent)
    write_report(read_results(command.results), output)
    print(output / "report.html")

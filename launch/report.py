"""`remoe report`: the report of a run again, from its `results.json`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from configs.command import parse
from configs.files import prepare, prepare_folder
from evaluation.frontier.result import FRONTIER, read_frontier
from evaluation.report.documents import write_report
from evaluation.report.plots import write_frontier
from evaluation.results import read_results


@dataclass(frozen=True)
class Report:
    """Write report.md and report.html from the results of a run, with its frontier if it has one; nothing is measured.

    example:
      remoe report runs/demo/results.json --output runs/demo --frontier runs/demo/frontier.png
    """

    results: tyro.conf.Positional[str]  # results.json, as `remoe run` and `remoe evaluate` write it
    output: str | None = None  # folder to write into; left out: beside the results
    frontier: str | None = None  # also write the picture of quality against expert loads, as a PNG file


def main(argv: Sequence[str] | None = None) -> None:
    """Read, check, write both reports, say where."""
    command = parse(Report, argv, prog="remoe report")
    results = read_results(command.results)
    output = prepare_folder(command.output or Path(command.results).parent)
    beside = Path(command.results).parent / FRONTIER
    write_report(results, output, read_frontier(beside) if beside.exists() else None)
    if command.frontier is not None:
        write_frontier(results, prepare(command.frontier))
    print(output / "report.html")

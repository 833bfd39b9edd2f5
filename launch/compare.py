"""`remoe compare`: one report of several evaluations of one model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from configs.command import parse
from configs.files import prepare_folder
from configs.load import UserError
from evaluation.report.documents import write_results
from evaluation.report.merging import merged
from evaluation.results import read_results
from launch.narration import say_the_end


@dataclass(frozen=True)
class Compare:
    """Write one report of several evaluations of one model: other arms, machines, budgets or dates.

    Refused where they measured different things: another model, other tasks, other text.

    example:
      remoe compare runs/one/results.json runs/two/results.json --output runs/both
    """

    # results.json of two evaluations or more; changes are against the base of the first
    results: tyro.conf.Positional[tuple[str, ...]]
    output: str  # folder for results.json, report.md and report.html
    labels: tuple[str, ...] = ()  # what to call them; left out: their folders' names


def main(argv: Sequence[str] | None = None) -> None:
    """Read, check, write."""
    command = parse(Compare, argv, prog="remoe compare")
    if len(command.results) < 2:
        raise UserError("give the results.json of two evaluations or more; `remoe report` shows a single one")
    labels = command.labels or [Path(path).resolve().parent.name for path in command.results]
    if len(set(labels)) != len(command.results):
        raise UserError(
            f"{len(command.results)} results need as many different labels, found {', '.join(labels)}; give --labels"
        )
    together = merged({label: read_results(path) for label, path in zip(labels, command.results, strict=True)})
    output = prepare_folder(command.output)
    write_results(together, output)
    say_the_end(together, output)

"""`remoe frontier`: routers, levers, cache sizes and policies on one axis, quality against expert loads."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import transformers
import tyro
from rich.console import Console
from rich.table import Table

from configs.command import parse
from configs.files import prepare_folder, write_json, write_yaml
from configs.load import keys_help, load
from evaluation.engine.device import find_device
from evaluation.frontier.arguments import FrontierArguments
from evaluation.frontier.choice import Choice, choices, pareto, priced
from evaluation.frontier.measure import Frontier as Measurement
from evaluation.frontier.points import Interval, Point
from evaluation.machine import machine_facts
from evaluation.report.numbers import FINE_CHANGE, PERCENT, Unit
from launch.narration import say
from training.model.loading import load_tokenizer, local_folder
from training.run_folder.folder import code_commit


@dataclass(frozen=True)
class Frontier:
    """Measure what routers and levers cost in perplexity and save in expert loads, with intervals over texts.

    Every text is read token by token from an empty cache of its own. Strengths are chosen on one set of texts and reported on
    another. A frontier that was killed goes on with the same command.

    examples:
      remoe frontier configs/frontier/levers.yaml
      remoe frontier configs/frontier/levers.yaml model=DIR output_dir=runs/mine slots=[16] arms.mine=runs/mine/router_delta
    """

    config: tyro.conf.Positional[str]  # a YAML under configs/frontier/
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()  # key=value: overrides a key of the config


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all points, write frontier.json, print what was chosen at each price."""
    command = parse(Frontier, argv, prog="remoe frontier", epilog=keys_help(FrontierArguments))
    args = load(FrontierArguments, command.config, command.overrides)
    output, device = prepare_folder(args.output_dir), find_device(args.device)
    transformers.utils.logging.disable_progress_bar()
    write_yaml(output / "config.yaml", args)
    model_dir = local_folder(args.model)
    measurement = Measurement(args, model_dir, load_tokenizer(model_dir), device, kept=output / "answers")
    points = measurement.points(found=_say)
    chosen = choices(points, args.gates)
    prices = measurement.prices(priced(chosen, args.priced_at)) if args.new_tokens or args.with_tasks else []
    found = {
        "points": [point.model_dump() for point in points],
        "chosen": [choice.model_dump() for choice in chosen],
        "pareto": [point.model_dump(include={"arm", "lever", "slots", "policy"}) for point in pareto(points)],
        "prices": [price.model_dump() for price in prices],
        "reproduce": {
            "command": " ".join(["remoe frontier", *(sys.argv[2:] if argv is None else argv)]),
            "commit": code_commit(), "config": asdict(args), "machine": machine_facts(),
        },
    }  # fmt: skip
    write_json(output / "frontier.json", found)
    for slots in args.slots:
        Console().print(_table([choice for choice in chosen if choice.slots == slots], slots))
    print(f"All points are in {output / 'frontier.json'}")


def _say(point: Point) -> None:
    found = point.chosen_by
    saved = f"{PERCENT.text(found.fewer.value)} fewer loads at {FINE_CHANGE.text(found.cost.value)} perplexity"
    say(f"{point.arm}, lever {point.lever}, {point.slots} slots, {point.policy}: {saved}")


def _table(chosen: Sequence[Choice], slots: int) -> Table:
    """Kinds x prices: loads saved, the price that was really paid, and with what."""
    gates = list(dict.fromkeys(choice.gate for choice in chosen))
    table = Table("", *(f"at most {FINE_CHANGE.text(gate)}" for gate in gates), show_lines=True)
    table.title = f"fewer expert loads than the untouched model with LRU, {slots} slots a layer"
    table.caption = (
        "chosen on other texts; in brackets 95 % intervals over texts; below the perplexity that it cost here"
    )
    for kind in dict.fromkeys(choice.kind for choice in chosen):
        table.add_row(kind, *(_cell(choice.point) for choice in chosen if choice.kind == kind))
    return table


def _cell(point: Point | None) -> str:
    if point is None:
        return "none"
    found = point.reported
    return f"{_text(found.fewer, PERCENT)}\n{_text(found.cost, FINE_CHANGE)}\n{point.lever}, {point.policy}"


def _text(found: Interval, unit: Unit) -> str:
    return f"{unit.text(found.value)} \\[{unit.bare(found.low)}, {unit.bare(found.high)}]"

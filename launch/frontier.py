"""`remoe frontier`: routers, levers, cache sizes and policies on one axis, quality against expert loads."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from configs.command import parse, run
from configs.files import prepare_folder, write_json, write_yaml
from configs.load import UserError, keys_help, load
from evaluation.engine.device import find_device
from evaluation.frontier.arguments import FrontierArguments
from evaluation.frontier.choice import choices, pareto, priced
from evaluation.frontier.measure import Frontier as Measurement
from evaluation.frontier.result import FrontierResult, Point
from evaluation.machine import machine_facts
from evaluation.quality.batches import process_index
from evaluation.report import tables as report
from evaluation.report.documents import write_frontier_page
from evaluation.report.frontier_page import frontier_table, gate_sentence
from evaluation.report.numbers import FINE_CHANGE, PERCENT
from evaluation.results import Reproduction
from launch.narration import say
from training.model.loading import load_tokenizer, local_folder
from training.run_folder.folder import code_commit
from training.sharding.launcher import is_asked_to_shard
from training.train import in_processes


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
    # share the passes out over the processes that this YAML of accelerate describes, each with a whole model
    accelerate_config: str | None = None
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()  # key=value: overrides a key of the config


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all points, write frontier.json and its page, print what was chosen at each price."""
    command = parse(Frontier, argv, prog="remoe frontier", epilog=keys_help(FrontierArguments))
    args = load(FrontierArguments, command.config, command.overrides)
    if command.accelerate_config is not None:
        in_processes(
            command.accelerate_config, ["launch.frontier", command.config, *command.overrides], what="the frontier"
        )
        return
    line = " ".join(["remoe frontier", command.config, *command.overrides])
    found = measure(args, prepare_folder(args.output_dir), command=line)
    if process_index() > 0:
        return
    for slots in args.slots:
        Console().print(_table(frontier_table(found, slots)))
    print(gate_sentence(found))
    print(f"All points and the page are in {Path(args.output_dir) / 'frontier.html'}")


def measure(args: FrontierArguments, output: Path, *, command: str) -> FrontierResult:
    """Measure, write frontier.json, frontier.html, frontier.md and frontier.png; of several processes the first writes."""
    started, device = time.perf_counter(), find_device(args.device)
    transformers.utils.logging.disable_progress_bar()
    if is_asked_to_shard():
        raise UserError(
            "a frontier shares passes out over processes that hold the whole model each; name an accelerate "
            "config without FSDP and DeepSpeed, as configs/accelerate/cpu_2_processes.yaml"
        )
    if process_index() == 0:
        write_yaml(output / "config.yaml", args)
    model_dir = local_folder(args.model)
    measurement = Measurement(args, model_dir, load_tokenizer(model_dir), device, kept=output / "answers")
    points = measurement.points(found=_say)
    chosen = choices(points, args.gates)
    prices = measurement.prices(priced(chosen, args.priced_at)) if args.new_tokens or args.with_tasks else []
    made = Reproduction(
        command=command, commit=code_commit(), config=asdict(args), machine=machine_facts(),
        seconds={"frontier": time.perf_counter() - started},
    )  # fmt: skip
    by_size = [[point for point in points if point.slots == slots] for slots in args.slots]
    pareto_line = [point.combination for of_size in by_size for point in pareto(of_size)]
    found = FrontierResult(
        model=args.model, scope=args.scope, gates=args.gates, points=points, chosen=chosen, pareto=pareto_line, prices=prices,
        reproduce=made,
    )  # fmt: skip
    if process_index() == 0:
        write_json(output / "frontier.json", found.model_dump(by_alias=True))
        write_frontier_page(found, output)
    return found


def _say(point: Point) -> None:
    if process_index() > 0:
        return
    found = point.chosen_by
    saved = f"{PERCENT.text(found.fewer.value)} fewer loads at {FINE_CHANGE.text(found.cost.value)} perplexity"
    say(f"{point.arm}, lever {point.lever}, {point.slots} slots, {point.policy}: {saved}")


def _table(found: report.Table) -> Table:
    columns = [Column(cell.replace("\n", " "), overflow="fold") for cell in found.header]  # a lever is not cut short
    table = Table(*columns, title=found.title, caption=found.note, show_lines=True)
    for row in found.rows:
        table.add_row(*map(escape, row))
    return table


if __name__ == "__main__":  # `accelerate launch -m launch.frontier`
    sys.exit(run(main))

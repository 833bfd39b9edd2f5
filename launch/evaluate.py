"""`remoe evaluate`: quality, routing, cache replay and decode of a base model and of a router delta for it."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import tyro

from configs.command import parse, run
from configs.files import prepare_folder
from configs.load import keys_help, load
from evaluation.arguments import EvaluationArguments
from evaluation.evaluate import assemble, evaluate, trained_arm
from evaluation.quality.batches import process_index
from evaluation.report.documents import write_results
from launch.narration import Narration, say_the_end
from launch.tracking import upload
from training.train import in_processes

OWN = ("accelerate_config", "overrides")


@dataclass(frozen=True)
class Evaluate:
    """Measure a base model, and a router delta against it: quality, routing, cache replay and decode.

    With a memory budget or an expert cache everything runs with experts paged from disk, and the model is never held whole.

    examples:
      remoe evaluate --model data/embedded/model --router-delta runs/tiny/router_delta \\
          --config configs/evaluation/tiny.yaml --output runs/tiny/evaluation
      remoe evaluate --model DIR --memory-budget 8GiB --config configs/evaluation/tiny.yaml --output runs/mine \\
          quality.tasks=[arc_easy,hellaswag] quality.limit=200
    """

    model: str  # folder or hub name of the base model
    config: str  # a YAML that says what is measured; see configs/evaluation/
    output: str  # folder for results.json, report.md and report.html
    router_delta: str | None = None  # folder that training wrote; left out: the base alone is measured
    memory_budget: str | None = None  # overrides the config's memory_budget
    expert_cache: str | None = None  # overrides the config's expert_cache
    # share the requests out over the processes that this YAML of accelerate describes, each with a budget of its own
    accelerate_config: str | None = None
    report_to: Literal["none", "wandb"] = "none"  # wandb: also figures and files to Weights & Biases
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()  # key=value: overrides a key of the config


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the results and both reports."""
    command = parse(Evaluate, argv, prog="remoe evaluate", epilog=keys_help(EvaluationArguments))
    if command.accelerate_config is not None:
        flags = [(field.name, getattr(command, field.name)) for field in fields(command) if field.name not in OWN]
        words = [word for name, value in flags if value is not None for word in (f"--{name.replace('_', '-')}", value)]
        module = ["launch.evaluate", *words, *command.overrides]
        in_processes(command.accelerate_config, module, what="evaluation")
        return
    budgets = {"memory_budget": command.memory_budget, "expert_cache": command.expert_cache}
    given = [f"{key}={value}" for key, value in budgets.items() if value is not None]
    config = load(EvaluationArguments, command.config, [*given, *command.overrides])
    output, told = prepare_folder(command.output), Narration(is_silent=process_index() > 0)
    arms = [trained_arm(command.model, [Path(command.router_delta)])] if command.router_delta else []
    started = time.perf_counter()
    named = [(arm.objective, arm) for arm in arms]
    how: Any = {"output": output, "expected": told.expected, "found": told.found, "decoded": told.decoded}
    measured = evaluate(command.model, named, config, **how)
    if process_index() > 0:
        return
    seconds = {"evaluate": time.perf_counter() - started}
    line = f"remoe evaluate {' '.join(sys.argv[1:] if argv is None else argv)}"
    results = assemble(measured, command=line, config=asdict(config), seconds=seconds)
    write_results(results, output)
    if command.report_to == "wandb":
        upload(results, output)
    say_the_end(results, output)


if __name__ == "__main__":  # `accelerate launch -m launch.evaluate`
    sys.exit(run(main))

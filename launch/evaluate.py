"""`remoe evaluate`: quality, routing, cache replay and decode of a base model and of a router delta for it."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from configs.command import parse
from configs.load import keys_help, load
from evaluation.evaluate import Arm, Candidate, EvaluationArguments, assemble, coefficients, evaluate, read_history
from evaluation.report.markdown import write_results
from training.run_folder import router_delta


@dataclass(frozen=True)
class Evaluate:
    """Measure a base model, and a router delta against it: quality, routing, cache replay and decode.

    example:
      remoe evaluate --model data/embedded/model --router-delta runs/tiny/router_delta \\
          --config configs/evaluation/tiny.yaml --output runs/tiny/evaluation
    """

    model: str  # folder or hub name of the base model
    config: str  # a YAML that says what is measured; see configs/evaluation/
    output: str  # folder for results.json, report.md and report.html
    router_delta: str | None = None  # folder that training wrote; left out: the base alone is measured
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()  # key=value: overrides a key of the config


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the results and both reports."""
    command = parse(Evaluate, argv, prog="remoe evaluate", epilog=keys_help(EvaluationArguments))
    config = load(EvaluationArguments, command.config, command.overrides)
    started = time.perf_counter()
    results = evaluate(command.model, _arms(command.router_delta), config)
    line = f"remoe evaluate {' '.join(sys.argv[1:] if argv is None else argv)}"
    seconds = {"evaluate": time.perf_counter() - started}
    write_results(assemble(results, command=line, config=asdict(config), seconds=seconds), Path(command.output))
    print(f"wrote {Path(command.output) / 'report.html'}, report.md and results.json")


def _arms(delta: str | None) -> dict[str, Arm]:
    """The one arm of a router delta, named for its objective."""
    if delta is None:
        return {}
    about = router_delta.describe(delta)
    candidate = Candidate(Path(delta), about["config"]["seed"], read_history(Path(delta).parent))
    return {about["objective"]: Arm(about["objective"], coefficients(about["config"]), [candidate])}

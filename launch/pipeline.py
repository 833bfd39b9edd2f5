"""`remoe run`: the whole loop. Train every arm, evaluate base and arms, write the report; all in one run folder."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.command import run
from configs.load import UserError, dump, keys_help, load
from evaluation.evaluate import (
    Arm,
    Candidate,
    EvaluationArguments,
    assemble,
    coefficients,
    evaluate,
    read_history,
    write_results,
)
from training.arguments import TrainArguments
from training.train import launch_training

EXAMPLE = """examples:
  remoe run configs/run/demo.yaml
  remoe run configs/run/demo.yaml seeds=[0,1,2] output_dir=runs/three_seeds
"""


@dataclass
class RunArguments:
    """`remoe run`: which arms are trained and how everything is measured."""

    train: str = "configs/train/tiny.yaml"  # training config that all arms share
    evaluation: str = "configs/evaluation/tiny.yaml"  # what is measured
    output_dir: str = "runs/demo"  # everything is written here
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> keys of the training config that differ
    seeds: list[int] = field(default_factory=lambda: [0])  # each arm is trained once with each
    accelerate_config: str | None = None  # train with accelerate, for example on several processes

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds:
            raise ValueError("arms and seeds must each name at least one")
        if "base" in self.arms:
            raise ValueError("an arm cannot be called base: that is the untouched model, which is always measured")


def pipeline(args: RunArguments, *, command: str) -> Path:
    """Train, evaluate, report; arms that are already trained are not trained again.

    Returns:
        The folder with results.json, report.md and report.html.
    """
    out = Path(args.output_dir)
    evaluation = load(EvaluationArguments, args.evaluation)
    plans = {name: [_training(args, name, seed) for seed in args.seeds] for name in args.arms}
    out.mkdir(parents=True, exist_ok=True)
    dump(args, out / "config.yaml")
    started = time.perf_counter()
    all_new = not any((Path(t.output_dir) / "config.yaml").exists() for plan in plans.values() for t in plan)
    arms = {}
    for name, plan in plans.items():
        for training in plan:
            launch_training(training, args.accelerate_config)
        runs = [Candidate(Path(t.output_dir) / "router_delta", t.seed, read_history(Path(t.output_dir))) for t in plan]
        arms[name] = Arm(plan[0].objective, coefficients(asdict(plan[0])), runs)
    trained = time.perf_counter()
    results = evaluate(str(next(iter(plans.values()))[0].model_name_or_path), arms, evaluation)
    seconds = {"evaluate": time.perf_counter() - trained}
    if all_new:  # time of a training that was only taken up again says nothing
        seconds["train"] = trained - started
    config = {"run": asdict(args), "evaluation": asdict(evaluation)}
    write_results(assemble(results, command=command, config=config, seconds=seconds), out)
    return out


def _training(args: RunArguments, name: str, seed: int) -> TrainArguments:
    overrides = [f"{key}={value}" for key, value in args.arms[name].items()]
    own = [f"seed={seed}", f"output_dir={args.output_dir}/{name}-seed{seed}", "resume_from_checkpoint=auto"]
    training = load(TrainArguments, args.train, [*overrides, *own])
    if training.trainable != "routers":
        raise UserError(f"{args.train} trains everything; an arm trains routers only (trainable=routers)")
    return training


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="remoe run", description="Train the arms of a config, evaluate them and the untouched base, write a report.",
        epilog=EXAMPLE + keys_help(RunArguments), formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("config", help="a YAML under configs/run/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the config")
    args = parser.parse_args(argv)
    out = pipeline(
        load(RunArguments, args.config, args.overrides), command=" ".join(["remoe run", args.config, *args.overrides])
    )
    print(f"\nThe report is {out / 'report.html'} (text: {out / 'report.md'}, numbers: {out / 'results.json'})")


if __name__ == "__main__":
    sys.exit(run(main))

"""`remoe run`: the whole loop. Train every arm, evaluate base and arms, write the report; all in one run folder."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro

from configs.command import parse
from configs.files import write_yaml
from configs.load import UserError, keys_help, load
from evaluation.evaluate import (
    Arm,
    Candidate,
    EvaluationArguments,
    assemble,
    coefficients,
    divide_budgets,
    evaluate,
    read_history,
)
from evaluation.report.markdown import write_results
from training.arguments import TrainArguments
from training.train import launch_training


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
    trainings = {name: [_training(args, name, seed) for seed in args.seeds] for name in args.arms}
    model = str(next(iter(trainings.values()))[0].model_name_or_path)
    plans = divide_budgets(model, evaluation)  # first, so that what is refused is refused before hours of training
    out.mkdir(parents=True, exist_ok=True)
    write_yaml(out / "config.yaml", args)
    started = time.perf_counter()
    all_new = not any((Path(t.output_dir) / "config.yaml").exists() for of_arm in trainings.values() for t in of_arm)
    arms = {}
    for name, of_arm in trainings.items():
        for training in of_arm:
            launch_training(training, args.accelerate_config)
        folders = [(Path(training.output_dir), training.seed) for training in of_arm]
        runs = [Candidate(folder / "router_delta", seed, read_history(folder)) for folder, seed in folders]
        arms[name] = Arm(of_arm[0].objective, coefficients(asdict(of_arm[0])), runs)
    trained = time.perf_counter()
    results = evaluate(model, arms, evaluation, plans=plans)
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


@dataclass(frozen=True)
class Run:
    """Train the arms of a config, evaluate them and the untouched base, write a report; all in one folder.

    examples:
      remoe run configs/run/demo.yaml
      remoe run configs/run/demo.yaml seeds=[0,1,2] output_dir=runs/three_seeds
    """

    config: tyro.conf.Positional[str]  # a YAML under configs/run/
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()  # key=value: overrides a key of the config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the loop and say where the report is."""
    command = parse(Run, argv, prog="remoe run", epilog=keys_help(RunArguments))
    line = " ".join(["remoe run", command.config, *command.overrides])
    out = pipeline(load(RunArguments, command.config, command.overrides), command=line)
    print(f"\nThe report is {out / 'report.html'} (text: {out / 'report.md'}, numbers: {out / 'results.json'})")

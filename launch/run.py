"""`remoe run`: the whole loop. Train every arm, evaluate base and arms, write the report; all in one run folder."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro

from configs.command import parse
from configs.files import prepare_folder, write_yaml
from configs.load import UserError, keys_help, load
from evaluation.arguments import EvaluationArguments
from evaluation.evaluate import assemble, evaluate, trained_arm
from evaluation.frontier.arguments import FrontierArguments
from evaluation.frontier.result import FRONTIER, FrontierResult, read_frontier
from evaluation.measurement import Arm
from evaluation.report.documents import write_results
from evaluation.report.frontier_page import gate_sentence
from launch.frontier import measure
from launch.narration import Narration, say, say_the_end
from training.arguments import TrainArguments
from training.train import in_processes, launch_training


@dataclass
class RunArguments:
    """`remoe run`: which arms are trained and how everything is measured."""

    train: str = "configs/train/tiny.yaml"  # training config that all arms share
    evaluation: str = "configs/evaluation/tiny.yaml"  # what is measured
    output_dir: str = "runs/demo"  # everything is written here
    # name -> keys of the training config that differ; null: an arm of the config is left out
    arms: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])  # each arm is trained once with each
    # routers, levers and caches on one axis, as `remoe frontier` measures them, of the arms of this run; a config of it
    frontier: str | None = None
    accelerate_config: str | None = None  # train with accelerate, for example on several processes
    frontier_accelerate_config: str | None = (
        None  # share the frontier's passes out over such processes, which do not shard
    )
    train_overrides: list[str] = field(default_factory=list)  # key=value for every training, as [max_steps=20]
    evaluation_overrides: list[str] = field(default_factory=list)  # key=value of what is measured, as [quality.limit=8]
    frontier_overrides: list[str] = field(default_factory=list)  # key=value of the frontier, as [slots=[16]]

    def __post_init__(self) -> None:
        self.arms = {name: keys for name, keys in self.arms.items() if keys is not None}
        if not self.arms or not self.seeds:
            raise ValueError("arms and seeds must each name at least one")
        if "base" in self.arms:
            raise ValueError("an arm cannot be called base: that is the untouched model, which is always measured")


def pipeline(args: RunArguments, *, command: str) -> Path:
    """Measure the base, then train and measure one arm after the other, then decode with all of them; write the report.

    A frontier comes last, if one is asked for.

    Arms that are already trained are not trained again.

    Returns:
        The folder with results.json, report.md and report.html.
    """
    out = Path(args.output_dir)
    evaluation = load(EvaluationArguments, args.evaluation, args.evaluation_overrides)
    trainings = {name: [_training(args, name, seed) for seed in args.seeds] for name in args.arms}
    model = str(next(iter(trainings.values()))[0].model_name_or_path)
    frontier = _frontier(args, model, trainings)
    all_new = not any((Path(t.output_dir) / "config.yaml").exists() for of_arm in trainings.values() for t in of_arm)
    prepare_folder(out)
    write_yaml(out / "config.yaml", args)
    seeds = f" with seeds {', '.join(map(str, args.seeds))}" if len(args.seeds) > 1 else ""
    say(f"comparing {model} as it is with its routers trained as {', '.join(args.arms)}{seeds}; results go to {out}")
    started = time.perf_counter()
    arms = _Training(trainings, model, args.accelerate_config)
    told = Narration()
    how: Any = {"output": out, "expected": told.expected, "found": told.found, "decoded": told.decoded}
    measured = evaluate(model, arms, evaluation, **how)
    seconds = {"evaluate": time.perf_counter() - started - arms.seconds}
    if all_new:  # time of a training that was only taken up again says nothing
        seconds["train"] = arms.seconds
    config = {"run": asdict(args), "evaluation": asdict(evaluation)}
    found = None
    if frontier is not None:
        say("measuring routers, levers and caches on one axis")
        measuring = time.perf_counter()
        found = _measured(frontier, args.frontier_accelerate_config, command=command)
        seconds["frontier"] = time.perf_counter() - measuring
    results = assemble(measured, command=command, config=config, seconds=seconds)
    write_results(results, out, found)
    say_the_end(results, out)
    if found is not None:
        print(gate_sentence(found))
    return out


class _Training:
    """Trains an arm when the evaluation asks for it."""

    def __init__(self, trainings: dict[str, list[TrainArguments]], model: str, accelerate_config: str | None) -> None:
        self._trainings, self._model, self._accelerate_config = trainings, model, accelerate_config
        self.seconds = 0.0

    def __iter__(self) -> Iterator[tuple[str, Arm]]:
        for name, of_arm in self._trainings.items():
            say(f"{name}: training {of_arm[0].max_steps} steps")
            started = time.perf_counter()
            for training in of_arm:
                launch_training(training, self._accelerate_config)
            self.seconds += time.perf_counter() - started
            yield name, trained_arm(self._model, [Path(t.output_dir) / "router_delta" for t in of_arm])


def _frontier(
    args: RunArguments, model: str, trainings: Mapping[str, Sequence[TrainArguments]]
) -> FrontierArguments | None:
    """What is measured on one axis; None if that is not asked for."""
    if args.frontier is None:
        return None
    folders = {name: [str(Path(t.output_dir) / "router_delta") for t in of_arm] for name, of_arm in trainings.items()}
    own = [f"model={model}", f"output_dir={(Path(args.output_dir) / FRONTIER).parent}"]
    frontier = load(FrontierArguments, args.frontier, [*args.frontier_overrides, *own])
    frontier.arms = dict(folders)
    return frontier


def _measured(frontier: FrontierArguments, accelerate_config: str | None, *, command: str) -> FrontierResult:
    folder = prepare_folder(frontier.output_dir)
    if accelerate_config is None:
        return measure(frontier, folder, command=command)
    write_yaml(folder / "config.yaml", frontier)
    in_processes(accelerate_config, ["launch.frontier", str(folder / "config.yaml")], what="the frontier")
    return read_frontier(folder / FRONTIER.name)


def _training(args: RunArguments, name: str, seed: int) -> TrainArguments:
    overrides = [f"{key}={value}" for key, value in args.arms[name].items()]
    own = [f"seed={seed}", f"output_dir={args.output_dir}/{name}-seed{seed}", "resume_from_checkpoint=auto"]
    training = load(TrainArguments, args.train, [*overrides, *args.train_overrides, *own])
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
    pipeline(load(RunArguments, command.config, command.overrides), command=line)

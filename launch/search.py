"""`remoe search`: coefficients of a training and the strength of a lever together, on the texts that are there to choose by."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import transformers
import tyro
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.console import Console
from rich.table import Column, Table

from configs.command import parse
from configs.files import prepare, prepare_folder, write_text, write_yaml
from configs.load import UserError, keys_help, load
from evaluation.engine.device import find_device
from evaluation.frontier.arguments import FrontierArguments
from evaluation.frontier.measure import Frontier
from evaluation.frontier.result import Combination, Measure
from evaluation.report.numbers import FINE_CHANGE, PERCENT
from launch.narration import say
from training.arguments import TrainArguments
from training.model.loading import load_tokenizer, local_folder
from training.train import launch_training

STUDY, DELTA, ERROR = "search", "delta", "error"


@dataclass
class SearchArguments:
    """`remoe search`: what may vary, and for how long."""

    train: str = "configs/train/in_the_loop.yaml"  # a training config
    train_overrides: list[str] = field(default_factory=list)  # key=value for every training, as [max_steps=200]
    # a config of `remoe frontier`: texts, the first size of cache and the first policy; reported texts are not looked at
    frontier: str = "configs/frontier/in_the_loop.yaml"
    frontier_overrides: list[str] = field(default_factory=list)  # key=value of it, as [slots=[16]]
    output_dir: str = "runs/search"  # everything is written here; the same command goes on
    # key of the training config: [least, most], searched by its logarithm; {choices: [one, another]}; or null: left alone
    space: dict[str, Any] = field(default_factory=dict)
    lever: str = "prior"  # one of `remoe generate --lever`, without delta
    delta: list[float] = field(default_factory=lambda: [0.01, 0.12])  # least and most strength
    trials: int = 20  # in all, those of earlier runs included
    hours: float | None = None  # after which no trial is begun
    accelerate_config: str | None = None  # train with accelerate
    seed: int = 0  # of the search

    def __post_init__(self) -> None:
        self.space = {key: values for key, values in self.space.items() if values is not None}
        for key, values in [*self.space.items(), (DELTA, self.delta)]:
            is_range = isinstance(values, list) and len(values) == 2 and all(isinstance(v, int | float) for v in values)
            if is_range and 0 < values[0] < values[1]:
                continue
            if not (isinstance(values, dict) and list(values) == ["choices"] and values["choices"]):
                raise ValueError(f"{key}={values}: write [least, most] above 0, or {{choices: [one, another]}}")
        if DELTA in self.space:
            raise ValueError("space has delta: that is the lever's; write lever_delta for the one in the training pass")
        if self.trials < 1:
            raise ValueError(f"trials={self.trials}: write a number of at least 1")


@dataclass(frozen=True)
class Search:
    """Search for trainings and strengths that save most loads at each price: optuna's multi-objective search.

    Every trial trains, and is measured on the validation split (`choose_split`) alone; all are rows of trials.csv. A search that
    was killed goes on with the same command, the training that was broken off too.

    examples:
      remoe search configs/search/in_the_loop.yaml
      remoe search configs/search/in_the_loop.yaml trials=50 hours=8 output_dir=runs/mine
    """

    config: tyro.conf.Positional[str]  # a YAML under configs/search/
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()  # key=value: overrides a key of the config


def main(argv: Sequence[str] | None = None) -> None:
    """Search, then print what no other trial beats in both."""
    command = parse(Search, argv, prog="remoe search", epilog=keys_help(SearchArguments))
    args = load(SearchArguments, command.config, command.overrides)
    Console().print(_table(search(args).best_trials))
    print(f"All trials are in {Path(args.output_dir) / 'trials.csv'}")


def search(args: SearchArguments) -> optuna.Study:
    """Run what is left of the trials.

    Raises:
        UserError: a config or a key of the space that is not right; found out before anything is trained.
    """
    out, middle = Path(args.output_dir), {key: _middle(values) for key, values in args.space.items()}
    _frontier(args, _training(args, middle), delta=args.delta[0])  # refuses what cannot be, before anything is written
    prepare_folder(out)
    write_yaml(out / "config.yaml", args)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(out / "journal.log"))), study_name=STUDY, load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=args.seed), directions=["minimize", "maximize"],
    )  # fmt: skip
    for running in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(running.number, state=TrialState.FAIL)
    for broken_off in study.get_trials(states=(TrialState.FAIL,)):
        later = [
            trial.system_attrs.get("fixed_params", trial.params) for trial in study.trials[broken_off.number + 1 :]
        ]
        if ERROR not in broken_off.user_attrs and broken_off.params not in later:
            study.enqueue_trial(broken_off.params)
    left = args.trials - len(study.get_trials(states=(TrialState.COMPLETE,)))
    if left > 0:
        seconds = None if args.hours is None else 3600 * args.hours
        study.optimize(
            lambda trial: _tried(args, trial),
            n_trials=left,
            timeout=seconds,
            callbacks=[_written(out)],
            catch=(UserError,),
        )
    return study


def _tried(args: SearchArguments, trial: Trial) -> tuple[float, float]:
    """Train, measure; what it costs and what it saves."""
    values = {key: _suggested(trial, key, range_) for key, range_ in args.space.items()}
    delta = trial.suggest_float(DELTA, *args.delta, log=True)
    training = _training(args, values)
    try:
        launch_training(training, args.accelerate_config)
    except UserError as error:  # such as a loss that is not finite: the search goes on
        trial.set_user_attr(ERROR, str(error))
        say(f"trial {trial.number}: {_words(trial.params)}: {error}")
        raise
    frontier = _frontier(args, training, delta=delta)
    model_dir = local_folder(frontier.model)
    at = Combination(arm=STUDY, lever=frontier.levers[0], slots=frontier.slots[0], policy=frontier.policies[0])
    kept = Path(args.output_dir) / "answers"
    measured = Frontier(
        frontier, model_dir, load_tokenizer(model_dir), find_device(frontier.device), kept=kept
    ).chosen_by(at)
    trial.set_user_attr("measure", measured.model_dump())
    trial.set_user_attr("router_delta", frontier.arms[STUDY][0])
    saved, cost = PERCENT.text(measured.fewer.value), FINE_CHANGE.text(measured.cost.value)
    say(f"trial {trial.number}: {_words(trial.params)}: {saved} fewer loads at {cost} perplexity")
    return measured.cost.value, measured.fewer.value


def _suggested(trial: Trial, key: str, values: Any) -> Any:
    if isinstance(values, dict):
        return trial.suggest_categorical(key, values["choices"])
    return trial.suggest_float(key, *map(float, values), log=True)


def _middle(values: Any) -> Any:
    return values["choices"][0] if isinstance(values, dict) else values[0]


def _training(args: SearchArguments, values: dict[str, Any]) -> TrainArguments:
    """In a folder that is named after what was chosen, so that the same training is not begun twice."""
    chosen = [f"{key}={value}" for key, value in values.items()]
    name = hashlib.sha256(json.dumps([args.train, args.train_overrides, chosen]).encode()).hexdigest()[:12]
    own = [f"output_dir={args.output_dir}/trainings/{name}", "resume_from_checkpoint=auto"]
    training = load(TrainArguments, args.train, [*args.train_overrides, *chosen, *own])
    if training.trainable != "routers":
        raise UserError(f"{args.train} trains everything; a search trains routers only (trainable=routers)")
    return training


def _frontier(args: SearchArguments, training: TrainArguments, *, delta: float) -> FrontierArguments:
    lever = f"{args.lever}{',' if ':' in args.lever else ':'}delta={delta}"
    given = [f"model={training.model_name_or_path}", f"output_dir={args.output_dir}", f"levers=['{lever}']"]
    frontier = load(FrontierArguments, args.frontier, [*args.frontier_overrides, *given])
    frontier.arms = {STUDY: [str(Path(training.output_dir) / "router_delta")]}
    return frontier


def _written(out: Path) -> Any:
    def write(study: optuna.Study, _: FrozenTrial) -> None:
        rows = study.trials_dataframe(attrs=("number", "state", "values", "params", "duration", "user_attrs"))
        rows = rows.rename(columns={"values_0": "cost", "values_1": "fewer"})
        write_text(prepare(out / "trials.csv"), rows.to_csv(index=False))

    return write


def _table(best: Sequence[FrozenTrial]) -> Table:
    folder = Column("router delta", overflow="fold")  # to be copied, so not cut short
    table = Table("fewer loads", "perplexity", "with", folder, show_lines=True)
    table.title = (
        "what no other trial beats in both, on the texts to choose by: measure it on others with remoe frontier"
    )
    for trial in sorted(best, key=lambda trial: trial.values[0]):
        measured = Measure.model_validate(trial.user_attrs["measure"])
        table.add_row(
            PERCENT.text(measured.fewer.value), FINE_CHANGE.text(measured.cost.value), _words(trial.params),
            str(trial.user_attrs["router_delta"]),
        )  # fmt: skip
    return table


def _words(params: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()
    )

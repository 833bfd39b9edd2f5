"""The one training loop: router fine-tuning and pretraining, one process or many.

Rows are addressed by index, so a resumed run reads what an uninterrupted one would have read.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configs.load import UserError
from training.arguments import TrainArguments
from training.run import Run, build, finish, save_checkpoint
from training.run_folder.metrics import Tracker
from training.step import take_step
from training.step_metrics import TOLD_TO_STOP, read_steps

EVALUATION = "evaluation.in_training"
"""Measures the model while it trains, if that is asked for; named and not imported, as training needs nothing of it."""
TOLD = ("eval/mean_perplexity", "eval/change/perplexity/mean", "eval/reuse_rate_mean")


def train(args: TrainArguments) -> Path:
    """Run the training that `args` describes, or resume it; nothing that was saved is lost if it fails.

    Returns:
        The router delta's folder, or the model's folder when everything was trained.
    """
    run = build(args)
    evaluate = _evaluation(run)
    tracker = Tracker(args, step=run.step, wandb_id=run.wandb_id, active=run.accelerator.is_main_process)
    run.wandb_id = tracker.wandb_id
    try:
        if evaluate is not None and args.trainable == "routers":
            with run.observer.original_routers():
                base = evaluate(is_base=True)
            if run.step == 0:
                tracker.log(0, base)
        with _stop_signals() as came:
            while run.step < args.max_steps:
                _one_step(run, tracker, came, evaluate)
    finally:
        tracker.close()
    return finish(run)


def _evaluation(run: Run) -> Callable[..., dict[str, float]] | None:
    """Measures the model as it is and says how it stands; None if nothing is to be measured.

    Raises:
        UserError: what is to be measured cannot be.
    """
    if run.args.eval_steps is None:
        return None
    asked: Any = import_module(EVALUATION)
    model_name = str(run.args.model_name_or_path or run.args.config_name)
    measure = asked.InTraining(run.args.eval_config, model_name, run.tokenizer)

    def evaluate(**what: bool) -> dict[str, float]:
        started = time.perf_counter()
        with run.accelerator.autocast():
            found: dict[str, float] = measure(run.model, **what)
        told = [f"{name.removeprefix('eval/')} {found[name]:.4g}" for name in TOLD if name in found]
        seconds = f"{time.perf_counter() - started:.0f} s"
        if run.accelerator.is_main_process:
            tqdm.write(f"{run.args.run_name}: measured after step {run.step} in {seconds}: {', '.join(told)}")
        return found

    return evaluate


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that fills when SIGUSR1 comes, which batch systems send some time before they end a job: save and stop.

    Only a process's main thread can listen; in another one the list stays empty.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGUSR1, before)


def _one_step(run: Run, tracker: Tracker, came: list[int], evaluate: Callable[..., dict[str, float]] | None) -> None:
    """Train, record, and save when it is time to, or when a process was told to stop, which ends in a `UserError`.

    An accelerator is waited for only where something is done with the numbers.
    """
    args = run.args
    run.taken.append(take_step(run))
    must_measure = args.eval_steps is not None and (run.step % args.eval_steps == 0 or run.step == args.max_steps)
    must_log = must_measure or run.step % args.logging_steps == 0 or run.step in (1, args.max_steps)
    must_save = run.step % args.save_steps == 0 or run.step == args.max_steps
    if not (must_log or must_save or run.reads_at_once):
        return
    metrics = read_steps(run, told=len(came))
    must_stop = bool(metrics.pop(TOLD_TO_STOP)) and run.step < args.max_steps
    if evaluate is not None and must_measure:
        metrics |= evaluate()
    if must_log:
        tracker.log(run.step, metrics)
    tracker.advance(run.step, metrics)
    if must_save or must_stop:
        tracker.flush()
        save_checkpoint(run)
    if must_stop:
        raise UserError(
            f"{args.run_name} was told to stop (SIGUSR1) after step {run.step}; everything is saved: start it again with "
            "resume_from_checkpoint=auto"
        )


def train_step(run: Run) -> dict[str, float]:
    """One optimizer step over all micro-batches and processes; returns its metrics."""
    run.taken.append(take_step(run))
    metrics = read_steps(run)
    del metrics[TOLD_TO_STOP]
    return metrics

"""The one training loop: router fine-tuning and pretraining, one process or many.

Losses are divided by global counts, so the number of processes and of accumulation steps never changes them. Rows are
addressed by index, so a resumed run reads what an uninterrupted one would have read.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from configs.load import UserError
from data.batches import Batch
from training.arguments import TrainArguments
from training.model.cache_in_the_loop import CacheInTheLoop
from training.model.packing import OnePerRow, one_per_row
from training.objective.objective import Objective, objective, total_counts
from training.run import Run, build, finish, save_checkpoint
from training.run_folder import proof
from training.run_folder.folder import update_json
from training.run_folder.metrics import Tracker

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
    """Train, record, and save when it is time to, or when a process was told to stop, which ends in a `UserError`."""
    args = run.args
    metrics = train_step(run)
    must_measure = args.eval_steps is not None and (run.step % args.eval_steps == 0 or run.step == args.max_steps)
    if evaluate is not None and must_measure:
        metrics |= evaluate()
    if must_measure or run.step % args.logging_steps == 0 or run.step in (1, args.max_steps):
        tracker.log(run.step, metrics)
    tracker.advance(run.step, metrics)
    told = torch.tensor(len(came), device=run.accelerator.device)
    must_stop = bool(_sum_over_processes(run.accelerator, {"told": told})["told"]) and run.step < args.max_steps
    if run.step % args.save_steps == 0 or run.step == args.max_steps or must_stop:
        tracker.flush()
        save_checkpoint(run)
    if must_stop:
        raise UserError(
            f"{args.run_name} was told to stop (SIGUSR1) after step {run.step}; everything is saved: start it again with "
            "resume_from_checkpoint=auto"
        )


def train_step(run: Run) -> dict[str, float]:
    """One optimizer step over all micro-batches and processes; returns its metrics."""
    started = time.perf_counter()
    batches = [_micro_batch(run, index) for index in range(run.args.gradient_accumulation_steps)]
    count = _sum_over_processes(run.accelerator, total_counts(run.args, batches))
    shares = [_backward(run, batch, count, index) for index, batch in enumerate(batches)]
    _add_up_gradients(run)
    if run.step == run.proof_step:
        _record_gradients(run)
    done = {"train/learning_rate": run.scheduler.get_last_lr()[0], "train/grad_norm": _clip(run)}
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    tokens = int(count["tokens"])
    run.num_tokens += tokens
    done = {**_metrics(run, shares), **done, "train/num_tokens": run.num_tokens}
    return {**done, "time/tokens_per_second": tokens / (time.perf_counter() - started)}


def _micro_batch(run: Run, index: int) -> Batch:
    """The rows of micro-batch `index` of this process: those of one step are the same however they are shared out."""
    size, accelerator = run.args.per_device_train_batch_size, run.accelerator
    first = run.step * run.rows_per_step + (index * accelerator.num_processes + accelerator.process_index) * size
    return run.rows.batch(range(first, first + size)).to(accelerator.device)


def _backward(run: Run, batch: Batch, count: Mapping[str, Tensor], index: int) -> Objective:
    """Forward and backward of one micro-batch."""
    base_outputs = None
    alone = None if run.packs else one_per_row(batch.input_ids_BS, batch.document_ids_BS)
    if run.args.distill_coef:  # what the untouched model predicts: the same frozen weights with the original routers
        with torch.no_grad(), run.observer.original_routers():
            base_outputs = outputs_of(run, batch, alone)
    place_BS = None if alone is None else alone.place_BS
    cache = _cache_in_the_loop(run.args, batch, alone) if run.args.is_in_the_loop else None
    local = run.args.is_local
    recording = run.observer.recording(*batch.input_ids_BS.shape, place_BS=place_BS, cache=cache, local=local)
    with recording as routings, torch.set_grad_enabled(not local):
        outputs = outputs_of(run, batch, alone)
    share = objective(
        run.args, outputs_BSX=outputs, routings=routings, batch=batch, count=count, step=run.step,
        base_outputs_BSX=base_outputs, head=run.head,
    )  # fmt: skip
    if not torch.isfinite(share.loss):
        if (bad := _not_finite(run)) and bad not in run.trained:
            raise UserError(
                f"loss is {share.loss.item()}, because {bad} of the model holds numbers that are not finite"
            )
        raise UserError(
            f"loss is {share.loss.item()} at step {run.step + 1}, process {run.accelerator.process_index}, micro-batch "
            f"{index}: stopped before the step. Lower learning_rate; resume_from_checkpoint=auto resumes from the last save"
        )
    share.loss.backward()
    return share


def _cache_in_the_loop(args: TrainArguments, batch: Batch, alone: OnePerRow | None) -> CacheInTheLoop:
    """In the form in which the model reads the batch: of documents in rows of their own each row begins one."""
    if alone is None:
        ids_BS = batch.document_ids_BS.cpu()
        starts_BS = ids_BS != torch.roll(ids_BS, 1, dims=1)
    else:
        starts_BS = torch.zeros(alone.input_ids_DT.shape, dtype=torch.bool)
    assert args.lever_delta is not None, "whoever asks for a cache in the loop has looked"
    how: dict[str, Any] = {"candidates": args.candidate_experts, "temperature": args.miss_temperature}
    return CacheInTheLoop(args.lever_delta, tuple(args.cache_slots), args.cache_policy, starts_BS.numpy(), **how)


def _not_finite(run: Run) -> str | None:
    """The first weight of the model that holds a NaN or an infinity; of a sharded one, this process's part is looked at."""
    for name, parameter in run.model.named_parameters():
        part = parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
        if not part.isfinite().all():
            return name
    return None


def outputs_of(run: Run, batch: Batch, alone: OnePerRow | None = None) -> Tensor:
    """The last hidden states where the loss takes them through the head itself, logits otherwise.

    With `alone` every document is read in a row of its own; what comes out is in the batch's order all the same.
    """
    ids, positions = (batch.input_ids_BS, batch.position_ids_BS) if alone is None else alone[:2]
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    with run.accelerator.autocast():
        outputs: Tensor = run.model.base_model(**inputs)[0] if run.head else run.model(**inputs).logits
    return outputs if alone is None else outputs.flatten(0, 1)[alone.place_BS]


def _add_up_gradients(run: Run) -> None:
    """Add the processes' gradients up; what trains is small, so one exchange after the last micro-batch is enough."""
    if run.accelerator.num_processes == 1:
        return
    tensors = list(run.trained.values())
    shares = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors]
    total: Tensor = run.accelerator.reduce(torch.cat([share.flatten() for share in shares]), "sum")
    for tensor, part in zip(tensors, total.split([tensor.numel() for tensor in tensors]), strict=True):
        if tensor.grad is not None or part.any():  # what has none anywhere is named by `_record_gradients`
            tensor.grad = part.view_as(tensor).clone()


def _clip(run: Run) -> float:
    # looked for before clipping, which would spread one NaN over every gradient
    bad = [name for name, p in run.trained.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
    norm = float(torch.nn.utils.clip_grad_norm_(run.trained.values(), run.args.max_grad_norm or math.inf))
    if bad or not math.isfinite(norm):
        raise UserError(
            f"gradient of {bad[0] if bad else 'all tensors together'} is not finite at step {run.step + 1}: stopped before "
            "the step. Lower learning_rate; resume_from_checkpoint=auto resumes from the last save"
        )
    return norm


def _record_gradients(run: Run) -> None:
    """Check that every trained tensor has a finite, non-zero gradient and nothing else any; write it down."""
    norms = proof.check_gradients(run.model, run.trained)
    if run.accelerator.is_main_process:
        update_json(Path(run.args.output_dir) / "proof.json", {"gradient_norms_at_step_1": norms})


def _metrics(run: Run, shares: list[Objective]) -> dict[str, float]:
    """The step's metrics, added over micro-batches and processes, by their names in `metrics.jsonl`."""
    own = {key: torch.stack([share.terms[key] for share in shares]).sum(0) for key in shares[0].terms}
    own |= {key: torch.stack([getattr(s, key) for s in shares]).sum(0) for key in ("reuse_L", "load_LE", "hits_C")}
    total = _sum_over_processes(run.accelerator, own)
    reuse_L, load_LE, hits_C = (total.pop(key) for key in ("reuse_L", "load_LE", "hits_C"))
    metrics = {f"train/{key}": float(value) for key, value in total.items()}
    metrics["moe/reuse_rate_mean"] = float(reuse_L.mean())
    metrics |= {f"moe/layer_{layer}/reuse_rate": float(rate) for layer, rate in enumerate(reuse_L)}
    metrics["moe/cv_mean"] = float((load_LE.std(-1, correction=0) / load_LE.mean(-1)).mean())
    metrics["moe/dead_expert_frac_mean"] = float((load_LE == 0).double().mean())
    if run.args.is_in_the_loop:
        return metrics | {"cache/in_the_loop/hit_rate": float(hits_C)}
    slots = run.args.cache_slots if run.args.rewards_cache else []
    return metrics | {f"cache/lru/C{n}/hit_rate": float(rate) for n, rate in zip(slots, hits_C, strict=True)}


def _sum_over_processes(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor added over all processes, in float64 and in one exchange."""
    flat = torch.cat([tensor.double().flatten() for tensor in tensors.values()])
    parts = accelerator.reduce(flat, "sum").split([tensor.numel() for tensor in tensors.values()])
    return {key: part.view(tensor.shape) for (key, tensor), part in zip(tensors.items(), parts, strict=True)}

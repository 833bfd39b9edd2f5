"""The one training loop: router fine-tuning and pretraining, one process or many.

Losses are divided by global counts, so the number of processes and of accumulation steps never changes them. Rows are
addressed by index, so a resumed run reads what an uninterrupted one would have read.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from configs.load import UserError
from data.batches import Batch, moved
from training.arguments import TrainArguments
from training.model import transformers_internals as internals
from training.model.cache_in_the_loop import CacheInTheLoop
from training.model.packed_experts import packed_matrices
from training.model.packing import OnePerRow, one_per_row
from training.objective.objective import Objective, objective, total_counts
from training.run import Run, TakenStep, build, finish, save_checkpoint
from training.run_folder import proof
from training.run_folder.folder import update_json
from training.run_folder.metrics import Tracker

EVALUATION = "evaluation.in_training"
"""Measures the model while it trains, if that is asked for; named and not imported, as training needs nothing of it."""
TOLD_TO_STOP = "told to stop"
BEFORE, NOT_SAVED = "stopped before the step", "stopped, and nothing of that step is saved"
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
    if not (must_log or must_save or _reads_at_once(run)):
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


def take_step(run: Run) -> TakenStep:
    """One optimizer step; what it gave is read by `read_steps`, on a CPU here already: nothing but finite numbers is taken."""
    began = time.perf_counter()
    batches = [_micro_batch(run, index) for index in range(run.args.gradient_accumulation_steps)]
    own = total_counts(run.args, [batch.on_host for batch in batches])
    own = dict(zip(own, moved(own.values(), run.accelerator.device), strict=True))
    count, shares = _sum_over_processes(run.accelerator, own), []
    for index, batch in enumerate(batches):
        share = _forward(run, batch, count)
        if _reads_at_once(run):
            _check_loss(run, share.loss.item(), step=run.step + 1, micro_batch=index, when=BEFORE)
        share.loss.backward()
        shares.append(replace(share, loss=share.loss.detach()))
    _add_up_gradients(run)
    if run.step == run.proof_step:
        _record_gradients(run)
    taken = TakenStep(run.step + 1, began, run.scheduler.get_last_lr()[0], count["tokens"], shares, *_clip(run))
    if _reads_at_once(run):
        _check_gradients(run, taken.norms_P.tolist(), float(taken.norm), step=taken.step, when=BEFORE)
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return taken


def _reads_at_once(run: Run) -> bool:
    """Whether a step's numbers are looked at before the next one, for which an accelerator would have to be waited for."""
    return run.accelerator.device.type == "cpu"


def _check_loss(run: Run, loss: float, *, step: int, micro_batch: int, when: str) -> None:
    if math.isfinite(loss):
        return
    if bad := _not_finite(run):
        raise UserError(f"loss is {loss}, because {bad} of the model holds numbers that are not finite")
    raise UserError(
        f"loss is {loss} at step {step}, process {run.accelerator.process_index}, micro-batch {micro_batch}: {when}. "
        "Lower learning_rate; resume_from_checkpoint=auto resumes from the last save"
    )


def _check_gradients(run: Run, norms_P: list[float], norm: float, *, step: int, when: str) -> None:
    bad = next((name for name, one in zip(run.trained, norms_P, strict=True) if not math.isfinite(one)), None)
    if bad or not math.isfinite(norm):
        raise UserError(
            f"gradient of {bad or 'all tensors together'} is not finite at step {step}: {when}. "
            "Lower learning_rate; resume_from_checkpoint=auto resumes from the last save"
        )


class MicroBatch(NamedTuple):
    """Rows of this process, on its device but for what is looked at on the host."""

    on_host: Batch
    on_device: Batch
    alone: OnePerRow | None  # each document in a row of its own, where the model would let them see each other
    sequences: Tensor | None  # of each position that the model is given; None: each row is one


def _micro_batch(run: Run, index: int) -> MicroBatch:
    """The rows of micro-batch `index` of this process: those of one step are the same however they are shared out."""
    size, accelerator = run.args.per_device_train_batch_size, run.accelerator
    first = run.step * run.rows_per_step + (index * accelerator.num_processes + accelerator.process_index) * size
    batch, device = run.rows.batch(range(first, first + size)), accelerator.device
    alone = None if run.packs else one_per_row(batch.input_ids_BS, batch.document_ids_BS)
    sequences = internals.sequences_of(batch.position_ids_BS if alone is None else alone.position_ids_DT)
    return MicroBatch(
        batch,
        batch.to(device),
        None if alone is None else OnePerRow(*moved(alone, device)),
        None if sequences is None else moved([sequences], device)[0],
    )


def _forward(run: Run, batch: MicroBatch, count: Mapping[str, Tensor]) -> Objective:
    """The objective of one micro-batch, of which the loss is to be differentiated."""
    base_outputs, alone = None, batch.alone
    if run.args.distill_coef:  # what the untouched model predicts: the same frozen weights with the original routers
        with torch.no_grad(), run.observer.original_routers(), internals.packed_sequences(batch.sequences):
            base_outputs = outputs_of(run, batch.on_device, alone)
    place_BS = None if alone is None else alone.place_BS
    cache = _cache_in_the_loop(run.args, batch) if run.args.is_in_the_loop else None
    local = run.args.is_local
    shape = batch.on_host.input_ids_BS.shape
    recording = run.observer.recording(*shape, place_BS=place_BS, cache=cache, local=local)
    with recording as routings, torch.set_grad_enabled(not local), internals.packed_sequences(batch.sequences):
        outputs = outputs_of(run, batch.on_device, alone)
    return objective(
        run.args, outputs_BSX=outputs, routings=routings, batch=batch.on_device, count=count, step=run.step,
        base_outputs_BSX=base_outputs, head=run.head,
    )  # fmt: skip


def _cache_in_the_loop(args: TrainArguments, batch: MicroBatch) -> CacheInTheLoop:
    """In the form in which the model reads the batch: of documents in rows of their own each row begins one."""
    if batch.alone is None:
        ids_BS = batch.on_host.document_ids_BS
        starts_BS = ids_BS != torch.roll(ids_BS, 1, dims=1)
    else:
        starts_BS = torch.zeros(batch.alone.input_ids_DT.shape, dtype=torch.bool)
    assert args.lever_delta is not None, "whoever asks for a cache in the loop has looked"
    how: dict[str, Any] = {"candidates": args.candidate_experts, "temperature": args.miss_temperature}
    return CacheInTheLoop(args.lever_delta, tuple(args.cache_slots), args.cache_policy, starts_BS.numpy(), **how)


def _not_finite(run: Run) -> str | None:
    """The first frozen weight that holds a NaN or an infinity; of a sharded one, this process's part is looked at."""
    packed = {id(each.packed) for module in run.model.modules() for each in packed_matrices(module)}  # of no numbers
    for name, parameter in run.model.named_parameters():
        if name in run.trained or id(parameter) in packed:
            continue
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


def _clip(run: Run) -> tuple[Tensor, Tensor]:
    """Clip the gradients; returns the norm of each [P] and of all together, from before."""
    gradients = [tensor.grad for tensor in run.trained.values()]
    zero = torch.zeros((), device=run.accelerator.device)
    norms_P = torch.stack([zero if grad is None else torch.linalg.vector_norm(grad) for grad in gradients])
    norm = torch.linalg.vector_norm(norms_P)
    torch.nn.utils.clip_grads_with_norm_(run.trained.values(), run.args.max_grad_norm or math.inf, norm)
    return norms_P, norm


def _record_gradients(run: Run) -> None:
    """Check that every trained tensor has a finite, non-zero gradient and nothing else any; write it down."""
    norms = proof.check_gradients(run.model, run.trained)
    if run.accelerator.is_main_process:
        update_json(Path(run.args.output_dir) / "proof.json", {"gradient_norms_at_step_1": norms})


def read_steps(run: Run, *, told: int = 0) -> dict[str, float]:
    """The metrics of the last step, by their names in `metrics.jsonl`, and how often any process was told to stop.

    The numbers of all steps since the last reading are brought over in one go, and looked at: all have to be finite. A step
    changes weights before it is looked at, but they are not saved before.
    """
    taken, run.taken = run.taken, []
    last = taken[-1]
    shared = _summed(run, last.shares, told)
    checked = [_flat([*(share.loss for share in one.shares), one.norm, one.tokens, one.norms_P]) for one in taken]
    everything = [*shared.values(), *checked]
    parts = _flat(everything).cpu().split([tensor.numel() for tensor in everything])
    tokens = 0
    for one, part in zip(taken, parts[len(shared) :], strict=True):
        losses, (norm, of_step, *norms) = part[: len(one.shares)].tolist(), part[len(one.shares) :].tolist()
        for index, loss in enumerate(losses):
            _check_loss(run, loss, step=one.step, micro_batch=index, when=NOT_SAVED)
        _check_gradients(run, norms, norm, step=one.step, when=NOT_SAVED)
        tokens += int(of_step)
    run.num_tokens += tokens
    found = {key: part.view(tensor.shape) for (key, tensor), part in zip(shared.items(), parts, strict=False)}
    return {
        **_metrics(run, found),
        "train/learning_rate": last.learning_rate,
        "train/grad_norm": norm,
        "train/num_tokens": run.num_tokens,
        "time/tokens_per_second": tokens / (time.perf_counter() - taken[0].began),
    }


def _summed(run: Run, shares: list[Objective], told: int) -> dict[str, Tensor]:
    """What the metrics of a step are made of, added over micro-batches and processes."""
    own = {key: torch.stack([share.terms[key] for share in shares]).sum(0) for key in shares[0].terms}
    own |= {key: torch.stack([getattr(s, key) for s in shares]).sum(0) for key in ("reuse_L", "load_LE", "hits_C")}
    own[TOLD_TO_STOP] = torch.full((), told, device=run.accelerator.device)
    return _sum_over_processes(run.accelerator, own)


def _metrics(run: Run, total: dict[str, Tensor]) -> dict[str, float]:
    reuse_L, load_LE, hits_C = (total.pop(key) for key in ("reuse_L", "load_LE", "hits_C"))
    metrics = {TOLD_TO_STOP: float(total.pop(TOLD_TO_STOP))}
    metrics |= {f"train/{key}": float(value) for key, value in total.items()}
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
    parts = accelerator.reduce(_flat(tensors.values()), "sum").split([tensor.numel() for tensor in tensors.values()])
    return {key: part.view(tensor.shape) for (key, tensor), part in zip(tensors.items(), parts, strict=True)}


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])

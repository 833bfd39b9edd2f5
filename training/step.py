"""One optimizer step. Losses are divided by global counts, so processes and accumulation steps never change them."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.batches import Batch, moved
from training.arguments import TrainArguments
from training.model import transformers_internals as internals
from training.model.cache_in_the_loop import CacheInTheLoop
from training.model.packing import OnePerRow, one_per_row
from training.objective.objective import Objective, objective, total_counts
from training.run import Run, TakenStep
from training.run_folder import proof
from training.run_folder.folder import update_json
from training.step_metrics import BEFORE, check_gradients, check_loss, sum_over_processes


def take_step(run: Run) -> TakenStep:
    """One optimizer step; what it gave is read by `read_steps`, on a CPU here already: nothing but finite numbers is taken."""
    began = time.perf_counter()
    batches = [micro_batch(run, index) for index in range(run.args.gradient_accumulation_steps)]
    own = total_counts(run.args, [batch.on_host for batch in batches])
    own = dict(zip(own, moved(own.values(), run.accelerator.device), strict=True))
    count, shares = sum_over_processes(run.accelerator, own), []
    for index, batch in enumerate(batches):
        share = forward(run, batch, count)
        if run.reads_at_once:
            check_loss(run, share.loss.item(), step=run.step + 1, micro_batch=index, when=BEFORE)
        share.loss.backward()
        shares.append(replace(share, loss=share.loss.detach()))
    _add_up_gradients(run)
    if run.step == run.proof_step:
        _record_gradients(run)
    taken = TakenStep(run.step + 1, began, run.scheduler.get_last_lr()[0], count["tokens"], shares, *_clip(run))
    if run.reads_at_once:
        check_gradients(run, taken.norms_P.tolist(), float(taken.norm), step=taken.step, when=BEFORE)
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return taken


class MicroBatch(NamedTuple):
    """Rows of this process, on its device but for what is looked at on the host."""

    on_host: Batch
    on_device: Batch
    alone: OnePerRow | None  # each document in a row of its own, where the model would let them see each other
    sequences: Tensor | None  # of each position that the model is given; None: each row is one


def micro_batch(run: Run, index: int) -> MicroBatch:
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


def forward(run: Run, batch: MicroBatch, count: Mapping[str, Tensor]) -> Objective:
    """The objective of one micro-batch, of which the loss is to be differentiated."""
    base_outputs, alone = None, batch.alone
    if run.args.distill_coef:  # what the untouched model predicts: the same frozen weights with the original routers
        with torch.no_grad(), run.observer.original_routers(), internals.packed_sequences(batch.sequences):
            base_outputs = outputs_of(run, batch.on_device, alone)
    place_BS = None if alone is None else alone.place_BS
    cache = cache_in_the_loop(run.args, batch) if run.args.is_in_the_loop else None
    local = run.args.is_local
    shape = batch.on_host.input_ids_BS.shape
    recording = run.observer.recording(*shape, place_BS=place_BS, cache=cache, local=local)
    with recording as routings, torch.set_grad_enabled(not local), internals.packed_sequences(batch.sequences):
        outputs = outputs_of(run, batch.on_device, alone)
    return objective(
        run.args, outputs_BSX=outputs, routings=routings, batch=batch.on_device, count=count, step=run.step,
        base_outputs_BSX=base_outputs, head=run.head,
    )  # fmt: skip


def cache_in_the_loop(args: TrainArguments, batch: MicroBatch) -> CacheInTheLoop:
    """In the form in which the model reads the batch: of documents in rows of their own each row begins one."""
    if batch.alone is None:
        ids_BS = batch.on_host.document_ids_BS
        starts_BS = ids_BS != torch.roll(ids_BS, 1, dims=1)
    else:
        starts_BS = torch.zeros(batch.alone.input_ids_DT.shape, dtype=torch.bool)
    assert args.lever_delta is not None, "whoever asks for a cache in the loop has looked"
    how: dict[str, Any] = {"candidates": args.candidate_experts, "temperature": args.miss_temperature}
    return CacheInTheLoop(args.lever_delta, tuple(args.cache_slots), args.cache_policy, starts_BS.numpy(), **how)


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

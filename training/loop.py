"""The one training loop: router fine-tuning and pretraining, one process or many.

Losses are divided by global counts, so the number of processes and of accumulation steps never changes them. Rows are
addressed by index, so a resumed run reads what an uninterrupted one would have read.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, SchedulerType, get_scheduler

from configs.load import UserError, dump
from data.batches import Batch, DataArguments, PackedRows
from data.sources import training_texts
from data.token_cache import cached_tokens
from training import checkpoint, proof, router_delta
from training.model import ModelArguments, build_model, load_tokenizer, local_folder, plain_head, trained_parameters
from training.objective import Objective, ObjectiveArguments, objective, total_counts
from training.routers import RouterObserver
from training.run_folder import check_output_dir, code_commit, update_json
from training.sharding import REPLICATED, make_accelerator, place, spread, wanted, whole_tensors
from training.stop_signal import StopSignal, listening
from training.token_loss import Head
from training.tracking import Tracker


@dataclass
class OptimizerArguments:
    """AdamW and its schedule."""

    max_steps: int = 2000  # optimizer steps
    per_device_train_batch_size: int = 8  # rows of a micro-batch on each process
    gradient_accumulation_steps: int = 1  # micro-batches of a step
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "cosine"  # any name transformers' get_scheduler takes
    warmup_steps: int = 200
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0  # gradients are clipped to this norm


@dataclass
class TrainArguments(ModelArguments, DataArguments, ObjectiveArguments, OptimizerArguments):
    """`remoe train`: everything that decides a run."""

    output_dir: str = field(default="???")  # the run's own folder; all that a run writes is in it
    run_name: str | None = None  # the folder's name if left out
    seed: int = 0  # data order and, for a new model, its weights
    logging_steps: int = 10  # a line of metrics.jsonl every so many steps
    save_steps: int = 200  # a checkpoint every so many steps
    save_total_limit: int = 2  # newest checkpoints that are kept
    resume_from_checkpoint: str | None = None  # auto, or a checkpoint folder
    report_to: str = "none"  # none or wandb

    def __post_init__(self) -> None:
        for base in (ModelArguments, DataArguments, ObjectiveArguments):
            base.__post_init__(self)
        if self.report_to not in ("none", "wandb"):
            raise ValueError(f"report_to={self.report_to!r}: write none or wandb")
        if self.lr_scheduler_type not in {known.value for known in SchedulerType}:
            raise ValueError(f"lr_scheduler_type={self.lr_scheduler_type!r}: write one of {', '.join(SchedulerType)}")
        for key in ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps",
                    "save_steps", "save_total_limit"):  # fmt: skip
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.distill_coef and self.trainable != "routers":
            raise ValueError(f"distill_coef={self.distill_coef} needs a base that stays: write trainable=routers")
        self.run_name = self.run_name or Path(self.output_dir).name


@dataclass
class Run:
    """What the loop works on; everything that has state."""

    args: TrainArguments
    accelerator: Accelerator
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: PackedRows
    observer: RouterObserver
    optimizer: torch.optim.Optimizer
    scheduler: Any
    trained: dict[str, Tensor]
    head: Head | None  # makes logits of hidden states, some at a time; None: the model makes all of them
    frozen_sha256: str
    step: int = 0
    num_tokens: int = 0
    wandb_id: str | None = None

    @property
    def rows_per_step(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes


def train(args: TrainArguments) -> Path:
    """Run (or go on with) the training that `args` describes.

    Returns:
        The router delta's folder, or the model's folder when everything was trained.

    Raises:
        UserError: see the messages; nothing that was saved is lost.
    """
    run = build(args)
    out = Path(args.output_dir)
    tracker = Tracker(
        out, run_name=str(args.run_name), report_to=args.report_to, config=asdict(args), max_steps=args.max_steps,
        step=run.step, wandb_id=run.wandb_id, active=run.accelerator.is_main_process,
    )  # fmt: skip
    run.wandb_id = tracker.wandb_id
    try:
        with listening() as stop:
            while run.step < args.max_steps:
                _one_step(run, tracker, stop)
    finally:
        tracker.close()
    return finish(run)


def _one_step(run: Run, tracker: Tracker, stop: StopSignal) -> None:
    """Train, record, and save when it is time to.

    Raises:
        UserError: a process was told to stop; everything is saved.
    """
    args = run.args
    metrics = train_step(run)
    if run.step % args.logging_steps == 0 or run.step in (1, args.max_steps):
        tracker.log(run.step, metrics)
    tracker.advance(run.step, metrics)
    told = torch.tensor(float(stop.came), device=run.accelerator.device)
    told_to_stop = bool(_sum_over_processes(run.accelerator, {"told": told})["told"]) and run.step < args.max_steps
    if run.step % args.save_steps == 0 or run.step == args.max_steps or told_to_stop:
        tracker.flush()
        save_checkpoint(run)
    if told_to_stop:
        raise UserError(
            f"{args.run_name} was told to stop (SIGUSR1) after step {run.step}; everything is saved: start it again with "
            "resume_from_checkpoint=auto"
        )


def build(args: TrainArguments) -> Run:
    """Load model and data, freeze, and take up a checkpoint if there is one."""
    accelerator = make_accelerator(bf16=args.bf16)
    out = Path(args.output_dir)
    resume_from = checkpoint.find(out, args.resume_from_checkpoint)
    check_output_dir(args, out, resume_from)
    torch.manual_seed(args.seed)
    model = build_model(args, seed=args.seed)
    tokenizer = load_tokenizer(str(args.tokenizer_name or args.model_name_or_path or args.config_name))
    documents = cached_tokens(training_texts(args, tokenizer), tokenizer)
    held = wanted(accelerator)
    place(model, accelerator.device, how=held)
    observer = RouterObserver(model, with_reference=args.trainable == "routers" or bool(args.router_kl_coef))
    if args.miss_coef and not observer.kind.takes_largest:
        raise UserError(
            f"miss_coef={args.miss_coef}: routers of {type(model).__name__} choose experts by groups or a correction bias, "
            "not by the largest logits, which soft misses are made of; write objective=cache"
        )
    parameters, n_all = trained_parameters(model), model.num_parameters()
    frozen_sha256 = proof.frozen_sha256(model.state_dict().items(), parameters)
    with accelerator.autocast():
        head = plain_head(model) if held == REPLICATED else None
    trained = spread(model, parameters, accelerator, how=held)
    optimizer = torch.optim.AdamW(
        trained.values(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.weight_decay,
    )
    scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=args.max_steps
    )
    run = Run(
        args=args, accelerator=accelerator, model=model, tokenizer=tokenizer,
        rows=PackedRows(documents, max_length=args.max_length, seed=args.seed), observer=observer, optimizer=optimizer,
        scheduler=scheduler, trained=trained, head=head, frozen_sha256=frozen_sha256,
    )  # fmt: skip
    if resume_from is not None:
        _resume(run, resume_from)
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        dump(args, out / "config.yaml")
        update_json(out / "proof.json", {"frozen_sha256_before": run.frozen_sha256, "trained_tensors": list(trained)})
        n_trained = sum(tensor.numel() for tensor in trained.values())
        accelerator.print(
            f"{args.run_name}: {len(trained)} tensors train ({n_trained:,} of {n_all:,} parameters), "
            f"e.g. {next(iter(trained))}; routers: {observer.kind}; frozen tensors {run.frozen_sha256[:16]}; "
            f"objective {args.objective}; weights {held}; "
            f"{rows_summary(run)}"
        )
    return run


def rows_summary(run: Run) -> str:
    tokens = run.rows_per_step * run.args.max_length
    n = run.accelerator.num_processes
    return f"{n} process{'es' * (n > 1)}, {tokens:,} tokens a step, {run.rows.tokens_per_epoch:,} tokens in the data"


def train_step(run: Run) -> dict[str, float]:
    """One optimizer step over all micro-batches and processes; returns its metrics."""
    started = time.perf_counter()
    batches = [_micro_batch(run, index) for index in range(run.args.gradient_accumulation_steps)]
    count = _sum_over_processes(run.accelerator, total_counts(run.args, batches))
    shares = [_backward(run, batch, count, index) for index, batch in enumerate(batches)]
    _add_up_gradients(run)
    if run.step == 0:
        _record_gradients(run)
    gradient_norm = _clip(run)
    learning_rate = run.scheduler.get_last_lr()[0]
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.num_tokens += int(count["tokens"])
    return {
        **_metrics(run, shares),
        "train/learning_rate": learning_rate,
        "train/grad_norm": gradient_norm,
        "train/num_tokens": run.num_tokens,
        "time/tokens_per_second": int(count["tokens"]) / (time.perf_counter() - started),
    }


def save_checkpoint(run: Run) -> None:
    """A checkpoint of the present step, written by the main process while the others wait."""
    state = {
        "scheduler": run.scheduler.state_dict(),
        "num_tokens": run.num_tokens,
        "rows_per_step": run.rows_per_step,
        "frozen_sha256": run.frozen_sha256,
        "wandb_id": run.wandb_id,
    }
    if run.accelerator.is_main_process:
        checkpoint.save(
            Path(run.args.output_dir), run.step, trained=run.trained, optimizer=run.optimizer, state=state,
            keep=run.args.save_total_limit,
        )  # fmt: skip
    run.accelerator.wait_for_everyone()


def finish(run: Run) -> Path:
    """Check that nothing frozen has changed and write the result."""
    run.observer.close()
    out = Path(run.args.output_dir)
    after = proof.frozen_sha256(whole_tensors(run.model), run.trained)
    if after != run.frozen_sha256:
        raise UserError(
            f"frozen tensors changed during training ({run.frozen_sha256[:16]} -> {after[:16]}): no delta is written"
        )
    result = out / ("router_delta" if run.args.trainable == "routers" else "model")
    if run.accelerator.is_main_process:
        update_json(out / "proof.json", {"frozen_sha256_after": after})
        if run.args.trainable == "routers":
            _save_delta(run, result)
        else:
            _save_model(run, result)
        print(
            f"{run.args.run_name}: frozen tensors {after[:16]} unchanged; {len(run.trained)} trained tensors are in {result}"
        )
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return result


def _save_model(run: Run, folder: Path) -> None:
    try:
        model: Any = run.model
        model.to(torch.bfloat16).save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model {folder} cannot be written ({error}): the disk is full or not writable. The checkpoints are whole; "
            "free some space and start again with resume_from_checkpoint=auto"
        ) from error


def _save_delta(run: Run, folder: Path) -> None:
    base = str(run.args.model_name_or_path)
    lines = (Path(run.args.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    router_delta.save(
        folder, run.trained, base_model=base,
        base_sha256=router_delta.checkpoint_sha256(local_folder(base), run.trained.keys()),
        about={
            "objective": run.args.objective,
            "config": asdict(run.args),
            "code_commit": code_commit(),
            "metrics": json.loads(lines[-1]),
        },
    )  # fmt: skip


def _micro_batch(run: Run, index: int) -> Batch:
    """The rows of micro-batch `index` of this process: those of one step are the same however they are shared out."""
    size = run.args.per_device_train_batch_size
    first = (
        run.step * run.rows_per_step + (index * run.accelerator.num_processes + run.accelerator.process_index) * size
    )
    return run.rows.batch(range(first, first + size)).to(run.accelerator.device)


def _backward(run: Run, batch: Batch, count: Mapping[str, Tensor], index: int) -> Objective:
    """Forward and backward of one micro-batch."""
    base_outputs = _base_outputs(run, batch) if run.args.distill_coef else None
    with run.observer.recording(*batch.input_ids_BS.shape) as routings:
        outputs = _outputs(run, batch)
    share = objective(
        run.args, outputs_BSX=outputs, routings=routings, batch=batch, count=count, step=run.step,
        base_outputs_BSX=base_outputs, head=run.head and _under_autocast(run.head, run.accelerator),
    )  # fmt: skip
    if not torch.isfinite(share.loss):
        raise UserError(
            f"loss is {share.loss.item()} at step {run.step + 1}, process {run.accelerator.process_index}, micro-batch "
            f"{index}: stopped before the step. Lower learning_rate; resume_from_checkpoint=auto goes on from the last save"
        )
    share.loss.backward()
    return share


def _outputs(run: Run, batch: Batch) -> Tensor:
    """Last hidden states where the loss takes them through the head itself, logits otherwise."""
    inputs = {"input_ids": batch.input_ids_BS, "position_ids": batch.position_ids_BS, "use_cache": False}
    with run.accelerator.autocast():
        outputs: Tensor = run.model.base_model(**inputs)[0] if run.head else run.model(**inputs).logits
    return outputs


def _under_autocast(head: Head, accelerator: Accelerator) -> Head:
    def run_head(hidden_tX: Tensor) -> Tensor:
        with accelerator.autocast():
            return head(hidden_tX)

    return run_head


def _add_up_gradients(run: Run) -> None:
    """Every process has its shares of the objective; what trains is small, so one exchange after the last is enough."""
    if run.accelerator.num_processes == 1:
        return
    tensors = list(run.trained.values())
    shares = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors]
    total: Tensor = run.accelerator.reduce(torch.cat([share.flatten() for share in shares]), "sum")
    for tensor, part in zip(tensors, total.split([tensor.numel() for tensor in tensors]), strict=True):
        if tensor.grad is not None or part.any():  # what has none anywhere is named by `_record_gradients`
            tensor.grad = part.view_as(tensor).clone()


@torch.no_grad()
def _base_outputs(run: Run, batch: Batch) -> Tensor:
    """What the untouched model predicts: the same frozen weights with the original routers."""
    with run.observer.original_routers():
        return _outputs(run, batch)


def _clip(run: Run) -> float:
    # looked for before clipping, which would spread one NaN over every gradient
    bad = [name for name, p in run.trained.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
    norm = float(torch.nn.utils.clip_grad_norm_(run.trained.values(), run.args.max_grad_norm))
    if bad or not math.isfinite(norm):
        raise UserError(
            f"gradient of {bad[0] if bad else 'all tensors together'} is not finite at step {run.step + 1}: stopped before "
            "the step. Lower learning_rate; resume_from_checkpoint=auto goes on from the last save"
        )
    return norm


def _record_gradients(run: Run) -> None:
    """At step 1: every trained tensor has a finite, non-zero gradient and nothing else has any."""
    norms = proof.check_gradients(run.model, run.trained)
    if run.accelerator.is_main_process:
        update_json(Path(run.args.output_dir) / "proof.json", {"gradient_norms_at_step_1": norms})


def _metrics(run: Run, shares: list[Objective]) -> dict[str, float]:
    """The step's metrics, added over micro-batches and processes; names as in the README."""
    total = _sum_over_processes(
        run.accelerator,
        {f"train/{key}": sum_of([share.terms[key] for share in shares]) for key in shares[0].terms}
        | {"reuse_L": sum_of([s.reuse_L for s in shares]), "load_LE": sum_of([s.load_LE for s in shares]),
           "hits_C": sum_of([s.hits_C for s in shares])},
    )  # fmt: skip
    reuse_L, load_LE, hits_C = (total.pop(key) for key in ("reuse_L", "load_LE", "hits_C"))
    metrics = {key: float(value) for key, value in total.items()}
    metrics["moe/reuse_rate_mean"] = float(reuse_L.mean())
    metrics |= {f"moe/layer_{layer}/reuse_rate": float(rate) for layer, rate in enumerate(reuse_L)}
    metrics["moe/cv_mean"] = float((load_LE.std(-1, correction=0) / load_LE.mean(-1)).mean())
    metrics["moe/dead_expert_frac_mean"] = float((load_LE == 0).double().mean())
    if run.args.rewards_cache:
        metrics |= {
            f"cache/lru/C{n}/hit_rate": float(rate) for n, rate in zip(run.args.cache_slots, hits_C, strict=True)
        }
    return metrics


def sum_of(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)


def _sum_over_processes(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor added over all processes, in float64 and in one exchange."""
    flat = torch.cat([tensor.double().flatten() for tensor in tensors.values()])
    parts = accelerator.reduce(flat, "sum").split([tensor.numel() for tensor in tensors.values()])
    return {key: part.view(tensor.shape) for (key, tensor), part in zip(tensors.items(), parts, strict=True)}


def _resume(run: Run, path: Path) -> None:
    state = checkpoint.load_state(path)
    for key, now in (("rows_per_step", run.rows_per_step), ("frozen_sha256", run.frozen_sha256)):
        if state.get(key) != now:
            raise UserError(
                f"{path} was written with {key}={state.get(key)}, this run has {now}: the result would not be that of one run. "
                "Restore what changed, or write another output_dir"
            )
    checkpoint.load(path, trained=run.trained, optimizer=run.optimizer)
    run.scheduler.load_state_dict(state["scheduler"])
    for group, learning_rate in zip(run.optimizer.param_groups, run.scheduler.get_last_lr(), strict=True):
        group["lr"] = learning_rate  # a scheduler's load_state_dict leaves the optimizer's rate as it was
    run.step, run.num_tokens, run.wandb_id = state["global_step"], state["num_tokens"], state["wandb_id"]
    run.accelerator.print(f"{run.args.run_name}: resumed from {path}")

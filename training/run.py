"""A training run: how it is built, saved, resumed and finished; what happens in between is in `loop.py`."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from configs.files import prepare_folder, write_yaml
from configs.load import UserError
from data.batches import PackedRows
from data.token_cache import Documents, left_out_text, training_documents
from training.arguments import TrainArguments
from training.model import loading
from training.model.layerwise_checkpoint import LayerwiseCheckpoint
from training.model.lazy_weights import stored_tensors
from training.model.packed_experts import count_parameters
from training.model.packing import keeps_documents_apart
from training.model.routers import RouterObserver, task_reaches_routers
from training.objective.objective import Objective
from training.objective.terms import TERMS
from training.objective.token_loss import Head
from training.run_folder import checkpoint, proof, router_delta
from training.run_folder.folder import (
    check_output_dir,
    check_same_run,
    code_commit,
    decisive,
    explaining_a_full_disk,
    update_json,
)
from training.sharding.launcher import REPLICATED, make_accelerator, weight_layout
from training.sharding.layerwise import load_layerwise, move_whole_tensors, whole_tensors
from training.sharding.placement import check_memory


@dataclass(frozen=True)
class TakenStep:
    """What a step gave, on the device where it is: reading it means to wait for that.

    Letters: P trained tensors.
    """

    step: int  # from 1
    began: float  # on this process's clock
    learning_rate: float
    tokens: Tensor
    shares: list[Objective]  # of this process's micro-batches
    norms_P: Tensor  # of the gradients, before clipping
    norm: Tensor


@dataclass
class Run:
    """What the loop works on; everything that has state."""

    args: TrainArguments
    accelerator: Accelerator
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    documents: Documents
    rows: PackedRows
    observer: RouterObserver
    optimizer: torch.optim.Optimizer
    scheduler: Any
    trained: dict[str, Tensor]
    head: Head | None  # makes logits of hidden states, some at a time; None: the model makes all of them
    frozen_sha256: str
    packs: bool  # documents share rows; otherwise the model would let them see each other, and each has its own
    proof_step: int  # gradients are checked in this step, counted from 0
    step: int = 0
    taken: list[TakenStep] = field(default_factory=list)  # steps that were not read yet
    num_tokens: int = 0
    wandb_id: str | None = None

    @property
    def rows_per_step(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes

    @property
    def reads_at_once(self) -> bool:
        """Whether a step's numbers are looked at before the next one, for which an accelerator would have to be waited for."""
        return self.accelerator.device.type == "cpu"


def build(args: TrainArguments) -> Run:
    """Load model and data, freeze, and resume from a checkpoint if there is one."""
    accelerator = make_accelerator(bf16=args.bf16)
    resume_from = checkpoint.find(Path(args.output_dir), args.resume_from_checkpoint)
    check_output_dir(args, resume_from)
    if resume_from is not None:
        check_same_run(args, checkpoint.load_state(resume_from).get("config", {}), where=resume_from)
    layout = weight_layout(accelerator)
    if layout != REPLICATED and args.trainable == "all":
        advice = "with trainable=all use configs/accelerate/multi_gpu.yaml"
        raise UserError(f"{layout} here shards what does not train; {advice}")
    check_memory(args, accelerator, layout=layout)
    prepare_folder(args.output_dir, make=False)
    tokenizer = loading.load_tokenizer(str(args.tokenizer_name or args.model_name_or_path or args.config_name))
    documents = _read(args, tokenizer, accelerator)
    torch.manual_seed(args.seed)
    base, dtype = str(args.model_name_or_path), loading.weights_dtype(args)
    weights = None
    if layout != REPLICATED:
        weights = LayerwiseCheckpoint(loading.local_folder(base), dtype=dtype, experts=args.experts)
    disk = Path(args.output_dir) if args.experts_on_disk else None
    model = loading.build_model(args, seed=args.seed, weights=weights, disk=disk)
    n_parameters = count_parameters(model)
    move_whole_tensors(model, accelerator.device, layout=layout)
    if layout != REPLICATED and args.is_local:
        raise UserError(
            f"objective=local asks each router by itself, which {layout} does not allow; use multi_gpu.yaml"
        )
    observer, proof_step = _observe(args, model), _proof_step(args, model)
    trained, digest_of, head = _trained(model, accelerator, layout=layout, weights=weights)
    if args.trainable == "routers":  # what could not be exported in the end is not begun
        stored_tensors(loading.local_folder(base), trained)
    optimizer, scheduler = _optimizer(args, trained)
    rows, digest = PackedRows(documents, max_length=args.max_length, seed=args.seed), proof.combined(digest_of)
    with accelerator.autocast():
        packs = keeps_documents_apart(model, args.max_length, sharded=layout != REPLICATED)
    state = (observer, optimizer, scheduler, trained, head, digest, packs, proof_step)
    run = Run(args, accelerator, model, tokenizer, documents, rows, *state)
    if resume_from is not None:
        _resume(run, resume_from)
    if accelerator.is_main_process:
        _announce(run, f"{n_parameters:,} parameters", layout=layout)
    return run


def _observe(args: TrainArguments, model: PreTrainedModel) -> RouterObserver:
    """The observer of the model's routers, which keeps the original ones where the objective may compare with them."""
    observer = RouterObserver(model, with_reference=args.trainable == "routers" or bool(args.router_kl_coef))
    if args.miss_coef and not args.is_in_the_loop and not observer.kind.takes_largest:
        raise UserError(
            f"miss_coef={args.miss_coef}: routers of {type(model).__name__} choose experts by groups or a correction bias, "
            "not by the largest logits, which soft misses are made of; write objective=cache or in_the_loop"
        )
    if args.is_in_the_loop and (observer.kind.weighing is None or observer.kind.choosing is None):
        raise UserError(
            f"lever_delta={args.lever_delta}: with a cache in the loop routers must choose and weigh experts in a way that is "
            f"known; those of {type(model).__name__} do not; write objective=cache"
        )
    if args.is_in_the_loop and args.gradient_checkpointing:
        raise UserError(
            "gradient_checkpointing=true: what is computed anew would be so without the cache in the loop; write false, or "
            "objective=cache_miss"
        )
    return observer


def _proof_step(args: TrainArguments, model: PreTrainedModel) -> int:
    """The step after whose backward pass gradients are checked: the first, unless only terms that grow from 0 reach routers.

    A `UserError` if nothing does: routers that give the one expert they choose the weight 1 leave the task loss no say.
    """
    if args.trainable == "all" or (task_reaches_routers(model) and not args.is_local):
        return 0
    if any(args.coefficient(term.coefficient) for term in TERMS if not (args.is_local and term.name == "trust_kl")):
        return 1
    if args.is_local:
        raise UserError(
            "objective=local has no term but trust, which holds routers where they are; write miss_coef=0.08"
        )
    raise UserError(
        f"objective={args.objective}: routers of {type(model).__name__} choose one expert and give it the weight 1 whatever "
        "their logits, so that the task loss does not depend on them and cannot train them; write objective=remoe"
    )


def _trained(
    model: PreTrainedModel, accelerator: Accelerator, *, layout: str, weights: LayerwiseCheckpoint | None
) -> tuple[dict[str, Tensor], dict[str, str], Head | None]:
    """The trained tensors, the digests of all others, and the head if it may be applied to some positions at a time.

    With `weights` the decoder layers are loaded and sharded; a sharded head is left to the model.
    """
    parameters = loading.trained_parameters(model)
    if weights is not None:
        digest_of: dict[str, str] = {}

        def found(tensors: Iterable[tuple[str, Tensor]]) -> None:
            digest_of.update(proof.digests(tensors, parameters))

        how: Any = {"layout": layout, "weights": weights, "found": found}
        return load_layerwise(model, parameters, accelerator, **how), digest_of, None
    with accelerator.autocast():
        head = loading.plain_head(model)
    digest_of = proof.digests(model.state_dict().items(), parameters)
    return dict[str, Tensor](parameters), digest_of, head and accelerator.autocast()(head)


def _optimizer(args: TrainArguments, trained: Mapping[str, Tensor]) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW over what trains, and the schedule of its learning rate."""
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.AdamW(trained.values(), lr=args.learning_rate, betas=betas, weight_decay=args.weight_decay)
    return optimizer, get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, args.max_steps)


def _announce(run: Run, size: str, *, layout: str) -> None:
    """Say what trains, and write it into the run's folder."""
    out = Path(run.args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_yaml(out / "config.yaml", run.args)
    about = {"frozen_sha256_before": run.frozen_sha256, "trained_tensors": list(run.trained)}
    update_json(out / "proof.json", {**about, "rows_left_out": run.documents.left_out})
    n_trained, n = sum(tensor.numel() for tensor in run.trained.values()), run.accelerator.num_processes
    print(
        f"{run.args.run_name}: {len(run.trained)} tensors train ({n_trained:,} of {size}), e.g. {next(iter(run.trained))}; "
        f"routers: {run.observer.kind}; frozen tensors {run.frozen_sha256[:16]}; objective {run.args.objective}; "
        f"weights {layout}; {n} process{'es' * (n > 1)}, {run.rows_per_step * run.args.max_length:,} tokens a step, "
        f"{run.rows.tokens_per_epoch:,} tokens in the data, {run.args.train_file or run.args.dataset_name}"
    )
    if columns := [f"{column} ({rows:,} rows)" for column, rows in run.documents.columns.items() if column]:
        print(f"{run.args.run_name}: documents are read from the columns {', '.join(columns)}")
    if not run.packs:
        print(f"{run.args.run_name}: each document has a row of its own: in one row this model would mix them")


def _read(args: TrainArguments, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator) -> Documents:
    """Tokens of the data; one process of every machine makes them, the others find them made.

    Raises:
        UserError: rows are longer than the model's positions reach, or a token has no embedding.
    """
    config = loading.read_text_config(args)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and args.max_length > positions:
        raise UserError(
            f"max_length={args.max_length} is more than the {positions} positions of the model; write at most that"
        )
    with accelerator.local_main_process_first():
        documents = training_documents(args, tokenizer, progress=accelerator.is_local_main_process)
    if documents.left_out:
        accelerator.print(left_out_text(documents))
    if documents.largest_id >= config.vocab_size:
        token = tokenizer.convert_ids_to_tokens(documents.largest_id)
        raise UserError(
            f"token {documents.largest_id} ({token!r}) of the data has no embedding: the model has {config.vocab_size}; give "
            "the tokenizer that it was trained with as tokenizer_name, or resize the model's embeddings"
        )
    return documents


def save_checkpoint(run: Run) -> None:
    """A checkpoint of the present step, written by the main process while the others wait."""
    state = {key: getattr(run, key) for key in ("num_tokens", "rows_per_step", "frozen_sha256", "wandb_id")}
    state |= {
        "scheduler": run.scheduler.state_dict(),
        "data_sha256": run.documents.sha256,
        "config": decisive(run.args),
    }
    out, keep = Path(run.args.output_dir), run.args.save_total_limit
    if run.accelerator.is_main_process:
        checkpoint.save(out, run.step, trained=run.trained, optimizer=run.optimizer, state=state, keep=keep)
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
        (_save_delta if run.args.trainable == "routers" else _save_model)(run, result)
        said = f"frozen tensors {after[:16]} unchanged; {len(run.trained)} trained tensors are in {result}"
        print(f"{run.args.run_name}: {said}")
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return result


def _save_model(run: Run, folder: Path) -> None:
    model: Any = run.model
    with explaining_a_full_disk(f"model {folder}"):
        model.to(torch.bfloat16).save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)


def _save_delta(run: Run, folder: Path) -> None:
    base = str(run.args.model_name_or_path)
    digest = router_delta.checkpoint_sha256(loading.local_folder(base), run.trained.keys())
    metrics = Path(run.args.output_dir) / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    about = {"objective": run.args.objective, "config": asdict(run.args), "code_commit": code_commit()}
    about["metrics"] = json.loads(lines[-1]) if lines else {}
    router_delta.save(folder, run.trained, base_model=base, base_sha256=digest, about=about)


def _resume(run: Run, path: Path) -> None:
    state = checkpoint.load_state(path)
    whats = {
        "rows_per_step": (run.rows_per_step, "batch size, accumulation steps or processes"),
        "frozen_sha256": (run.frozen_sha256, "the base model"),
        "data_sha256": (run.documents.sha256, "the data or the tokenizer"),
    }
    for key, (now, what) in whats.items():
        if state.get(key, now if key == "data_sha256" else None) != now:  # which checkpoints had not before it was kept
            raise UserError(
                f"{path} was written with {key}={state.get(key)}, this run has {now}: {what} changed, and the result would not "
                "be that of one run. Restore it, or start afresh in another output_dir, without resume_from_checkpoint"
            )
    checkpoint.load(path, trained=run.trained, optimizer=run.optimizer)
    run.scheduler.load_state_dict(state["scheduler"])
    for group, learning_rate in zip(run.optimizer.param_groups, run.scheduler.get_last_lr(), strict=True):
        group["lr"] = learning_rate  # a scheduler's load_state_dict leaves the optimizer's rate as it was
    run.step, run.num_tokens, run.wandb_id = state["global_step"], state["num_tokens"], state["wandb_id"]
    run.accelerator.print(f"{run.args.run_name}: resumed from {path}")

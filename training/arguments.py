"""Everything that decides a training run, as keys of one YAML."""

import math
from dataclasses import dataclass
from pathlib import Path

from configs.checks import in_range
from data.batches import DataArguments
from training.model.loading import ModelArguments
from training.objective.terms import ObjectiveArguments

SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
)  # fmt: skip


@dataclass
class OptimizerArguments:
    """AdamW and its schedule."""

    max_steps: int = 2000  # optimizer steps of the whole run
    per_device_train_batch_size: int = 8  # rows of a micro-batch on each process
    gradient_accumulation_steps: int = 1  # micro-batches of a step
    learning_rate: float = 5e-5  # AdamW's step size after warm-up
    lr_scheduler_type: str = "cosine"  # a schedule of transformers that needs nothing else
    warmup_steps: int = 200  # steps in which the learning rate grows from 0
    weight_decay: float = 0.0  # AdamW's decoupled decay, multiplied by the learning rate
    adam_beta1: float = 0.9  # decay of the running mean of gradients, per step
    adam_beta2: float = 0.999  # decay of the running mean of squared gradients, per step
    max_grad_norm: float = 1.0  # gradients of all tensors together are clipped to this norm; 0: they are not

    def __post_init__(self) -> None:
        unbounded = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps")
        in_range(self, **dict.fromkeys(unbounded, (0, math.inf)), adam_beta1=(0, 1), adam_beta2=(0, 1))


@dataclass
class TrainArguments(ModelArguments, DataArguments, ObjectiveArguments, OptimizerArguments):
    """`remoe train`: everything that decides a run."""

    output_dir: str = "???"  # the run's own folder; all that a run writes is in it
    run_name: str | None = None  # what messages and W&B call the run; null: the name of its folder
    seed: int = 0  # decides the order of the data and, for a new model, its weights
    # steps from one line of metrics.jsonl to the next; off the CPU, numbers are read only then
    logging_steps: int = 10
    save_steps: int = 200  # steps from one checkpoint to the next
    save_total_limit: int = 2  # checkpoints that are kept, the newest
    resume_from_checkpoint: str | None = None  # auto (the newest), or a checkpoint folder; null: start afresh
    eval_steps: int | None = None  # steps from one evaluation to the next, and one before the first; null: none
    eval_config: str | None = None  # what is measured then: a YAML as for `remoe evaluate`, small, without a budget
    report_to: str = "none"  # none, or wandb for a copy of the metrics at Weights & Biases

    def __post_init__(self) -> None:
        for base in (ModelArguments, DataArguments, ObjectiveArguments, OptimizerArguments):
            base.__post_init__(self)
        if self.report_to not in ("none", "wandb"):
            raise ValueError(f"report_to={self.report_to!r}: write none or wandb")
        if (self.eval_steps is None) != (self.eval_config is None):
            raise ValueError("eval_steps and eval_config go together: how often is measured, and a YAML that says what")
        if self.lr_scheduler_type not in SCHEDULES:
            raise ValueError(f"lr_scheduler_type={self.lr_scheduler_type!r}: write one of {', '.join(SCHEDULES)}")
        counts = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps",
                  "save_steps", "save_total_limit")  # fmt: skip
        in_range(self, **dict.fromkeys(counts, (1, math.inf)), eval_steps=(1, math.inf), seed=(0, 2**32))
        if self.distill_coef and self.trainable != "routers":
            raise ValueError(f"distill_coef={self.distill_coef} needs a base that stays: write trainable=routers")
        self.run_name = self.run_name or Path(self.output_dir).name
